"""How much of a teacher is loaded: its layers up to the deepest that an objective reads. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distill.objectives.protocol import Needs, Objective
from growth.anatomy import Anatomy
from growth.errors import UserError
from growth.families import FAMILIES
from growth.maps import Layers
from growth.reindex import config_after


def loaded(config: dict[str, Any], target: str, objectives: Iterable[Objective]) -> dict[str, Any]:
    """config.json of as much of the teacher behind a target as these objectives read."""
    return shortened(config, [one.needs() for one in objectives if one.target == target]) or config


def shortened(config: dict[str, Any], needs: Iterable[Needs]) -> dict[str, Any] | None:
    """config.json of the first layers of a teacher, where they are enough for these needs.

    None, all of it: for its logits, for what it hands on behind its layers; and where no table says how its family is
    cut.
    """
    needs, family = list(needs), FAMILIES.get(config.get("model_type"))
    taps = [tap for need in needs for tap in need.target]
    behind = any(need.target_head for need in needs) or any(tap.role == "output" for tap in taps)
    if behind or not taps or family is None:
        return None
    try:
        layers = family.sizes_of(config)["layers"]
        first = max(tap.layer % layers for tap in taps) + 1
        whole = Anatomy(family, config, "", {}, frozenset())
        return None if first == layers else config_after(whole, {"layers": Layers.of(range(first))})
    except UserError:  # a value per layer that the table does not know
        return None
