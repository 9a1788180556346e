"""Safetensors files as byte ranges: where each tensor lies, checked to the byte and never decoded.

The structure is checked here because the readers in use accept duplicate keys and follow links out of a directory.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth.errors import UserError
from growth.files import parse_json

LARGEST_HEADER = 10_000_000  # bytes: some 90 000 tensors in one file; safetensors itself stops at 100 MB
MOST_DIMENSIONS = 16
BYTES = {  # in the order in which safetensors lays types out in a file: the widest first
    **{"U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `end` of `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def header(path: Path) -> dict[str, Entry]:
    """The entries of one safetensors file: every byte belongs to exactly one tensor."""
    fields, data, total = _header(path)
    fields.pop("__metadata__", None)
    entries = {name: _entry(path, name, field, data) for name, field in fields.items()}
    _refuse_gaps(path, entries, data, total)
    return entries


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors."""
    said = _header(path)[0].get("__metadata__", {})
    return said if isinstance(said, dict) and all(isinstance(text, str) for text in said.values()) else {}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Its fields, where the data begin, and the size of the file."""
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > total - 8:
            raise UserError(f"{path} is truncated: {total} bytes, and its header would need {length}")
        if length > LARGEST_HEADER:
            raise UserError(f"{path}: a header of {length} bytes; at most {LARGEST_HEADER} are read")
        fields = parse_json(file.read(length), path)
    if not isinstance(fields, dict):
        raise UserError(f"{path}: the header is not an object")
    return fields, 8 + length, total


def _entry(path: Path, name: str, fields: Any, data: int) -> Entry:
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise UserError(f"{path}: {name} has dtype {dtype!r}; known: {', '.join(BYTES)}")
    if not _naturals(shape) or len(shape) > MOST_DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: {name} has no proper shape and data_offsets")
    start, end = offsets
    if math.prod(shape) * BYTES[dtype] != end - start:
        raise UserError(f"{path}: {name} is {dtype} {shape}, which is not the {end - start} bytes of {start} to {end}")
    return Entry(dtype, tuple(shape), path, data + start, data + end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def _refuse_gaps(path: Path, entries: Mapping[str, Entry], begin: int, total: int) -> None:
    at = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise UserError(
                f"{path}: {name} {'overlaps the tensor' if entry.start < at else 'leaves a hole'} before it"
            )
        at = entry.end
    if at != total:
        raise UserError(f"{path} is {'truncated' if at > total else 'too long'}: {total} bytes, its header needs {at}")


def blocks(entry: Entry, length: int = 1 << 22) -> Iterator[bytes]:
    """The bytes of a tensor, a few megabytes at a time."""
    with entry.file.open("rb") as file:
        for at in range(entry.start, entry.end, length):
            block = os.pread(file.fileno(), min(length, entry.end - at), at)
            if not block:
                raise UserError(f"{entry.file} became shorter while it was read")
            yield block


def inside(directory: Path, name: str) -> Path:
    """The regular file of this name, if it is in the directory (or where the Hugging Face cache keeps its blobs)."""
    path = directory / name
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"{directory}: file name {name!r} would leave the directory")
    if not path.exists():
        raise UserError(f"{path} does not exist" + (" (a dangling link)" if path.is_symlink() else ""))
    home, real = directory.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in real.parents and real.parent != blobs:
        raise UserError(f"{path} is a link out of its directory, to {real}")
    if not stat.S_ISREG(real.stat().st_mode):
        raise UserError(f"{path} is not a regular file")
    return path


TORCH = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"},
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
}


def torch_dtype(name: str):
    import torch

    return getattr(torch, TORCH[name])


def dtype_name(dtype) -> str:
    """torch.float32 -> F32."""
    plain = re.sub(r"^torch\.", "", str(dtype))
    return next(name for name, torch_name in TORCH.items() if torch_name == plain)
