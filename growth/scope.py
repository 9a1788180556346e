"""Which matrices of an architecture a method works on, by what they are for. No torch.

Attention and feed-forward matrices of blocks, told by their axes; embeddings, norms, biases, heads, poolers, the
routers of experts and tables of relative positions are in neither, and stay dense.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from growth.families.table import Family, Row, Slot

AXES = {"attention": {"heads", "head"}, "ffn": {"ffn", "shared"}}  # shared: the expert that every token passes


def part_of(row: Row) -> str | None:
    """attention, ffn, or neither."""
    inside = row.body and row.in_place and row.spec.consumed is not None
    return next((part for part, axes in AXES.items() if inside and row.spec.axes() & axes), None)


def matrices(family: Family, config: Mapping[str, Any], scope: Collection[str], prefix: str = "") -> dict[str, Slot]:
    """{name of a weight on disk: its place} of all that is in scope."""
    slots = family.slots(config, prefix)
    return {name: slot for name, slot in slots.items() if slot.part != ".bias" and part_of(slot.row) in scope}
