"""Training FLOPs saved to the loss that the scratch row ended with, from the held-out curves of the logs. No torch.

"Speed-up" and "saving" are two words for one ratio (`growth plan`): 54.6 % more FLOPs from scratch are 35 % saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from distill.evaluate.score import Score
from growth.errors import UserError
from growth.files import read_json

CONFIDENCE = 0.95


class Outcome(NamedTuple):
    """One seed against the scratch of the same seed."""

    share: float | None  # of scratch's FLOPs that were saved; None where its loss was not reached
    gap: float  # nats a token that remained at the lowest point; 0 where it was reached


@dataclass(frozen=True)
class Curve:
    """Held-out loss over all FLOPs spent so far, those of the stages before included; in the order of training."""

    flops: tuple[float, ...]
    loss: tuple[float, ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Curve:
        return cls(*zip(*points, strict=True))

    @property
    def points(self) -> list[tuple[float, float]]:
        return list(zip(self.flops, self.loss, strict=True))

    def reach(self, target: float) -> float | None:
        """The FLOPs at which the loss is down at `target` for the first time.

        Between two evaluations the loss is taken as linear in log FLOPs: losses are near straight lines there, while
        a chord over plain FLOPs lies above a curve that flattens and finds every crossing too late.
        """
        if self.loss[0] <= target:
            return self.flops[0]
        for (x0, y0), (x1, y1) in pairwise(self.points):
            if y1 <= target:
                return _between(x0, x1, (y0 - target) / (y0 - y1))
        return None

    def outcome(self, scratch: Curve) -> Outcome | None:
        """None where scratch ended no lower than it began: there is nothing to reach.

        Both are taken where they first reach the loss: if scratch got worse again after it, that counts for nobody.
        """
        target = scratch.loss[-1]
        cost, mine = scratch.reach(target), self.reach(target)
        if not cost:
            return None
        return Outcome(None, min(self.loss) - target) if mine is None else Outcome(1 - mine / cost, 0.0)


def _between(x0: float, x1: float, share: float) -> float:
    """The way from x0 to x1 in logarithms; nothing spent has none, so the way from there is a straight one."""
    return x0 ** (1 - share) * x1**share if x0 else x1 * share


def speed_up(share: float) -> float:
    """The other way round than `growth.plan.saved`."""
    return share / (1 - share)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean over seeds: Student's t, 95 %; None for a single one, which says nothing about others."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values) - reach, mean(values) + reach


# From what stages leave behind


def read_log(path: Path) -> list[dict]:
    """The entries of a log; a last line that a killed run left unfinished is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def curve(stage: Path) -> Curve | None:
    """Of the directory of a finished train stage; None for anything else, and where nothing was evaluated."""
    if not (stage / "log.jsonl").is_file() or not (stage / "stage.json").is_file():
        return None
    before = (read_json(stage / "stage.json").get("metrics") or {}).get("flops_before", 0)
    points = [(before + entry["flops"], entry["heldout"]) for entry in read_log(stage / "log.jsonl")
              if "heldout" in entry]  # fmt: skip
    return Curve.of(points) if points else None


def beside(stage: Path, other: str) -> Path:
    """The directory of another stage for the same seed: `grown@2` -> `scratch@2`."""
    _, at, seed = stage.name.partition("@")
    return stage.with_name(f"{other}{at}{seed}")


@dataclass(frozen=True)
class Saving:
    """Share of training FLOPs saved to the held-out loss that the row called scratch ended with."""

    title = "FLOPs saved"
    better = "high"
    digits = 3
    quality = False  # of the training, not of the model

    def note(self, bench) -> str:
        return (
            f"share of the training FLOPs of {bench.scratch} saved to the held-out loss that it ended with, seed by "
            "seed; the stages that a row was made from count, teachers and evaluation do not; between evaluations the "
            f"loss is linear in log FLOPs; in brackets the {CONFIDENCE:.0%} interval of the mean over seeds (t)"
        )

    def check(self, bench) -> None:
        if bench.scratch is None:
            raise UserError("saving is against training from scratch: call a row `scratch`")
        curved = [reference for reference, spec in bench.trained.items() if spec.evaluate_every]
        if bench.scratch not in curved:
            raise UserError(f"saving needs the held-out losses of {bench.scratch}: give that stage `evaluate_every`")
        if len(curved) < 2:
            raise UserError(f"saving needs a row to compare with {bench.scratch}: a train stage with `evaluate_every`")

    def measure(self, subjects: Sequence, bench) -> Iterator[Score | None]:
        for subject in subjects:
            yield self._score(subject.path, bench.scratch)

    def _score(self, model: Path, scratch: str) -> Score | None:
        mine, its = curve(model.parent), curve(beside(model.parent, scratch))
        found = mine.outcome(its) if mine and its and model.name == "model" else None
        return None if found is None or found.share is None else Score(found.share)
