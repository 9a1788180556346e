"""Optimizer state through the maps of a growth, so that training goes on instead of warming up again.

The grown model is the same function of copies, so a unit of factor f that stands c times gets 1 / (c f) of the
gradient. The first moment follows it, the second its square: for even and for weighted copies these are the moments of
the grown model's own gradients; extra channels start without. StackBERT copies the moments of copied layers (Gong et
al. 2019); blocks that start as the identity start without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect, once
from growth.behind import told
from growth.checkpoint import Checkpoint, open
from growth.errors import UserError
from growth.families.table import Slot
from growth.files import committed, ensure_space, read_json, sha256, write_json
from growth.maps import Layers
from growth.operate import Staged
from growth.parameters import in_memory, name_in_memory, on_disk
from growth.pieces import Computed, Fill
from growth.ranges import Entry, header, inside
from growth.reindex import Stream, reindex, widely
from growth.shards import write_file
from growth.undo import lineage_of, widening_of
from growth.upcycle import origins, sparse, sparse_config
from growth.writer import guard

POWERS = {"master": 0, "exp_avg": 1, "exp_avg_sq": 2}  # of the gradient that a file holds
STUDENT, MANIFEST, FACTORS = "student.", "manifest.json", "learning_rates.json"
Way = Callable[[Staged, Anatomy, int], Stream]  # (the state, where its tensors belong, power of the gradient)


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
    before, after = once(source, dissect(source)), dissect(new)
    way = WAYS[story["operator"]](before, story)
    with committed(dst) as directory:
        for key, power in POWERS.items():
            pieces = list(_state(header(inside(snapshot, f"{key}.safetensors")), before, after, way, power))
            ensure_space(directory, sum(piece.nbytes for _, piece in pieces), f"{key} of the grown model")
            write_file(directory / f"{key}.safetensors", pieces)
        write_json(directory / FACTORS, learning_rates(before, after, story))
        _manifest(snapshot, directory, new)
    return dst


def _source(grown: Checkpoint, story: Mapping[str, Any]) -> Checkpoint:
    if story.get("operator") not in WAYS:
        *some, last = WAYS
        raise UserError(f"{grown.path} was not made by {', '.join(some)} or {last}, so no state can follow")
    source = open(story["sources"][0]["path"])
    if source.header_digest() != story["sources"][0]["header_digest"]:
        raise UserError(f"{source.path} is no longer what {grown.path} was grown from")
    return source


def _state(entries: Mapping[str, Entry], before: Anatomy, after: Anatomy, way: Way, power: int) -> Stream:
    """The tensors of one file; what is not the student's (projections) passes as it is."""
    mine = {name.removeprefix(STUDENT): entry for name, entry in entries.items() if name.startswith(STUDENT)}
    held = on_disk(mine, before)
    known = {slot: slot.name for slot in before.places if slot.name in held}
    if lost := held.keys() - set(known.values()):
        raise UserError(f"the snapshot holds {min(lost)}, which the source of the growth does not have")
    state = Staged(before.config, held, "the snapshot")
    stream = way(state, replace(before, places=known), power)
    yield from ((STUDENT + name, piece) for name, piece in in_memory(stream, after))
    yield from ((name, entry) for name, entry in entries.items() if not name.startswith(STUDENT))


def _deeper(anatomy: Anatomy, story: Mapping[str, Any]) -> Way:
    """Copies keep their history; what starts as the identity, or afresh, has none."""
    made = {axis: frozenset(new) for axis, new in story["new"].items()}
    how = story["arguments"].get("how", "zero")
    silent, random = (made if how == one else dict.fromkeys(made, frozenset()) for one in ("zero", "random"))
    maps = {axis: Layers.of(order, silent[axis], random[axis]) for axis, order in story["maps"].items()}

    def stream(state: Staged, places: Anatomy, power: int) -> Stream:
        for name, piece in reindex(state, places, maps)[1]:
            copied = power == 0 or isinstance(piece, Entry)
            yield name, piece if copied else Fill(piece.dtype, piece.shape, 0.0)

    return stream


def _wider(anatomy: Anatomy, story: Mapping[str, Any]) -> Way:
    if story["arguments"]["how"] == "aki":
        raise UserError("units from the layer above have a gradient of their own: after AKI, start the optimizer anew")
    widening = widening_of(anatomy, dict(story), story["arguments"]["noise"])

    def stream(state: Staged, places: Anatomy, power: int) -> Stream:
        told_so = replace(widening, told=told(state, places))
        change = told_so.take if power == 0 else partial(widening.moment, power=power)
        for slot, name in places.places.items():
            piece = state[name]
            if widening.touches(slot):
                make = partial(_changed, state, name, slot, change)
                piece = Computed(piece.dtype, widening.shape(slot, piece.shape), make)
            yield slot.name, piece

    return stream


def _changed(state: Staged, name: str, slot: Slot, change: Callable[[Any, Slot], Any]):
    return widely(lambda wide: change(wide, slot), state.tensor(name))


def _sparser(anatomy: Anatomy, story: Mapping[str, Any]) -> Way:
    """Experts share the gradient of the part they copy, on average equally; the rest has it whole.

    The router sees no difference between equal experts, so it starts without history, and so does the expert that
    says nothing yet.
    """
    asked = story["arguments"]
    experts = asked["experts"]
    config = sparse_config(anatomy, experts, asked["top"])

    def stream(state: Staged, places: Anatomy, power: int) -> Stream:
        if power == 0:
            yield from sparse(state, places, config, asked["noise"], asked["seed"])
            return
        for slot, origin in origins(places, config):
            if origin in state and "shared_expert" not in slot.row.name:
                piece = state[origin]
                share = partial(_shared, state, origin, 1.0 / experts**power)
                yield slot.name, Computed(piece.dtype, piece.shape, share) if "experts" in dict(slot.at) else piece
            else:
                yield slot.name, Fill("F32", slot.shape, 0.0)

    return stream


def _shared(state: Staged, name: str, share: float):
    return widely(lambda wide: wide * share, state.tensor(name))


WAYS: dict[str, Callable[[Anatomy, Mapping[str, Any]], Way]] = {
    "stack": _deeper,
    "insert": _deeper,
    "widen": _wider,
    "upcycle": _sparser,
}


def learning_rates(before: Anatomy, after: Anatomy, story: Mapping[str, Any]) -> dict[str, float]:
    """By how much the values of each tensor were scaled (on average, where copies are uneven), where they were."""
    if story["operator"] != "widen":
        return {}
    change = widening_of(before, dict(story))
    factors = {name_in_memory(slot, after): change.factor(slot) for slot in before.places if change.touches(slot)}
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def _manifest(snapshot: Path, directory: Path, grown: Checkpoint) -> None:
    names = [f"{key}.safetensors" for key in POWERS]
    files = {name: {"size": (directory / name).stat().st_size, "sha256": sha256(directory / name)} for name in names}
    old = read_json(snapshot / MANIFEST)
    write_json(directory / MANIFEST, {**old, "files": files, "grown": grown.origin})
