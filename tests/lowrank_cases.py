"""What a student of factors must keep on every ZeRO stage; one process a rank runs them all, result as JSON."""

from __future__ import annotations

import json
from types import SimpleNamespace

import tiny
import torch
from engine_cases import BATCH, LR, OPTIM, Rows, shared_directory

from distill import snapshot, world
from distill.engine import KEYS, Engine
from distill.lesson import Data, Lesson
from distill.lowrank import students
from distill.lowrank.refactor import Refactor, refactor
from distill.lowrank.spec import LowRankSpec
from distill.objectives import OBJECTIVES

SPEC = LowRankSpec(rank=7, alpha=3.0, density=0.1)
AGAIN, STEPS = Refactor(every=3, recovery=0), 5


def student() -> torch.nn.Module:
    """Factors of which none is zero."""
    model = tiny.model("bert", head="mlm", seed=1)
    for name, f in students.factors_of(model, SPEC, 0, random=False).items():
        students.hold(model, name.removesuffix(".weight"), f)
    return model


class Run:
    """The loop of train.py without the recipe around it."""

    def __init__(self, stage: int, precision: str):
        self.lesson = Lesson(student(), {"ce": OBJECTIVES["ce"](objective="mlm")})
        self.data = Data(Rows(), BATCH, 2, True, torch.device("cpu"))
        spec = SimpleNamespace(zero=stage, precision=precision, deepspeed={})
        self.lesson.student.bert.pooler = None
        self.engine = Engine(self.lesson, spec, SimpleNamespace(**OPTIM), 2)

    def step(self, step: int) -> None:
        objectives, batches = self.lesson.objectives, self.data(step)
        (count,) = world.agree(sum(float(objectives["ce"].count(batch)["mlm"]) for batch in batches))
        for batch in batches:
            self.engine.backward(self.engine(batch, {}, objectives)["ce.mlm"] / count)
        self.engine.step(LR)
        if AGAIN.due(step + 1, STEPS):
            refactor(self.engine, self.lesson)

    def state(self) -> dict:
        return {(key, name): tensor.clone() for key in KEYS for name, tensor in self.engine.state(key)}


def merged(state: dict) -> dict[str, torch.Tensor]:
    """{parameter: its weight}, with B A in the place of factors."""
    own = {name.removeprefix("student."): tensor for (key, name), tensor in state.items() if key == "master"}
    products = {name[:-1] + "BA": own.pop(name) @ own.pop(name[:-1] + "A") for name in list(own) if name.endswith(".B")}
    return own | products


def kept(before: dict, after: dict) -> dict:
    """By how much a refactoring moved a weight; and whether it forgot the moments, and balanced the factors."""
    a, b = merged(before), merged(after)
    masters = {name: tensor for (key, name), tensor in after.items() if key == "master"}
    factors = [(B, masters[name[:-1] + "A"]) for name, B in masters.items() if name.endswith(".B")]
    return {
        "moved": max(float((a[name] - b[name]).abs().max()) for name in a),
        "forgot": not any(tensor.any() for (key, _), tensor in after.items() if key != "master"),
        "balanced": max(float((B.T @ B - A @ A.T).abs().max()) for B, A in factors),
    }


def case(stage: int, precision: str) -> dict:
    """Five steps with a refactoring behind the third; a snapshot behind the fourth, and the fifth again from it."""
    run = Run(stage, precision)
    for step in range(2):
        run.step(step)
    before = run.state()
    refactor(run.engine, run.lesson)
    found = kept(before, run.state())
    run.engine.close()
    run = Run(stage, precision)
    for step in range(4):
        run.step(step)
    with shared_directory() as parent:
        path = snapshot.save(parent, 4, run.engine, {}, {})
        run.step(4)
        end = run.state()
        run.engine.close()
        again = Run(stage, precision)
        snapshot.restore(path, again.engine, {}, lambda steps, phases: steps - AGAIN.last(steps))
        again.step(4)
        same = again.state()
        again.engine.close()
        world.barrier()
    flat = torch.cat([tensor.flatten() for name, tensor in sorted(merged(end).items()) if "key.bias" not in name])
    return {**found, "resumes": all(torch.equal(end[key], same[key]) for key in end), "weights": flat.tolist()}


def main() -> None:
    torch.set_num_threads(1)
    found = {f"{stage} {precision}": case(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
