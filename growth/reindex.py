"""The one engine of growth: a checkpoint and maps of its axes give a stream of tensors and a new config.

Nothing is computed where a map only copies: then a tensor is the byte range of its source.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from growth.anatomy import Anatomy
from growth.checkpoint import Checkpoint
from growth.errors import UserError
from growth.families.table import Slot
from growth.maps import Layers, Mix
from growth.noise import drawn
from growth.pieces import Computed, Fill, Piece
from growth.ranges import Entry, torch_dtype
from growth.shapes import Axes

Held = TypeVar("Held")
Stream = Iterator[tuple[str, Piece]]
NEVER_PER_LAYER = {"architectures", "eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens"}


def config_after(anatomy: Anatomy, maps: Mapping[str, Layers]) -> dict[str, Any]:
    """The config through the same maps: sizes, and the lists that hold one value per layer."""
    family, config = anatomy.family, anatomy.config
    _refuse_by_index(anatomy, maps)
    _refuse_unknown_lists(anatomy)
    new = family.resized(config, {axis: len(layers) for axis, layers in maps.items()})
    for key in family.per_layer if "layers" in maps else ():
        values = getattr(family.view(config), key)  # what an absent list means depends on the index: write it out
        new[key] = [values[old] for old in maps["layers"].main]
    return new


def _refuse_by_index(anatomy: Anatomy, maps: Mapping[str, Layers]) -> None:
    moved = any(layers.main[i] != i for axis, layers in maps.items() for i in range(len(layers)))
    key = next((key for key in anatomy.family.by_index if getattr(anatomy.family.view(anatomy.config), key)), None)
    if moved and key:
        raise UserError(f"config.json sets {key}: its layers depend on their number, so they cannot change places")


def _refuse_unknown_lists(anatomy: Anatomy) -> None:
    depths = {anatomy.sizes[axis] for axis in anatomy.family.depth}
    known = {*NEVER_PER_LAYER, *anatomy.family.per_layer}
    for key, value in anatomy.config.items():
        if isinstance(value, list) and len(value) in depths and key not in known:
            raise UserError(
                f"config.json: {key} holds one value per layer, as it seems; if so, add it to per_layer in"
                f" growth/families/{anatomy.family.model_type}.py"
            )


def reindex(checkpoint: Checkpoint, anatomy: Anatomy, maps: Mapping[str, Layers]) -> tuple[dict[str, Any], Stream]:
    """The new config, and the new tensors in the order of the table."""
    config = config_after(anatomy, maps)
    return config, _stream(checkpoint, anatomy, config, maps)


def _stream(checkpoint: Checkpoint, anatomy: Anatomy, config: Mapping[str, Any], maps: Mapping[str, Layers]):
    sources = {slot.key: name for slot, name in anatomy.places.items()}
    writers = {row.name for row in anatomy.family.writers()}
    for slot in anatomy.family.slots(config, anatomy.prefix).values():
        origins = [(sources.get((slot.row.name, slot.part, at)), weight) for at, weight in _origins(slot, maps)]
        terms = [(name, weight) for name, weight in origins if name]
        if not terms and slot.row.not_everywhere:
            yield slot.name, _neutral(next(iter(checkpoint.values())).dtype, anatomy, slot)
        elif terms and _among(slot, maps, "random"):
            yield slot.name, _fresh(checkpoint[terms[0][0]], anatomy, slot)
        elif terms and slot.row.name in writers and _among(slot, maps, "silent"):
            yield slot.name, _zero(checkpoint[terms[0][0]], anatomy)
        elif terms and slot.row.is_norm and anatomy.family.norms == "post" and _among(slot, maps, "silent"):
            yield slot.name, _level(checkpoint, anatomy, slot, checkpoint[terms[0][0]], maps)
        elif terms:
            yield slot.name, _piece(checkpoint, terms)


def followed(
    anatomy: Anatomy, config: Mapping[str, Any], maps: Mapping[str, Layers], held: Mapping[str, Held]
) -> dict[str, Held]:
    """What belongs to tensors, by the names of the tensors that copy them; those made anew or mixed have none."""
    sources = {slot.key: held[name] for slot, name in anatomy.places.items() if name in held}
    after = {}
    for slot in anatomy.family.slots(config, anatomy.prefix).values() if held else ():
        origins = [sources.get((slot.row.name, slot.part, at)) for at, _ in _origins(slot, maps)]
        if origins[0] is not None and (len(origins) > 1 or _among(slot, maps, "random")):
            raise UserError(f"{slot.name} would be {'mixed' if len(origins) > 1 else 'random'}, which no mask fits:"
                            " `growth densify` drops them")  # fmt: skip
        if origins[0] is not None:
            after[slot.name] = origins[0]
    return after


def _origins(slot: Slot, maps: Mapping[str, Layers]) -> list[tuple[tuple, float]]:
    """Where on the axes of its name a tensor comes from, with weights."""
    choices: list[Mix] = [maps[axis].sources[i] if axis in maps else ((i, 1.0),) for axis, i in slot.at]
    axes = [axis for axis, _ in slot.at]
    return [
        (tuple(zip(axes, (old for old, _ in mix), strict=True)), math.prod(weight for _, weight in mix))
        for mix in itertools.product(*choices)
    ]


def _among(slot: Slot, maps: Mapping[str, Layers], kind: str) -> bool:
    return any(axis in maps and i in getattr(maps[axis], kind) for axis, i in slot.at)


def _fresh(like: Entry, anatomy: Anatomy, slot: Slot) -> Piece:
    """As a new model starts: matrices normal, norms without effect, biases zero."""
    if slot.part == ".bias" or len(slot.dims) < 2:
        return _neutral(like.dtype, anatomy, slot)
    deviation = anatomy.config.get("initializer_range", 0.02)
    return Computed(like.dtype, like.shape, lambda: (drawn(like.shape, slot.name, 0, None) * deviation).to(
        torch_dtype(like.dtype)))  # fmt: skip


def _level(checkpoint: Checkpoint, anatomy: Anatomy, slot: Slot, like: Entry, maps: Mapping[str, Layers]) -> Piece:
    """A norm that changes what another norm wrote as little as it can: one gain and one bias for all channels.

    The norm below writes gain x n + bias with n of unit variance, so the mean over channels is about that of the
    biases, and the variance the mean square of the gains plus the variance of the biases. What is left is how much
    both differ between tokens.
    """
    import torch

    ((axis, i),) = slot.at
    below = next(maps[axis].main[j] for j in range(i, -1, -1) if j not in maps[axis].silent)
    closing = [row.name for row in anatomy.family.rows if row.is_norm and row.in_place][-1]
    names = {
        place.part: name for place, name in anatomy.places.items() if place.key[::2] == (closing, ((axis, below),))
    }

    def make():
        gain, bias = (checkpoint.tensor(names[part]).double() for part in (".weight", ".bias"))
        spread = (gain.square().mean() + bias.var(correction=0)).sqrt()
        value = spread if slot.part == ".weight" else bias.mean()
        return torch.full(like.shape, float(value), dtype=torch_dtype(like.dtype))

    return Computed(like.dtype, like.shape, make)


def _zero(like: Entry, anatomy: Anatomy) -> Fill:
    """What makes a branch add nothing: zero, which a gain of 1 + w holds as -1."""
    return Fill(like.dtype, like.shape, -1.0 if anatomy.family.gain == "1+w" else 0.0)


def _neutral(dtype: str, anatomy: Anatomy, slot: Slot) -> Fill:
    """ModernBERT's first block has no norm of its own; its copies elsewhere get one that changes no scale."""
    plain = slot.part == ".weight" and anatomy.family.gain == "w"
    return Fill(dtype, slot.shape, 1.0 if plain else 0.0)


