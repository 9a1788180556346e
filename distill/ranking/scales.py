"""Whether the margins of a student can be those of its teachers, and the factor that makes them; settled once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill import world
from distill.engine import placed
from distill.objectives import margin_scale, scale_mismatch
from distill.objectives.protocol import Objective
from distill.teachers.targets import Read, Reading, Targets
from growth.console import say
from growth.files import read_json, write_json

if TYPE_CHECKING:
    from distill.lesson import Data

FILE, BATCHES = "scales.json", 8


def settle(
    stage: Path, objectives: dict[str, Objective], student: nn.Module, targets: Targets, data: Data, zero: int = 0
) -> None:
    """`scale: auto` as a number, in place; of the first batches before the first step, read back ever after.

    What cannot fit is said. All ranks measure the same whole batches, so that it does not matter how many there are.
    """
    if not any(_has_margins(objective) for objective in objectives.values()):
        return
    if not world.told((stage / FILE).exists()):
        learning = student.training
        with placed(Reading(student.eval()), zero) as read:
            apart = margins(objectives, read, targets, data)
        student.train(learning)
        world.first(lambda: write_json(stage / FILE, _judged(stage.name, objectives, student.margin_bound, apart)))
    found = read_json(stage / FILE)
    for name, objective in objectives.items():
        if _has_scale(objective) and objective.scale == "auto":
            objectives[name] = objective.model_copy(update={"scale": found[name]["scale"]})


def settled(stage: Path) -> dict[str, float]:
    """{objective: its scale}, for the metrics of a stage."""
    found = read_json(stage / FILE) if (stage / FILE).exists() else {}
    return {name: measured["scale"] for name, measured in found.items() if measured["auto"]}


def _has_margins(objective: Objective) -> bool:
    return hasattr(objective, "margins")


def _has_scale(objective: Objective) -> bool:
    return "scale" in type(objective).model_fields


def _judged(stage: str, objectives: dict, bound: float | None, apart: Mapping[str, tuple[Tensor, Tensor]]) -> dict:
    found = {}
    for name, (own, taught) in apart.items():
        objective = objectives[name]
        auto = _has_scale(objective) and objective.scale == "auto"
        scale = margin_scale(own, taught) if auto else getattr(objective, "scale", 1.0)
        if not auto and (wrong := scale_mismatch(scale * own, taught, bound and scale * bound)):
            say(f"{stage}: {name}: {wrong}")
        spreads = {side: float(x.double().std()) for side, x in (("student", own), ("teacher", taught))}
        found[name] = {"scale": scale, "auto": auto, "margins": len(own), "deviations": spreads}
    return found


@torch.no_grad()
def margins(objectives: dict, read: Read, targets: Targets, data: Data) -> dict[str, tuple[Tensor, Tensor]]:
    """{objective: the margins of student and teacher on the first batches}; `read` is what runs the student."""
    asked = {name: objective for name, objective in objectives.items() if _has_margins(objective)}
    needs = [objective.needs() for objective in asked.values()]
    found: dict[str, list] = {name: [] for name in asked}
    for batch in (batch for step in range(BATCHES) for batch in data.whole(step)):
        own, taught = read(batch, needs), targets(batch, asked)
        for name, objective in asked.items():
            sides = own.scores, taught[objective.target, "masked"].scores
            found[name].append([objective.margins(side, batch).float() for side in sides])
    return {name: tuple(map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()}
