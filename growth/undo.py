"""The way back: what a checkpoint was grown from, by the maps that its lineage holds.

Copies of a unit are averaged, with their factors taken off; noise between them sums to zero. So what was just grown
gives its source back, and what was trained since gives a smaller model that stands for all copies.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.errors import UserError
from growth.files import read_json
from growth.maps import Layers
from growth.masks import masks_of
from growth.operate import PLAIN, Output, Result, delivered, opened
from growth.pieces import Computed
from growth.reindex import Stream, followed, reindex, widely
from growth.sizes import Sizes
from growth.take import Widening
from growth.width import planned
from growth.writer import LINEAGE


def undo(src: Any, dst: str | Path | None = None, *, output: Output = PLAIN) -> Any:
    """The checkpoint without its last growth, a `stack`, `insert` or `widen` (AKI mixes layers for good)."""
    checkpoint = opened(src, dst, output)
    story = lineage_of(checkpoint)
    anatomy, masks = dissect(checkpoint), None
    if story.get("operator") in ("stack", "insert"):
        maps = _first(story, anatomy)
        config, stream = reindex(checkpoint, anatomy, maps)
        masks = followed(anatomy, config, maps, masks_of(checkpoint, anatomy))
    elif story.get("operator") == "widen" and story["arguments"]["how"] != "aki":
        before = anatomy_before(anatomy, story)
        config, stream = before.config, _folded(checkpoint, anatomy, before, widening_of(before, story))
    elif story.get("operator") in ("widen", "learn"):
        source = story["sources"][0]["path"]
        raise UserError(
            f"AKI and learned maps mix layers for good, so there is nothing to undo; the source was {source}"
        )
    else:
        raise UserError(f"{checkpoint.path} was not made by stack, insert or widen, so there is nothing to undo")
    facts = {"maps": {}, "new": {}, "preserves": "exact" if story["preserves"] == "exact" else "no"}
    result = Result("undo", {"of": story["operator"]}, config, stream, facts, masks=masks)
    return delivered(result, dst, output, checkpoint)


def lineage_of(checkpoint: Any) -> dict[str, Any]:
    """How a checkpoint was made; empty if nothing says so."""
    from growth.memory import Memory

    if isinstance(checkpoint, Memory):
        return vars(checkpoint.model).get("growth", {})
    path = Path(checkpoint.path) / LINEAGE
    return read_json(path) if path.is_file() else {}


def _first(story: dict[str, Any], anatomy: Anatomy) -> dict[str, Layers]:
    """Where each old layer stands that is not new."""
    kept = {}
    for axis in anatomy.family.depth:
        new, order = set(story["new"][axis]), story["maps"][axis]
        where = {old: i for i, old in enumerate(order) if i not in new}
        if sorted(where) != list(range(max(order) + 1)):
            raise UserError("the order left out some layers of its source, so they cannot be given back")
        kept[axis] = Layers.of([where[old] for old in sorted(where)])
    return kept


def anatomy_before(anatomy: Anatomy, story: dict[str, Any]) -> Anatomy:
    """The source's sizes in the grown one's config; its places are still the grown ones."""
    sizes = {axis: change["from"] for axis, change in story["new"].items()}
    if queries := sizes.pop("kv group", None):
        sizes["group"] = queries // sizes["kv"]
    return replace(anatomy, config=anatomy.family.resized(anatomy.config, sizes))


def widening_of(before: Anatomy, story: dict[str, Any], noise: float = 0.0) -> Widening:
    """The maps of a widening, made again from what was asked for."""
    arguments = story["arguments"]
    asked = Sizes(**{one.name: arguments.get(one.name) for one in fields(Sizes)})
    return planned(before, asked, arguments["how"], noise, arguments["seed"])[0]


def _folded(checkpoint: Any, anatomy: Anatomy, before: Anatomy, widening: Widening) -> Stream:
    shapes = {slot.key: slot.shape for slot in before.family.slots(before.config, before.prefix).values()}
    for slot, name in anatomy.places.items():
        entry = checkpoint[name]
        if not widening.touches(slot):
            yield slot.name, entry
            continue
        shape = tuple(n if n is not None else have for n, have in zip(shapes[slot.key], entry.shape, strict=True))
        yield slot.name, Computed(entry.dtype, shape, partial(_one, checkpoint, widening, slot, name))


def _one(checkpoint: Any, widening: Widening, slot: Any, name: str):
    return widely(lambda wide: widening.back(wide, slot), checkpoint.tensor(name))
