"""What masks cost a step of training: CPU seconds with them over CPU seconds without, in alternating pairs.

    OMP_NUM_THREADS=2 python benchmarks/mask_overhead.py [--pairs 30] [--zero 0] [--precision fp32] [--hold bits]

Two engines of the same language model of four layers of 256 (feed-forward 1024, 2048 tokens) take the same step of 16
rows of 128 tokens in turn, in changing order: 2,048 tokens, forward, backward, clipping and AdamW. Wall seconds stand
beside; on a machine that others use too only the CPU seconds of this process tell something, and the last line most:
what the hooks alone take, all that is added to a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
import transformers

from distill.engine import Engine
from distill.sparsity.held import HOLD
from distill.sparsity.masking import Masking
from growth import families
from growth.scope import AXES, matrices

ROWS, LENGTH, VOCAB = 16, 128, 2048
OPTIM = {"batch": ROWS, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCAB, **sizes))

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids).loss


def masks(loss: Loss, sparsity: float) -> dict[str, torch.Tensor]:
    named, config = dict(loss.named_parameters()), loss.model.config.to_dict()
    names = [f"model.{name}" for name in matrices(families.of(config), config, AXES, "model.")]
    return {name: torch.rand(named[name].shape) >= sparsity for name in names}


def engine(arguments, sparsity: float | None) -> tuple[Engine, Masking]:
    loss = Loss()
    masking = Masking(loss, masks(loss, sparsity) if sparsity is not None else {}, hold=arguments.hold)
    spec = SimpleNamespace(zero=arguments.zero, precision=arguments.precision, deepspeed={})
    return Engine(loss, spec, SimpleNamespace(**OPTIM), ROWS), masking


def step(run: Engine, ids: torch.Tensor) -> tuple[float, float]:
    """(CPU seconds, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    run.backward(run(ids))
    run.step(1e-3)
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--hold", choices=HOLD, default="bools")
    arguments = parser.parse_args()
    dense, _ = engine(arguments, None)
    sparse, masking = engine(arguments, arguments.sparsity)
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    for run in (dense, sparse) * 2:  # the first steps make buffers
        step(run, ids)
    spent = {dense: [], sparse: []}
    for pair in range(arguments.pairs):
        for run in (dense, sparse) if pair % 2 else (sparse, dense):
            spent[run].append(step(run, ids))
    masking.check(sparse)
    report(arguments, spent[dense], spent[sparse], masking)


def alone(masking: Masking, times: int = 50) -> float:
    """CPU seconds of all hooks of one step: the least of some runs."""
    gradients = {name: torch.randn(dead.shape) for name, dead in masking.dead.items()}
    spent = []
    for _ in range(times):
        began = time.process_time()
        for name, gradient in gradients.items():
            masking._alive(name, gradient)
        spent.append(time.process_time() - began)
    return min(spent)


def report(arguments, dense: list, sparse: list, masking: Masking) -> None:
    threads, tokens = torch.get_num_threads(), ROWS * LENGTH
    print(f"{tokens} tokens a step, {threads} threads, ZeRO {arguments.zero}, {arguments.precision}, "
          f"{masking.masked / 1e6:.2f} M weights under {arguments.hold} of sparsity {arguments.sparsity}")  # fmt: skip
    for what, at in (("CPU", 0), ("wall", 1)):
        ratios = sorted(s[at] / d[at] for s, d in zip(sparse, dense, strict=True))
        quarters = statistics.quantiles(ratios, n=4)
        print(f"{what} seconds: dense {statistics.median(d[at] for d in dense):.4f}, masked "
              f"{statistics.median(s[at] for s in sparse):.4f}; ratio, median of {len(ratios)} pairs "
              f"{statistics.median(ratios):.3f} (quartiles {quarters[0]:.3f} to {quarters[2]:.3f})")  # fmt: skip
    hooks, least = alone(masking), min(cpu for cpu, _ in dense)
    print(f"the hooks alone: {hooks * 1000:.1f} CPU ms a step, {hooks / least:.2%} of the fastest dense step")


if __name__ == "__main__":
    main()
