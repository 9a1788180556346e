"""What a tensor may be on its way to a file: bytes at rest, one value, something to compute, or a torch tensor."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from growth.ranges import BYTES, Entry, blocks, dtype_name, torch_dtype


@dataclass(frozen=True)
class Fill:
    """A tensor of one value, made without torch."""

    dtype: str
    shape: tuple[int, ...]
    value: float

    @property
    def nbytes(self) -> int:
        return _nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Computed:
    """A tensor that is made when its turn comes, so that one at a time is in memory."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.dtype, self.shape)


Piece = Entry | Fill | Computed  # or a torch.Tensor


def made(piece: Piece):
    """The tensor of a piece."""
    import torch

    if isinstance(piece, Computed):
        return piece.make()
    dtype = torch_dtype(piece.dtype)
    if isinstance(piece, Fill):
        return torch.full(piece.shape, piece.value, dtype=dtype)
    if piece.nbytes == 0:
        return torch.empty(piece.shape, dtype=dtype)
    return torch.frombuffer(bytearray(b"".join(blocks(piece))), dtype=torch.uint8).view(dtype).reshape(piece.shape)


def facts(piece: Any) -> tuple[str, tuple[int, ...], int]:
    if isinstance(piece, Piece):
        return piece.dtype, piece.shape, piece.nbytes
    dtype = dtype_name(piece.dtype)
    return dtype, tuple(piece.shape), piece.numel() * BYTES[dtype]


def packed(value: float, dtype: str) -> bytes:
    """The bytes of one number."""
    if value == 0:
        return bytes(BYTES[dtype])  # of every type
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]  # the upper half; exact for the 0, 1 and -1 that are ever filled in
    if dtype == "F8_E5M2":
        return struct.pack("<e", value)[1:]  # likewise
    if dtype == "F8_E4M3":
        return {1.0: b"\x38", -1.0: b"\xb8"}[value]
    return struct.pack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], value)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return BYTES[dtype] * math.prod(shape)
