"""One file of a store: keys and the columns of their rows, in safetensors, its sha256 in its name. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from growth import files, ranges
from growth.errors import UserError

KEY = "key"
NAME = re.compile(r"r\d{5}-\d{6}-([0-9a-f]{64})\.safetensors")
STORED = {dtype: name for name, dtype in ranges.TORCH.items()}  # float32 -> F32


@dataclass(frozen=True)
class Column:
    """A value of this shape in every row; `ragged`: any number of them, one for each token of the row, say."""

    dtype: str
    shape: tuple[int, ...] = ()
    ragged: bool = False
    unit: str = ""

    @property
    def numpy(self) -> np.dtype:
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)  # numpy knows bfloat16 by its bits only

    @property
    def nbytes(self) -> int:
        """Of one value."""
        return self.numpy.itemsize * math.prod(self.shape)


class Ragged(NamedTuple):
    """The values of several rows end to end [sum(lengths), ...] and how many each row has [N]; arrays or tensors."""

    values: Any
    lengths: Any

    def split(self) -> list:
        ends = np.cumsum(np.asarray(self.lengths)).tolist()
        return [self.values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class Shard:
    """Its columns, read where they lie."""

    def __init__(self, path: Path, columns: Mapping[str, Column], *, verify: bool):
        if verify and files.sha256(path) != NAME.fullmatch(path.name)[1]:
            raise UserError(f"{path} is damaged; remove it, and the rows it held can be scored again")
        entries, data = ranges.header(path), np.memmap(path, np.uint8, "r")
        found = {name: (entry.dtype, entry.shape[1:]) for name, entry in entries.items()}
        if found != (wanted := _layout(columns)):
            raise UserError(f"{path} has the columns {found}, its manifest says {wanted}")
        self.path = path
        self._arrays = {n: data[e.start : e.end].view(_type(e.dtype)).reshape(e.shape) for n, e in entries.items()}
        self.keys = self._arrays[KEY]

    def __len__(self) -> int:
        return len(self.keys)

    def fixed(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self._arrays[name][rows]

    def ragged(self, name: str, row: int) -> np.ndarray:
        ends = self._arrays[f"{name}.ends"]
        return self._arrays[name][ends[row - 1] if row else 0 : ends[row]]


def _layout(columns: Mapping[str, Column]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{array: (dtype, shape of one of its values)}."""
    values = {name: (STORED[column.dtype], column.shape) for name, column in columns.items()}
    ends = {f"{name}.ends": ("I64", ()) for name, column in columns.items() if column.ragged}
    return {KEY: ("U8", (16,)), **values, **ends}


def _type(stored: str) -> np.dtype:
    return Column(ranges.TORCH[stored]).numpy


def found(path: Path, columns: Mapping[str, Column], *, verify: bool = True) -> Iterator[Shard]:
    """All of a directory by name: rank after rank, each in the order of writing."""
    return (Shard(p, columns, verify=verify) for p in sorted(path.iterdir()) if NAME.fullmatch(p.name))


def next_number(path: Path, rank: int) -> int:
    return 1 + max((int(p.name[7:13]) for p in path.glob(f"r{rank:05d}-*.safetensors")), default=-1)


def sweep(path: Path, rank: int) -> None:
    """Remove what a killed writer of this rank had not finished."""
    for left in path.glob(f"r{rank:05d}-*.tmp-*"):
        left.unlink()


def write(path: Path, rank: int, keys: np.ndarray, rows: Mapping[str, list], columns: Mapping[str, Column]) -> None:
    """A new shard of these rows, whole or not at all; `rows` are arrays, one for each key."""
    arrays = {KEY: ("U8", keys)}
    for name, column in columns.items():
        arrays[name] = STORED[column.dtype], (np.concatenate if column.ragged else np.stack)(rows[name])
        if column.ragged:
            arrays[f"{name}.ends"] = "I64", np.cumsum([len(row) for row in rows[name]], dtype=np.int64)
    blocks, digest = _blocks(arrays), hashlib.sha256()
    for block in blocks:
        digest.update(block)
    name = f"r{rank:05d}-{next_number(path, rank):06d}-{digest.hexdigest()}.safetensors"
    files.write_bytes(path / name, blocks)
    files.fault("scores.after_shard")


def _blocks(arrays: Mapping[str, tuple[str, np.ndarray]]) -> list[bytes]:
    """A safetensors file of {name: (dtype, values)}, the widest first so that all lie aligned."""
    widest = sorted(arrays.items(), key=lambda item: -item[1][1].itemsize)
    starts = list(accumulate((values.nbytes for _, (_, values) in widest), initial=0))
    header = {
        name: {"dtype": dtype, "shape": list(values.shape), "data_offsets": [start, start + values.nbytes]}
        for (name, (dtype, values)), start in zip(widest, starts, strict=False)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *(values.tobytes() for _, (_, values) in widest)]
