"""Masks of weights at rest: one bit a weight, in a file of their own, never told from zeros.

A live weight may be zero, and one in eight bits may underflow to it: only the mask says which weights are dead.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from growth.errors import UserError
from growth.files import parse_json
from growth.pieces import Computed, Piece, made
from growth.ranges import Entry, header, metadata
from growth.shards import write_file

FILE = "masks.safetensors"
KEY, VERSION = "masks", 1  # in the metadata of the file
INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # by bytes
PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")


@dataclass(frozen=True)
class Mask:
    """Which weights of a matrix are alive."""

    shape: tuple[int, ...]
    kept: int
    bits: Piece  # uint8 [weights / 8, rounded up]: the first weight is the lowest bit of the first byte
    pattern: str | None = None  # "2:4": so many of each group along the dimension that is summed over

    @classmethod
    def drawn(cls, shape: tuple[int, ...], kept: int, draw, pattern: str | None = None) -> Mask:
        """A mask whose bools `draw` makes when they are asked for."""
        return cls(shape, kept, Computed("U8", (_bytes(shape),), lambda: packed(draw())), pattern)

    @classmethod
    def of(cls, alive, pattern: str | None = None) -> Mask:
        """The mask of these bools."""
        bits = packed(alive)
        return cls(tuple(alive.shape), int(alive.sum()), Computed("U8", tuple(bits.shape), lambda: bits), pattern)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def bools(self):
        """True where a weight is alive."""
        return unpacked(made(self.bits), self.shape)

    def settled(self) -> Mask:
        """With its bits in memory, whatever they were to be made of."""
        bits = made(self.bits)
        return replace(self, bits=Computed("U8", tuple(bits.shape), lambda: bits))


def _bytes(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // 8)


def packed(mask):
    """bool [...] -> uint8 [n / 8]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def unpacked(bits, shape: tuple[int, ...]):
    """uint8 [n / 8] -> bool [shape], on the device of the bits."""
    import torch

    flat = _spelled(bits.device).index_select(0, bits.int()).view(torch.bool)
    return flat[: math.prod(shape)].view(shape)


@cache
def _spelled(device):
    """int64 [256]: the eight bools of every byte, as they lie in memory."""
    import numpy as np
    import torch

    every = np.arange(256, dtype=np.uint8)[:, None]
    return torch.from_numpy(np.unpackbits(every, axis=1, bitorder="little").view(np.int64)[:, 0]).to(device)


def as_integers(tensor):
    """The same bytes, of a type that torch can choose from and fill whatever the type of floats."""
    import torch

    return tensor.contiguous().view(getattr(torch, INTEGERS[tensor.itemsize]))


def write_masks(path: Path, masks: Mapping[str, Mask]) -> None:
    """A safetensors file of bits; what shape they have stands in its metadata."""
    told = {name: {"shape": list(m.shape), "kept": m.kept, "pattern": m.pattern} for name, m in sorted(masks.items())}
    said = json.dumps({"version": VERSION, "bit_order": "little", "tensors": told}, separators=(",", ":"))
    write_file(path, [(name, mask.bits) for name, mask in masks.items()], {KEY: said})


def read_masks(path: Path) -> dict[str, Mask]:
    """What the headers of such a file say; the bits stay where they are."""
    entries, told = header(path), _told(path)
    if entries.keys() != told.keys():
        raise UserError(f"{path}: {min(entries.keys() ^ told.keys())} is only in its metadata, or only beside it")
    return {name: _mask(path, name, entries[name], told[name]) for name in sorted(entries)}


def _told(path: Path) -> dict[str, Any]:
    said = parse_json(metadata(path).get(KEY, "null").encode(), path)
    known = isinstance(said, dict) and said.get("version") == VERSION and said.get("bit_order") == "little"
    if not known or not isinstance(said.get("tensors"), dict):
        raise UserError(f"{path} holds no masks of version {VERSION}: its metadata should say so under {KEY!r}")
    return said["tensors"]


def _mask(path: Path, name: str, entry: Entry, told: Any) -> Mask:
    facts = told if isinstance(told, dict) else {}
    shape, kept, pattern = facts.get("shape"), facts.get("kept"), facts.get("pattern")
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in [*shape, kept])
    if not whole or kept > math.prod(shape) or (entry.dtype, entry.shape) != ("U8", (_bytes(shape),)):
        holds = f"{entry.dtype} {list(entry.shape)}"
        raise UserError(f"{path}: {name} holds {holds}, which is no mask that keeps {kept} of the shape {shape}")
    try:
        if pattern is not None:
            group(pattern)
    except ValueError as error:
        raise UserError(f"{path}: {name}: {error}") from None
    return Mask(tuple(shape), kept, entry, pattern)


def group(pattern: Any) -> tuple[int, int]:
    """`2:4` -> (2, 4): how many of how many are kept."""
    found = PATTERN.fullmatch(pattern) if isinstance(pattern, str) else None
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"pattern {pattern!r}: how many of how many are kept is expected, such as 2:4")
    return int(found[1]), int(found[2])