def _piece(checkpoint: Checkpoint, terms: list[tuple[str, float]]) -> Piece:
    name, weight = terms[0]
    entry: Entry = checkpoint[name]
    if len(terms) == 1 and weight == 1.0:
        return entry
    return Computed(entry.dtype, entry.shape, lambda: _mixed(checkpoint, terms))


def _mixed(checkpoint: Checkpoint, terms: list[tuple[str, float]]):
    tensors = [checkpoint.tensor(name) for name, _ in terms]
    return widely(lambda first: sum(
        (tensor.to(first.dtype) * weight for tensor, (_, weight) in zip(tensors[1:], terms[1:], strict=True)),
        start=first * terms[0][1]), tensors[0])  # fmt: skip


def units_stream(checkpoint: Checkpoint, anatomy: Anatomy, axes: Axes, above: bool = False) -> Stream:
    """Every tensor through maps of its shape's axes; `above` takes new units from the next layer (AKI)."""
    names = {slot.key: name for slot, name in anatomy.places.items()}
    slots = {slot.key: slot for slot in anatomy.places}
    for key, slot in slots.items():
        entry = checkpoint[names[key]]
        upper = slots.get(_next(slot, anatomy.family.depth)) if above and slot.row.spec.read else None
        sources = [(part, names[part.key]) for part in (slot, upper) if part]
        if axes.touches(slot):
            make = partial(_taken, checkpoint, axes, sources)
            yield slot.name, Computed(entry.dtype, axes.shape(slot, entry.shape), make)
        else:
            yield slot.name, entry


def _next(slot: Slot, depth: tuple[str, ...]) -> tuple:
    """The same place one layer up; nowhere for what is in no layer."""
    up = tuple((axis, i + 1) if axis in depth else (axis, i) for axis, i in slot.at)
    return (slot.row.name, slot.part, up if up != slot.at else ("nowhere",))


def _taken(checkpoint: Checkpoint, axes: Axes, sources: list[tuple[Slot, str]]):
    """Bert2BERT's AKI (arXiv 2110.07143): units beyond the old ones are those of the layer above."""
    import torch

    taken = [widely(lambda wide, slot=slot: axes.take(wide, slot), checkpoint.tensor(name)) for slot, name in sources]
    return taken[0] if len(taken) == 1 else torch.where(axes.fresh(sources[0][0]), taken[1], taken[0])


def widely(change: Callable[[Any], Any], tensor):
    """Computed in float32 (or wider), cast once."""
    import torch

    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32  # types of eight bits cannot be promoted
    return change(tensor.to(wide)).to(tensor.dtype)
