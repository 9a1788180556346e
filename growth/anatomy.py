"""A checkpoint seen through its family's table: every tensor has a place, or the user hears which has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from growth import families
from growth.axes import fits
from growth.errors import UserError
from growth.families.table import Family, Slot
from growth.ranges import FLOATS
from growth.strange import tensors, unknown_family, unknown_tensors

LANGUAGE = ("LM", "ForConditionalGeneration", "DoubleHeads")  # classes with a language model's head


@dataclass(frozen=True)
class Anatomy:
    """The places of a checkpoint's tensors."""

    family: Family
    config: Mapping[str, Any]
    prefix: str  # of the base model's tensors
    places: Mapping[Slot, str]  # every filled place -> the stored name
    buffers: frozenset[str]  # stored, and not worth keeping

    @property
    def sizes(self) -> dict[str, int | None]:
        return self.family.sizes_of(self.config)

    @property
    def tied(self) -> dict[str, str]:
        """Tensors that are not stored because they are another one."""
        stored = {slot.name for slot in self.places}
        slots = self.family.slots(self.config, self.prefix)
        return {head: source for head, source in self.shared.items() if head not in stored and self._has(slots[head])}

    @property
    def shared(self) -> dict[str, str]:
        """Tensors that are another one, by the config: stored once, as a rule."""
        ties = self.family.view(self.config).holds(self.family.ties)
        return _tied(self.family, self.prefix) if ties else {}

    @property
    def tied_head(self) -> bool:
        """Whether a head multiplies by the embeddings' own table."""
        body = {row.name for row in self.family.rows if row.body}
        names = (name.removeprefix(self.prefix).rpartition(".") for name in self.tied)
        return any(module not in body and part == "weight" for module, _, part in names)

    def _has(self, slot: Slot) -> bool:
        """Whether a tensor that is not stored belongs to the model: the rest of its head tells, or else the class."""
        tied = {name.rpartition(".")[0] for name in self.family.tied}
        others = [row for row in self.family.rows if row.group == slot.row.group and row.name not in tied]
        if slot.row.body or others:
            return any(place.row.group == slot.row.group for place in self.places)
        return any(word in name for name in self.config.get("architectures") or [] for word in LANGUAGE)


def dissect(checkpoint) -> Anatomy:
    """Refuses tensors without a place, places without a tensor, and shapes that contradict config.json."""
    family = _family(checkpoint)
    _refuse_too_many(family, checkpoint)
    named = _named(family, checkpoint)
    prefix, slots = _best_prefix(family, checkpoint.config, named)
    buffers = {named[name] for name in family.buffer_names(checkpoint.config, prefix) & named.keys() - slots.keys()}
    kept = {new: old for new, old in named.items() if old not in buffers}
    if unknown := [old for new, old in kept.items() if new not in slots]:
        raise unknown_tensors(family, prefix, unknown, checkpoint)
    places = {slots[new]: old for new, old in kept.items()}
    _refuse_missing(family, checkpoint, prefix, slots.values(), places)
    _refuse_shapes(family, places, checkpoint)
    return Anatomy(family, checkpoint.config, prefix, places, frozenset(buffers))


def once(checkpoint, anatomy: Anatomy) -> Anatomy:
    """Without tensors that are stored although they are tied and no different: else both would change apart."""
    stored = {slot.name: name for slot, name in anatomy.places.items()}
    pairs = {stored[head]: stored[source] for head, source in anatomy.shared.items() if {head, source} <= stored.keys()}
    twins = {head for head, source in pairs.items() if _equal(checkpoint, head, source)}
    return replace(anatomy, places={slot: name for slot, name in anatomy.places.items() if name not in twins})


def _equal(checkpoint, one: str, other: str) -> bool:
    import torch

    same_type = checkpoint[one].dtype == checkpoint[other].dtype
    return same_type and torch.equal(checkpoint.tensor(one), checkpoint.tensor(other))


def _family(checkpoint) -> Family:
    try:
        return families.of(checkpoint.config)
    except UserError as error:
        raise unknown_family(error, checkpoint) from None


def _best_prefix(family: Family, config: Mapping[str, Any], named: Mapping[str, str]) -> tuple[str, dict[str, Slot]]:
    ways = [(prefix, family.slots(config, prefix)) for prefix in (*family.prefixes, "")]
    return max(ways, key=lambda way: len(way[1].keys() & named.keys()))


def _refuse_too_many(family: Family, checkpoint) -> None:
    for axis in family.in_names:
        if (n := family.sizes_of(checkpoint.config)[axis]) > len(checkpoint):
            raise UserError(f"{checkpoint.path}: config.json says {n} {axis}, but there are {len(checkpoint)} tensors")


def _named(family: Family, checkpoint) -> dict[str, str]:
    """Today's name of every tensor -> the stored one."""
    named: dict[str, str] = {}
    for name in checkpoint:
        if (twin := named.setdefault(_today(family, name), name)) != name:
            raise UserError(f"{checkpoint.path}: {twin} and {name} are two names for one tensor")
    return named


def _today(family: Family, name: str) -> str:
    old = next((end for end in family.renamed if name.endswith("." + end)), None)
    return name if old is None else name.removesuffix(old) + family.renamed[old]


def _tied(family: Family, prefix: str) -> dict[str, str]:
    body = {row.name for row in family.rows if row.body}

    def full(name: str) -> str:
        return prefix + name if name.rpartition(".")[0] in body else name

    return {full(head): full(source) for head, source in family.tied.items()}


def _refuse_missing(family: Family, checkpoint, prefix: str, slots: Iterable[Slot], places: Mapping[Slot, str]) -> None:
    here = {slot.row.group for slot in places} | {""}
    shared = _tied(family, prefix) if family.view(checkpoint.config).holds(family.ties) else {}
    wanted = [slot for slot in slots if slot.row.required and slot.row.group in here]
    missing = [slot.name for slot in wanted if slot not in places and slot.name not in shared]
    if missing:
        raise UserError(f"{checkpoint.path} lacks {tensors(len(missing))} of {family.name}, first: {missing[0]}")


def _refuse_shapes(family: Family, places: Mapping[Slot, str], checkpoint) -> None:
    view, sizes = family.view(checkpoint.config), family.sizes_of(checkpoint.config)
    for key, follow in family.follows.items():
        if (said := getattr(view, key)) != (made := follow(sizes)):
            raise UserError(f"{checkpoint.path}: config.json says {key} {said}, but its other sizes make {made}")
    for slot, name in places.items():
        entry = checkpoint[name]
        if not fits(entry.shape, slot.shape):
            axes = " x ".join("*".join(dim) for dim in slot.dims)
            raise UserError(
                f"{checkpoint.path}: {name} is {list(entry.shape)}, but config.json says {list(slot.shape)} ({axes})"
            )
        if entry.dtype not in FLOATS:
            raise UserError(f"{checkpoint.path}: {name} holds {entry.dtype}, where floating point is expected")
