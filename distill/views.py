"""Views of a batch: with tokens hidden, as masked language models are taught, or plain. Each model runs once on each.

Self-distillation for further pre-training learns from both in one step. Where no objective hides tokens the two are
the same, and there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from distill.objectives.protocol import Needs, Objective, View

Wanted = dict[View, dict[str, Needs]]  # view -> name of an objective -> what it reads there


def wanted(objectives: Mapping[str, Objective], names: Iterable[str]) -> Wanted:
    """What these objectives of a stage read, by view."""
    hides = any(objective.needs().head == "mlm" for objective in objectives.values())
    found: Wanted = {}
    for name in names:
        needs = objectives[name].needs()
        found.setdefault(needs.view if hides else "masked", {})[name] = needs
    return found


def passes(objectives: Mapping[str, Objective]) -> Counter:
    """How many times each target, and the student (None), runs in a step."""
    views = wanted(objectives, objectives).values()
    return Counter(target for view in views for target in {None, *(objectives[name].target for name in view)})


def of(batch: dict, view: View) -> dict:
    """The batch as this view has it: what was hidden is put back from the labels."""
    from distill.corpus.masking import NONE

    if view == "masked":
        return batch
    return {**batch, "input_ids": batch["input_ids"].where(batch["labels"] == NONE, batch["labels"])}
