"""Masks of a checkpoint, by the names that parameters have inside a model that trains, with a head or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import growth
from distill import loading
from growth import masks
from growth.anatomy import Anatomy, dissect
from growth.bits import FILE, read_masks, write_masks
from growth.bits import Mask as Bits
from growth.errors import UserError
from growth.parameters import name_in_memory
from growth.sparsity import prunable


@dataclass(frozen=True)
class Held:
    """The mask of one parameter: True where it is alive; `pattern` along `dim`, counted from the end."""

    alive: Tensor
    pattern: str | None = None
    dim: int = -1


def is_sparse(directory: Path) -> bool:
    return (Path(directory) / FILE).is_file()


def read(directory: Path) -> dict[str, Held]:
    """Compared with the weights; what does not fit them is refused."""
    found = masks.read(directory)
    anatomy = dissect(growth.open(directory))
    facts = {}
    for slot, name in anatomy.places.items():
        if name in found:
            facts[name_in_memory(slot, anatomy)] = found[name].pattern, slot.row.spec.consumed - len(slot.shape)
    alive = masks.by_parameter(found, anatomy)
    return {name.removeprefix(anatomy.prefix): Held(mask, *facts[name]) for name, mask in alive.items()}


def masked(directory: Path) -> int:
    """Weights that have a mask, as the headers say."""
    return sum(mask.size for mask in read_masks(Path(directory) / FILE).values())


def write(directory: Path, held: Mapping[str, Held]) -> None:
    """Beside the weights of a checkpoint, by the names of its tensors."""
    anatomy = dissect(growth.open(directory))
    found = {}
    for pattern in {one.pattern for one in held.values()}:
        alive = {name: one.alive for name, one in held.items() if one.pattern == pattern}
        found.update(masks.of_parameters(_whole(alive, anatomy), anatomy, pattern))
    write_masks(directory / FILE, found)


def _whole(alive: Mapping[str, Tensor], anatomy: Anatomy) -> dict[str, Tensor]:
    names = {name_in_memory(slot, anatomy) for slot in anatomy.places}
    inside = {name.removeprefix(anatomy.prefix): name for name in names}
    return {inside[name]: mask for name, mask in alive.items()}


def dense(directory: Path, scope: Sequence[str]) -> dict[str, Held]:
    """Masks of a dense checkpoint, in which all is alive."""
    checkpoint = growth.open(directory)
    anatomy = dissect(checkpoint)
    names = [anatomy.places[slot] for slot in prunable(anatomy, scope)]
    whole = {name: Bits.of(torch.ones(checkpoint[name].shape, dtype=torch.bool)) for name in names}
    return {n.removeprefix(anatomy.prefix): Held(mask) for n, mask in masks.by_parameter(whole, anatomy).items()}


@torch.no_grad()
def laid_over(model: nn.Module, source: Path) -> dict[str, Held]:
    """The masks of a checkpoint, if it has any; what they call dead is zero in the model afterwards."""
    held = read(source) if is_sparse(source) else {}
    places = {loading.inside(name, model): p for name, p in model.named_parameters()}
    for name, one in held.items():
        if name not in places or places[name].shape != one.alive.shape:
            has = list(places[name].shape) if name in places else "none such"
            raise UserError(f"{source} masks {name} {list(one.alive.shape)}; the student has {has}")
        places[name].masked_fill_(~one.alive, 0.0)
    return held
