"""What compiling the blocks of student and teacher saves in a tapped step, in alternating pairs with the same plain.

    OMP_NUM_THREADS=1 python benchmarks/compiled_blocks.py [--pairs 10] [--precision float32 bfloat16]

Sizes of all-MiniLM-L6-v2 with random weights, 16 packed rows of 128 tokens, one thread. `distil`: a 6-layer teacher and
its 3-layer student, relations of the last queries, keys and values, as in `distill run minilm`, without the optimizer.
`encoder`: 6 layers forward and backward. Every block is compiled by itself (`block.compile()`, inductor). Seconds are
those of the processor, which other jobs on a machine do not lengthen much; the ratio is the median of the pairs. The
first step is by the clock, and cold if TORCHINDUCTOR_CACHE_DIR names a new directory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import BertConfig, BertModel

from distill import taps
from distill.objectives import relation_kl

LAST = [(role, -1) for role in ("query", "key", "value")]
ROWS, LENGTH, HEADS = 16, 128, 48


def model(layers: int, seed: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536)
    return BertModel(BertConfig(**sizes), add_pooling_layer=False).to(dtype).eval()


def batch() -> dict[str, torch.Tensor]:
    """Rows of three documents."""
    draw = torch.Generator().manual_seed(0)
    segments = (1 + torch.arange(LENGTH) * 3 // LENGTH).expand(ROWS, LENGTH)
    return {"input_ids": torch.randint(1000, 30000, (ROWS, LENGTH), generator=draw), "segment_ids": segments}


def seen(net: nn.Module, rows: dict, wanted: list, learns: bool):
    with nullcontext() if learns else torch.no_grad():
        return taps.trace(net, rows, wanted).taps


def distil(dtype: torch.dtype, rows: dict) -> tuple[list[nn.Module], Callable[[], torch.Tensor]]:
    teacher, student = model(6, 0, dtype), model(3, 1, dtype)

    def loss() -> torch.Tensor:
        taught, learnt = seen(teacher, rows, LAST, False), seen(student, rows, LAST, True)
        return sum(relation_kl(taught[tap], learnt[tap], rows["segment_ids"], HEADS) for tap in LAST)

    return [student, teacher], loss


def encoder(dtype: torch.dtype, rows: dict) -> tuple[list[nn.Module], Callable[[], torch.Tensor]]:
    net, tap = model(6, 0, dtype), ("hidden", -1)
    goal = torch.randn(ROWS, LENGTH, 384, generator=torch.Generator().manual_seed(2))
    return [net], lambda: (seen(net, rows, [tap], True)[tap].float() - goal).square().mean()


def step(models: list[nn.Module], loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    """One gradient of the first model [n]."""
    models[0].zero_grad()
    loss().backward()
    return torch.cat([p.grad.flatten().float() for p in models[0].parameters() if p.grad is not None])


def timed(run: Callable) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def compare(case: Callable, dtype: torch.dtype, pairs: int) -> str:
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = case(dtype, batch()), case(dtype, batch())
    for net in compiled[0]:
        for block in taps.blocks(net):
            block.compile()
    began = time.perf_counter()
    step(*compiled)
    warm_up, expected = time.perf_counter() - began, step(*plain)
    gap = float((step(*compiled) - expected).norm() / expected.norm())
    seconds = [(timed(lambda: step(*plain)), timed(lambda: step(*compiled))) for _ in range(pairs)]
    before, after = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(b / a for a, b in seconds)
    return (
        f"{case.__name__:8} {str(dtype)[6:]:9} plain {before:.3f} s, compiled {after:.3f} s, ratio {ratio:.3f}; "
        f"first step {warm_up:.0f} s, {counters['stats']['unique_graphs']} graphs, "
        f"{sum(counters['graph_break'].values())} breaks; gradients apart by {gap:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for precision in given.precision:
        for case in (distil, encoder):
            print(compare(case, getattr(torch, precision), given.pairs), flush=True)


if __name__ == "__main__":
    main()
