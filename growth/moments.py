"""Optimizer state through the maps of a growth, so that training goes on instead of warming up again.

The grown model is the same function of copies, so a unit of factor f that stands c times gets 1 / (c f) of the
gradient. The first moment follows it, the second its square (the rule is derived and measured for even copies, where
the trajectory of the source is followed to rounding; extra channels start without moments). StackBERT copies the
moments of copied layers (Gong et al. 2019); blocks that start as the identity start without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.checkpoint import Checkpoint, open
from growth.errors import UserError
from growth.files import committed, ensure_space, read_json, sha256, write_json
from growth.maps import Layers
from growth.operate import Staged
from growth.pieces import Computed, Fill, Piece
from growth.ranges import Entry, header, inside
from growth.reindex import Stream, reindex, widely
from growth.shards import write_file
from growth.take import Widening
from growth.undo import lineage_of, widening_of
from growth.writer import guard

POWERS = {"master": 0, "exp_avg": 1, "exp_avg_sq": 2}  # of the gradient that a file holds
STUDENT, MANIFEST, FACTORS = "student.", "manifest.json", "learning_rates.json"


def moments(snapshot: str | Path, grown: str | Path, dst: str | Path) -> Path:
    """The training state `snapshot` of the source, as one of the checkpoint `grown` from it.

    A directory with float32 masters and both moments. `learning_rates.json` says by how much the learning rate of each
    tensor is to be scaled (and its weight decay divided) for the grown model to follow the source.
    """
    snapshot, dst = Path(snapshot), Path(dst)
    if not (snapshot / MANIFEST).is_file():
        raise UserError(f"{snapshot} is not a snapshot of training: it has no {MANIFEST}")
    guard(dst, [snapshot], overwrite=False)
    new = open(grown)
    story = lineage_of(new)
    source = _source(new, story)
    anatomy = dissect(source)
    change = _change(anatomy, story)
    with committed(dst) as directory:
        for key, power in POWERS.items():
            pieces = list(_state(header(inside(snapshot, f"{key}.safetensors")), anatomy, change, power))
            ensure_space(directory, sum(piece.nbytes for _, piece in pieces), f"{key} of the grown model")
            write_file(directory / f"{key}.safetensors", pieces)
        write_json(directory / FACTORS, learning_rates(anatomy, change))
        _manifest(snapshot, directory, new)
    return dst


def _source(grown: Checkpoint, story: Mapping[str, Any]) -> Checkpoint:
    if story.get("operator") not in ("stack", "insert", "widen"):
        raise UserError(f"{grown.path} was not made by stack, insert or widen, so no state can follow")
    source = open(story["sources"][0]["path"])
    if source.header_digest() != story["sources"][0]["header_digest"]:
        raise UserError(f"{source.path} is no longer what {grown.path} was grown from")
    return source


def _change(anatomy: Anatomy, story: Mapping[str, Any]) -> Widening | dict[str, Layers]:
    if story["operator"] == "widen":
        if story["arguments"]["how"] == "aki":
            raise UserError(
                "units from the layer above have a gradient of their own: after AKI, start the optimizer anew"
            )
        return widening_of(anatomy, dict(story), story["arguments"]["noise"])
    made = {axis: frozenset(new) for axis, new in story["new"].items()}
    how = story["arguments"].get("how", "zero")
    silent, random = (made if how == one else dict.fromkeys(made, frozenset()) for one in ("zero", "random"))
    return {axis: Layers.of(order, silent[axis], random[axis]) for axis, order in story["maps"].items()}


def _state(entries: Mapping[str, Entry], anatomy: Anatomy, change: Any, power: int) -> Iterator[tuple[str, Piece]]:
    """The tensors of one file; what is not the student's (projections) passes as it is."""
    held = {name.removeprefix(STUDENT): entry for name, entry in entries.items() if name.startswith(STUDENT)}
    known = {slot: name for slot, name in anatomy.places.items() if name in held}
    if lost := held.keys() - set(known.values()):
        raise UserError(f"the snapshot holds {min(lost)}, which the source of the growth does not have")
    state = Staged(anatomy.config, held, "the snapshot")
    some = replace(anatomy, places=known)
    stream = _wider(state, some, change, power) if isinstance(change, Widening) else _deeper(state, some, change, power)
    yield from ((STUDENT + name, piece) for name, piece in stream)
    yield from ((name, entry) for name, entry in entries.items() if not name.startswith(STUDENT))


def _deeper(state: Staged, anatomy: Anatomy, maps: dict[str, Layers], power: int) -> Stream:
    for name, piece in reindex(state, anatomy, maps)[1]:
        copied = power == 0 or isinstance(piece, Entry)
        yield name, piece if copied else Fill(piece.dtype, piece.shape, 0.0)  # what is new has no history


def _wider(state: Staged, anatomy: Anatomy, widening: Widening, power: int) -> Stream:
    change = widening.take if power == 0 else partial(widening.moment, power=power)
    for slot, name in anatomy.places.items():
        entry = state[name]
        if not widening.touches(slot):
            yield slot.name, entry
            continue

        def make(slot=slot, name=name):
            return widely(lambda wide: change(wide, slot), state.tensor(name))

        yield slot.name, Computed(entry.dtype, widening.shape(slot, entry.shape), make)


def learning_rates(anatomy: Anatomy, change: Any) -> dict[str, float]:
    """By how much the values of each tensor were scaled (on average, where copies are uneven), where they were."""
    if not isinstance(change, Widening):
        return {}
    factors = {slot.name: change.factor(slot) for slot in anatomy.places if change.touches(slot)}
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def _manifest(snapshot: Path, directory: Path, grown: Checkpoint) -> None:
    names = [f"{key}.safetensors" for key in POWERS]
    files = {name: {"size": (directory / name).stat().st_size, "sha256": sha256(directory / name)} for name in names}
    old = read_json(snapshot / MANIFEST)
    write_json(directory / MANIFEST, {**old, "files": files, "grown": grown.origin})
