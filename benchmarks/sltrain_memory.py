"""SLTrain against full rank: bytes of moments and gradients as predicted from the config, and what a step takes.

    python benchmarks/sltrain_memory.py [--hidden 384] [--layers 4] [--rank 96] [--density 0.03] [--rows 8] [--steps 2]

The prediction is written before anything is measured: two float32 moments and one gradient for every number that is
trained, counted from the config alone. Then each arm trains a few steps under the engine (ZeRO 0, float32) in a process
of its own; bytes are those of the tensors that optimizer and parameters hold behind the last backward pass, the peak is
the rise of the process's resident size over the steps. CPU seconds of a step, the smallest, because the machine is
shared. SLTrain saves memory, not FLOPs: its matrices are built anew in every pass, and a step takes longer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from distill import models
from distill.cost import forward, work
from distill.engine import Engine
from distill.lesson import Lesson
from distill.lowrank import counting, students
from distill.lowrank.spec import LowRankSpec
from distill.objectives import OBJECTIVES
from growth.console import count, size, table
from growth.files import write_json

LENGTH, VOCAB = 128, 512
RESULTS = Path(__file__).parent / "results" / "sltrain_memory.json"
OPTIM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0}


def config(given) -> dict:
    return {
        **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB},
        **{"hidden_size": given.hidden, "intermediate_size": given.hidden * 43 // 16, "num_attention_heads": 8},
        **{"num_hidden_layers": given.layers, "max_position_embeddings": LENGTH},
    }


def spec(given) -> LowRankSpec:
    return LowRankSpec(rank=given.rank, alpha=32.0, density=given.density)


def predicted(given, arm: str) -> dict:
    """From the config."""
    facts = counting.facts(config(given), spec(given) if arm == "sltrain" else None)
    numbers, flops = facts.parameters, 3 * forward(work(facts, head=True), ((given.rows, LENGTH),)) + facts.rebuilt
    return {"numbers": numbers, "moments": 8 * numbers, "gradients": 4 * numbers, "flops": flops}


def measure(given, arm: str) -> dict:
    """One arm, in this process."""
    torch.set_num_threads(1)
    engine = Engine(_lesson(given, arm), SimpleNamespace(zero=0, precision="fp32", deepspeed={}),
                    SimpleNamespace(**OPTIM, batch=given.rows), given.rows)  # fmt: skip
    before, seconds, gradients = _resident(), [], 0
    for step in range(given.steps):
        batch, began = _batch(given, step), time.process_time()
        terms = engine(batch, {}, engine.engine.module.objectives)
        engine.backward(sum(terms.values()) / (given.rows * (LENGTH - 1)))
        gradients = sum(p.grad.nbytes for p in engine.engine.module.parameters())
        engine.step(0.001)
        seconds.append(time.process_time() - began)
    state = engine.engine.optimizer.state.values()
    return {
        "moments": sum(held[key].nbytes for held in state for key in ("exp_avg", "exp_avg_sq")),
        "gradients": gradients,
        "weights": sum(p.nbytes for p in engine.engine.module.parameters()),
        "places": sum(b.nbytes for n, b in engine.engine.module.named_buffers() if n.endswith("indices")),
        "peak_rise": _resident() - before,
        "cpu_seconds": min(seconds),
    }


def _lesson(given, arm: str) -> Lesson:
    student = models.fresh(models.loading.configuration(config(given)), "causal", 0)
    if arm == "sltrain":
        for name, f in students.factors_of(student, spec(given), 0, random=True).items():
            students.hold(student, name.removesuffix(".weight"), f)
    return Lesson(student.train(), {"ce": OBJECTIVES["ce"](objective="causal")})


def _batch(given, step: int) -> dict:
    ids = torch.randint(VOCAB, (given.rows, LENGTH), generator=torch.Generator().manual_seed(step))
    ones = torch.ones_like(ids)
    return {"input_ids": ids, "segment_ids": ones, "labels": ids, "sample_ids": torch.arange(given.rows)}


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    given = _arguments()
    if given.arm:
        print(json.dumps(measure(given, given.arm)))
        return
    arms = {arm: {"predicted": predicted(given, arm)} for arm in ("full", "sltrain")}
    told = {key: value for key, value in vars(given).items() if key != "arm"}
    write_json(RESULTS, {"arguments": told, "arms": arms})
    for arm, found in arms.items():
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--arm", arm]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found["measured"] = json.loads(ended.stdout.splitlines()[-1])
    write_json(RESULTS, {"arguments": told, "arms": arms})
    _show(arms)


def _show(arms: dict) -> None:
    lines = []
    for arm, found in arms.items():
        said, seen = found["predicted"], found["measured"]
        both = [f"{size(seen[key])} / {size(said[key])}" for key in ("moments", "gradients")]
        rest = [size(seen[key]) for key in ("weights", "places", "peak_rise")]
        lines.append([arm, count(said["numbers"]), *both, *rest, f"{said['flops']:.3g}", f"{seen['cpu_seconds']:.2f}"])
    head = ["arm", "trained", "moments: measured / predicted", "gradients", "weights", "places", "peak rise"]
    table([*head, "FLOPs a step", "CPU s a step"], lines, "SLTrain against full rank")
    full, held = (arms[arm] for arm in ("full", "sltrain"))
    slower = held["measured"]["cpu_seconds"] / full["measured"]["cpu_seconds"]
    work = held["predicted"]["flops"] / full["predicted"]["flops"]
    print(f"A step of SLTrain takes {slower:.2f} of the CPU time and does {work:.2f} of the FLOPs of one of full rank.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"hidden": 384, "layers": 4, "rank": 96, "rows": 8, "steps": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--density", type=float, default=0.03)
    parser.add_argument("--arm", choices=["full", "sltrain"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
