"""The masks of a checkpoint: which there are, whether they fit it, whether what they call dead is zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.bits import FILE, Mask, group, read_masks
from growth.checkpoint import open
from growth.errors import UserError
from growth.families.table import Slot
from growth.memory import Memory
from growth.parameters import in_memory, place
from growth.pieces import Computed, made
from growth.ranges import inside


def read(directory: str | Path) -> dict[str, Mask]:
    """The masks of a checkpoint by the names of their tensors, compared with its weights to the last bit."""
    checkpoint = open(directory)
    if not is_sparse(checkpoint):
        raise UserError(
            f"{directory} has no {FILE}: nothing says which of its weights are dead (`growth sparsify` does)"
        )
    anatomy = dissect(checkpoint)
    masks = masks_of(checkpoint, anatomy)
    slots = {name: slot for slot, name in anatomy.places.items()}
    for name, mask in masks.items():
        _refuse_wrong_bits(checkpoint, slots[name], name, mask)
    return masks


def is_sparse(source: Any) -> bool:
    """Whether a checkpoint, or a model, has masks."""
    if isinstance(source, Memory):
        return bool(vars(source.model).get("masks"))
    return (Path(source.path) / FILE).is_file()


def masks_of(source: Any, anatomy: Anatomy | None = None) -> dict[str, Mask]:
    """The masks of a checkpoint or a model as their headers tell them; none where there are none."""
    if not is_sparse(source):
        return {}
    held = vars(source.model)["masks"] if isinstance(source, Memory) else read_masks(inside(Path(source.path), FILE))
    anatomy = anatomy or dissect(source)
    slots = {name: slot for slot, name in anatomy.places.items()}
    for name, mask in held.items():
        _refuse_misplaced(source, anatomy, slots, name, mask)
    return dict(held)


def by_parameter(masks: Mapping[str, Mask], anatomy: Anatomy) -> dict[str, Any]:
    """True where a weight is alive, by the names and shapes of a training model, in which experts are one tensor."""
    known = {name: slot.name for slot, name in anatomy.places.items()}
    places = replace(anatomy, places={slot: name for slot, name in anatomy.places.items() if name in masks})
    pieces = ((known[name], Computed("BOOL", mask.shape, mask.bools)) for name, mask in masks.items())
    return {name: made(piece) for name, piece in in_memory(pieces, places)}


def of_parameters(alive: Mapping[str, Any], anatomy: Anatomy, pattern: str | None = None) -> dict[str, Mask]:
    """The way back: masks by the names of tensors on disk, of bools by the names of a training model."""
    masks = {}
    for slot, name in anatomy.places.items():
        whole, i, n = place(slot, anatomy)
        if whole in alive:
            part = alive[whole].reshape(n, -1)[i].reshape(slot.shape).cpu()
            masks[name] = Mask.of(part, pattern)
    return masks


def _refuse_misplaced(source: Any, anatomy: Anatomy, slots: Mapping[str, Slot], name: str, mask: Mask) -> None:
    where = f"{source.path}: {FILE} has a mask of {name}"
    pairs = {**anatomy.shared, **{one: other for other, one in anatomy.shared.items()}}
    if name in pairs:
        raise UserError(f"{where}, which is tied to {pairs[name]}: embeddings stay dense")
    if name not in slots:
        raise UserError(f"{where}, which the checkpoint does not have")
    if slots[name].part == ".bias" or slots[name].row.spec.consumed is None:
        raise UserError(f"{where}, which is no matrix of a linear layer")
    if source[name].shape != mask.shape:
        raise UserError(f"{where} of shape {list(mask.shape)}, but the tensor is {list(source[name].shape)}")


def _refuse_wrong_bits(checkpoint: Any, slot: Slot, name: str, mask: Mask) -> None:
    alive = mask.bools()
    if mask.pattern and (mask.shape[slot.row.spec.consumed] % group(mask.pattern)[1] or _uneven(alive, slot, mask)):
        raise UserError(f"{checkpoint.path}: the mask of {name} is not {mask.pattern} along what is summed over")
    if (count := int(alive.sum())) != mask.kept or _beyond(mask):
        raise UserError(f"{checkpoint.path}: {FILE} keeps {count} weights of {name}, its metadata says {mask.kept}")
    if revived := int((_wide(checkpoint.tensor(name)) != 0).logical_and_(~alive).sum()):
        raise UserError(
            f"{checkpoint.path}: {revived} weights of {name} are not zero although its mask says that they are dead"
        )


def _uneven(alive, slot: Slot, mask: Mask) -> bool:
    """Whether a group along the dimension that is summed over keeps another number than the pattern says."""
    keep, of = group(mask.pattern)
    counts = alive.movedim(slot.row.spec.consumed, -1).unflatten(-1, (-1, of)).sum(-1)
    return bool((counts != keep).any())


def _beyond(mask: Mask) -> bool:
    """Whether bits are set behind the last weight."""
    rest = -mask.size % 8
    return rest > 0 and int(made(mask.bits)[-1]) >> (8 - rest) > 0


def _wide(tensor):
    return tensor.float() if tensor.itemsize == 1 else tensor
