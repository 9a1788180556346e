"""Sparse checkpoints in less room: of a masked matrix the live weights alone, in their order, beside its bits.

At 75 % of bfloat16 a weight takes 4 + 1 bits instead of 16. It is a form for disks: `unpack` gives the checkpoint back
before anything can load it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from growth.bits import FILE, Mask, as_integers, read_masks
from growth.checkpoint import Checkpoint, open, opened_as
from growth.errors import UserError
from growth.files import committed, ensure_space
from growth.masks import read
from growth.operate import PLAIN, Output
from growth.pieces import Computed, Piece
from growth.ranges import inside
from growth.shards import MODEL, PACKED, bytes_of, write_shards
from growth.writer import CARD, CARRIED, CONFIG, LINEAGE, guard


def pack(src: str | Path, dst: str | Path, *, output: Output = PLAIN) -> Path:
    """The checkpoint without the zeros that its masks tell of."""
    guard(Path(dst), [Path(src)], output.overwrite)
    checkpoint, masks = open(src), read(src)
    pieces = [(name, _live(checkpoint, name, masks)) for name in checkpoint]
    return _written(checkpoint, dst, pieces, PACKED, output)


def unpack(src: str | Path, dst: str | Path, *, output: Output = PLAIN) -> Path:
    """What was packed: every weight, every bit."""
    guard(Path(dst), [Path(src)], output.overwrite)
    packed, masks = opened_as(src, PACKED), read_masks(inside(Path(src), FILE))
    pieces = [(name, _whole(packed, name, masks)) for name in packed]
    return _written(packed, dst, pieces, MODEL, output)


def stored(path: str | Path) -> int:
    """Bytes of all files of weights and masks."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


def _written(source: Checkpoint, dst: str | Path, pieces: list[tuple[str, Piece]], stem: str, output: Output) -> Path:
    ensure_space(Path(dst), sum(piece.nbytes for _, piece in pieces), str(dst))
    with committed(dst, overwrite=output.overwrite) as directory:
        write_shards(directory, pieces, bytes_of(output.shard_size), stem)
        for name in (CONFIG, LINEAGE, CARD, FILE, *CARRIED):
            if os.path.lexists(source.path / name):
                shutil.copyfile(inside(source.path, name), directory / name)
    return Path(dst)


def _live(checkpoint: Checkpoint, name: str, masks: Mapping[str, Mask]) -> Piece:
    entry, mask = checkpoint[name], masks.get(name)
    if mask is None:
        return entry
    return Computed(entry.dtype, (mask.kept,), partial(_chosen, checkpoint, name, mask))


def _chosen(checkpoint: Checkpoint, name: str, mask: Mask) -> Any:
    tensor = checkpoint.tensor(name)
    return as_integers(tensor)[mask.bools()].view(tensor.dtype)


def _whole(packed: Checkpoint, name: str, masks: Mapping[str, Mask]) -> Piece:
    entry, mask = packed[name], masks.get(name)
    if mask is None:
        return entry
    if entry.shape != (mask.kept,):
        raise UserError(f"{packed.path}: {name} holds {list(entry.shape)} weights, its mask keeps {mask.kept}")
    return Computed(entry.dtype, mask.shape, partial(_spread, packed, name, mask))


def _spread(packed: Checkpoint, name: str, mask: Mask) -> Any:
    live, alive = packed.tensor(name), mask.bools()
    if int(alive.sum()) != mask.kept:
        raise UserError(
            f"{packed.path}: {FILE} keeps {int(alive.sum())} weights of {name}, its metadata says {mask.kept}"
        )
    bits = as_integers(live)
    whole = bits.new_zeros(mask.shape)
    whole[alive] = bits
    return whole.view(live.dtype)
