"""What a student of factors must keep on every ZeRO stage; one process a rank runs them all, result as JSON.

The engine gives back what stage 3 patches, so that the stages can follow each other in one process.
"""

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
LOSSES = {"ce": OBJECTIVES["ce"](objective="mlm"), "perturbation": OBJECTIVES["perturbation"]()}
AGAIN, SAVED, STEPS = Refactor(every=2, recovery=0), 3, 4
CELLS = {  # by the number of ranks
    1: [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")],
    2: [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")],
}


def student() -> torch.nn.Module:
    """Factors of which none is zero."""
    model = tiny.model("bert", head="mlm", seed=1, num_hidden_layers=2)
    for name, f in students.factors_of(model, SPEC, 0, random=False).items():
        students.hold(model, name.removesuffix(".weight"), f, model.get_parameter(name).detach().clone())
    return model


class Run:
    """The loop of train.py without the recipe around it."""

    def __init__(self, stage: int, precision: str):
        self.lesson = Lesson(student(), LOSSES)
        self.data = Data(Rows(), BATCH, 4, True, torch.device("cpu"))
        spec = SimpleNamespace(zero=stage, precision=precision, deepspeed={})
        self.engine = Engine(self.lesson, spec, SimpleNamespace(**OPTIM), 4)
        self.kept: list[dict] = []

    def step(self, step: int) -> None:
        objectives, batches = self.lesson.objectives, self.data(step)
        count, runs = world.agree(sum(float(objectives["ce"].count(batch)["mlm"]) for batch in batches), len(batches))
        for batch in batches:
            terms = self.engine(batch, {}, objectives)
            self.engine.backward(terms["ce.mlm"] / count + terms["perturbation.max"] / runs)
        self.engine.step(LR)
        if AGAIN.due(step + 1, STEPS):
            before = self.state()
            refactor(self.engine, self.lesson)
            self.kept.append(kept(before, self.state()))

    def state(self) -> dict:
        return {(key, name): tensor.clone() for key in KEYS for name, tensor in self.engine.state(key)}


def merged(named) -> dict[str, torch.Tensor]:
    """{parameter: its weight}, with B A in the place of factors."""
    own = dict(named)
    products = {name[:-1] + "BA": own.pop(name) @ own.pop(name[:-1] + "A") for name in list(own) if name.endswith(".B")}
    return own | products


def flat(named) -> torch.Tensor:
    """All weights but key biases: softmax does not feel them, so Adam blows rounding noise up to full steps."""
    return torch.cat([tensor.flatten() for name, tensor in sorted(merged(named).items()) if "key.bias" not in name])


def masters(state: dict) -> dict[str, torch.Tensor]:
    return {name.removeprefix("student."): tensor for (key, name), tensor in state.items() if key == "master"}


def kept(before: dict, after: dict) -> dict:
    """By how much a refactoring moved a weight; whether it forgot the moments and balanced the factors."""
    a, b = merged(masters(before)), merged(masters(after))
    new = masters(after)
    factors = [(B, new[name[:-1] + "A"]) for name, B in new.items() if name.endswith(".B")]
    return {
        "moved": max(float((a[name] - b[name]).abs().max()) for name in a),
        "forgot": not any(tensor.any() for (key, _), tensor in after.items() if key != "master"),
        "balanced": max(float((B.T @ B - A @ A.T).abs().max()) for B, A in factors),
        "weights": flat(masters(before).items()).tolist(),
    }


def case(stage: int, precision: str) -> dict:
    """A refactoring behind the second step, a snapshot behind the third, and the fourth once more from it."""
    run = Run(stage, precision)
    for step in range(SAVED):
        run.step(step)
    with shared_directory() as parent:
        path = snapshot.save(parent, SAVED, run.engine, {}, {})
        run.step(SAVED)
        end = run.state()
        run.engine.close()
        again = Run(stage, precision)
        snapshot.restore(path, again.engine, {}, lambda steps, phases: steps - AGAIN.last(steps))
        again.step(SAVED)
        same = again.state()
        again.engine.close()
        world.barrier()
    (found,) = run.kept
    return {**found, "resumes": all(torch.equal(end[key], same[key]) for key in end)}


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({f"{stage} {precision}": case(stage, precision) for stage, precision in CELLS[world.size()]}))


if __name__ == "__main__":
    main()
