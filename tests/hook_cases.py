"""What hooks and held-out curves must keep on every ZeRO stage; run by engine_cases.py, in its processes."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import tiny
import torch
from engine_cases import BATCH, LR, OPTIM, Rows, shared_directory

from distill import hooks, snapshot, world
from distill.engine import KEYS, Engine, placed
from distill.hooks import Submodel
from distill.lesson import Data, Heldout, Lesson, freeze_unreachable
from distill.objectives import OBJECTIVES
from distill.teachers.targets import Targets

SEED, STEPS, HELD = 5, 6, 11  # this seed draws every depth
PARTS = Submodel(depths=[2, 3, 4], train_top=2).parts()


class Short(Rows):
    """A corpus of a few rows."""

    corpus = range(HELD)


def lesson() -> Lesson:
    student = tiny.model("bert", head="mlm", seed=1, hidden_dropout_prob=0.1)
    return Lesson(student.train(), {"ce": OBJECTIVES["ce"](objective="mlm")})


class Run:
    """The loop of train.py without the recipe around it; with `parts`, of sub-models."""

    def __init__(self, stage: int, precision: str = "fp32", parts=(), dropout: bool = False):
        self.lesson, self.parts = lesson(), parts
        self.lesson.student.train(dropout)
        data = Data(Rows(), BATCH, 2, True, torch.device("cpu"), offset=3)
        self.data, targets = data, Targets({}, self.lesson.objectives)
        with placed(self.lesson, stage) as run:
            self.frozen = freeze_unreachable(self.lesson, targets, data, parts, run)
        updated = {f"student.{name}": when for name, when in hooks.updated_in(self.lesson.student, parts).items()}
        spec = SimpleNamespace(zero=stage, precision=precision, deepspeed={})
        self.engine = Engine(self.lesson, spec, SimpleNamespace(**OPTIM), 2, updated)
        self.updated, self.norms = updated, []
        self.heldout = Heldout(self.lesson, "ce", Short(), 2, True)

    def step(self, step: int) -> None:
        torch.manual_seed(step * 2 + world.rank())
        part = hooks.drawn(self.parts, SEED, step)
        batches = self.data(step)
        (count,) = world.agree(sum(float(self.lesson.objectives["ce"].count(batch)["mlm"]) for batch in batches))
        for batch in batches:
            self.engine.backward(self.engine(batch, {}, self.lesson.objectives, part)["ce.mlm"] / count)
        self.norms.append(self.engine.step(LR, part))

    def state(self) -> dict:
        return {(key, name): tensor.clone() for key in KEYS for name, tensor in self.engine.state(key)}

    def sits_out(self, step: int) -> set[str]:
        part = hooks.drawn(self.parts, SEED, step)
        return {name for name, when in self.updated.items() if part not in when}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def submodels(stage: int) -> dict:
    """Six steps; what sat out a step is compared to the bit, moments too."""
    run, kept, moved = Run(stage, parts=PARTS), True, True
    for step in range(STEPS):
        before, out = run.state(), run.sits_out(step)
        run.step(step)
        after = run.state()
        kept &= all(torch.equal(before[key], after[key]) for key in before if key[1] in out)
        moved &= not any(torch.equal(before[key], after[key]) for key in before if key[1] not in out)
    weights = {name.removeprefix("student."): tensor.tolist() for name, tensor in run.engine.state("master")}
    run.engine.close()
    return {"kept": kept, "moved": moved, "norms": run.norms, "weights": weights, "frozen": run.frozen}


def resumes(stage: int, precision: str) -> bool:
    """Snapshots know how often each part was updated: three steps, a snapshot, and two more, twice."""
    run = Run(stage, precision, PARTS)
    for step in range(3):
        run.step(step)
    with shared_directory() as parent:
        path = snapshot.save(parent, 3, run.engine, {}, {})
        for step in range(3, 5):
            run.step(step)
        end = run.state()
        run.engine.close()
        again = Run(stage, precision, PARTS)
        snapshot.restore(path, again.engine, {}, partial(hooks.updates, PARTS, SEED))
        for step in range(3, 5):
            again.step(step)
        found = again.state()
        again.engine.close()
        world.barrier()
    return same(end, found)


def curve(stage: int) -> dict:
    """With dropout on: the same weights whether the held-out loss is taken or not, and which losses those were."""
    ends, losses = [], []
    for asked in (False, True):
        run = Run(stage, dropout=True)
        for step in range(2):
            losses += [run.heldout(run.engine)] if asked else []
            run.step(step)
        ends.append(run.state())
        run.engine.close()
    return {"same": same(*ends), "losses": losses}


def cases(stage: int) -> dict:
    return {
        "submodels": submodels(stage),
        "resumes": resumes(stage, "fp32") and (stage > 0 or resumes(stage, "bf16")),  # plain torch, and DeepSpeed's
        "curve": curve(stage),
    }
