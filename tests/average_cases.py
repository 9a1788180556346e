"""A moving average of the student, and a step of two views, on one ZeRO stage: `average_cases.py STAGE`, as JSON."""

from __future__ import annotations

import json
import sys
from functools import partial
from types import SimpleNamespace

import tiny
import torch
from engine_cases import BATCH, LR, OPTIM, Rows, shared_directory

from distill import snapshot, world
from distill.engine import KEYS, Engine
from distill.lesson import Data, Lesson, freeze_unreachable
from distill.models import freeze
from distill.objectives import OBJECTIVES
from distill.schedules import Progress, Schedule
from distill.teachers.targets import Average, Online, Targets

STAGE = int(sys.argv[1]) if __name__ == "__main__" else 0
DECAY = Schedule(points=[[0, 0.5], [4, 0.9]])


def parts(precision: str = "fp32", decay: Schedule | None = None):
    """Masked tokens of one view, hidden states of the other; the teacher is the student's average, or another model."""
    objectives = {
        "ce": OBJECTIVES["ce"](objective="mlm"),
        "hidden": OBJECTIVES["hidden"](target="t", position="first", view="plain"),
        "divergence": OBJECTIVES["divergence"](target="t", objective="mlm"),
    }
    student = tiny.model("bert", head="mlm", seed=1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    other = freeze(tiny.model("bert", head="mlm", seed=2)).to(dtype)
    source = Average(student, decay, dtype) if decay else Online(other)
    return Lesson(student, objectives), Targets({"t": source}, objectives)


class Run:
    """The loop of train.py without the recipe around it."""

    def __init__(self, precision: str = "fp32", micro_batch: int = 2, decay: Schedule | None = None, clip: float = 1.0):
        self.lesson, self.targets = parts(precision, decay)
        self.objectives = self.lesson.objectives
        self.data = Data(Rows(), BATCH, micro_batch, True, torch.device("cpu"))
        freeze_unreachable(self.lesson, self.targets, self.data)
        spec = SimpleNamespace(zero=STAGE, precision=precision, deepspeed={})
        self.engine = Engine(self.lesson, spec, SimpleNamespace(**OPTIM | {"clip": clip}), micro_batch)

    def step(self, step: int) -> dict[str, float]:
        """One update; returns the means of its terms."""
        batches, counts, means = self.data(step), {}, {}
        for batch in batches:
            for name, objective in self.objectives.items():
                for term, n in objective.count(batch).items():
                    counts[f"{name}.{term}"] = counts.get(f"{name}.{term}", 0.0) + float(n)
        counts = dict(zip(counts, world.agree(*counts.values()), strict=True))
        for batch in batches:
            terms = self.engine(batch, self.targets(batch, self.objectives), self.objectives)
            self.engine.backward(sum(value / counts[key] for key, value in terms.items()))
            for key, value in terms.items():
                means[key] = means.get(key, 0.0) + float(value.detach()) / counts[key]
        self.engine.step(LR)
        self.targets.moved(self.engine, Progress(step))
        return dict(zip(means, world.agree(*means.values()), strict=True))

    def masters(self) -> dict:
        return {name.removeprefix("student."): x.double().clone() for name, x in self.engine.state("master")}

    def state(self) -> dict:
        ours = {(key, name): tensor.clone() for key in KEYS for name, tensor in self.engine.state(key)}
        return ours | {("average", name): x.clone() for name, x in self.targets.sources["t"].state().items()}

    def gradient(self) -> torch.Tensor:
        """Of one step: Adam's first moment after an unclipped one is a tenth of it."""
        self.step(0)
        flat = torch.cat([10 * tensor.flatten() for _, tensor in self.engine.state("exp_avg")])
        self.engine.close()
        return flat


def closed(precision: str) -> float:
    """How far the average is from d1 d2 .. x0 + (1 - d1) d2 .. x1 + .., written out from the weights of every step."""
    run, passed = Run(precision, decay=DECAY), []
    passed.append(run.masters())
    for step in range(4):
        run.step(step)
        passed.append(run.masters())
    found = run.targets.sources["t"].state()
    run.engine.close()
    decays = torch.tensor([0.0] + [DECAY.at(Progress(step)) for step in range(4)], dtype=torch.float64)
    shares = [(1 - decays[k]) * decays[k + 1 :].prod() for k in range(5)]
    wanted = {name: sum(s * x[name] for s, x in zip(shares, passed, strict=True)) for name in passed[0]}
    assert found.keys() == wanted.keys()
    return max(float((found[name].double() - wanted[name]).abs().max()) for name in wanted)


def resumes(precision: str) -> bool:
    """Two steps, a snapshot, two more: against two steps of a new run that has read the snapshot."""
    run = Run(precision, decay=DECAY)
    for step in range(2):
        run.step(step)
    with shared_directory() as parent:
        path = snapshot.save(parent, 2, run.engine, {}, {}, beside=run.targets.state())
        ends = [run.step(step) for step in range(2, 4)]
        end = run.state()
        run.engine.close()
        again = Run(precision, decay=DECAY)
        snapshot.restore(path, again.engine, {})
        again.targets.load(partial(snapshot.beside, path))
        same = [again.step(step) for step in range(2, 4)] == ends
        found = again.state()
        again.engine.close()
        snapshot.verify(path)
        world.barrier()
    return same and end.keys() == found.keys() and all(torch.equal(end[key], found[key]) for key in end)


def itself(precision: str) -> list[float]:
    """The terms of a student that learns from an average without memory, which is itself."""
    run = Run(precision, decay=Schedule.constant(0.0))
    found = [run.step(step) for step in range(3)]
    run.engine.close()
    return [means[key] for means in found for key in ("divergence.forward_kl", "hidden.last")]


def main() -> None:
    torch.set_num_threads(1)
    found = {"gradients": [Run(micro_batch=m, clip=0.0).gradient().tolist() for m in (1, 4)]}
    for precision in ("fp32", "bf16") if STAGE < 3 else ():
        cases = {"closed": closed(precision), "resumes": resumes(precision), "itself": itself(precision)}
        found[precision] = cases
    print(json.dumps(found))


if __name__ == "__main__":
    main()
