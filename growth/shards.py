"""Safetensors files written piece by piece: shards of bounded size, byte ranges copied inside the kernel."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from growth.console import bar
from growth.errors import UserError
from growth.files import ensure_space, fault, write_json
from growth.pieces import Computed, Fill, facts, packed
from growth.ranges import BYTES, Entry, blocks

MODEL, PACKED = "model", "packed"  # what the names of files of weights begin with
ORDER = list(BYTES)
NO_RANGES = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}  # where copy_file_range cannot
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def single_of(stem: str) -> str:
    return f"{stem}.safetensors"


def index_of(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


SINGLE = single_of(MODEL)


def bytes_of(text: str | int) -> int:
    """`5GB` -> 5000000000."""
    number, unit = str(text)[:-2], str(text)[-2:].upper()
    if isinstance(text, str) and unit in UNITS and number.replace(".", "", 1).isdigit() and float(number) > 0:
        return int(float(number) * UNITS[unit])
    if isinstance(text, int) and text > 0:
        return text
    raise UserError(f"shard size {text!r}: write 500MB or 5GB")


def write_shards(directory: Path, tensors: Iterable[tuple[str, Any]], limit: int, stem: str = MODEL) -> None:
    shards: list[dict[str, int]] = []
    with bar(None, f"writing {directory.name.partition('.tmp-')[0]}") as advance:
        for number, shard in enumerate(_shards(tensors, limit)):
            ensure_space(directory, sum(facts(piece)[2] for _, piece in shard), f"shard {number + 1}")
            shards.append(write_file(directory / f"{number}.part", shard))
            fault("write.after_shard")
            advance(len(shard), f"shard {number + 1}")
    _name_shards(directory, shards, stem)


def _shards(tensors: Iterable[tuple[str, Any]], limit: int) -> Iterator[list[tuple[str, Any]]]:
    shard, filled, seen = [], 0, set()
    for name, piece in tensors:
        if name in seen:
            raise UserError(f"tensor {name} is to be written twice")
        seen.add(name)
        nbytes = facts(piece)[2]
        if shard and filled + nbytes > limit:
            yield shard
            shard, filled = [], 0
        shard.append((name, piece))
        filled += nbytes
    yield shard


def _name_shards(directory: Path, shards: list[dict[str, int]], stem: str) -> None:
    if len(shards) == 1:
        (directory / "0.part").rename(directory / single_of(stem))
        return
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (directory / f"{i}.part").rename(directory / name)
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(sum(shard.values()) for shard in shards)
    write_json(
        directory / index_of(stem), {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    )


def write_file(path: Path, shard: list[tuple[str, Any]], metadata: Mapping[str, str] | None = None) -> dict[str, int]:
    """One safetensors file, to the byte as its own library would write it: widest types first, then by name."""
    shard = sorted(shard, key=lambda item: (ORDER.index(facts(item[1])[0]), item[0]))
    header, at = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, piece in shard:
        dtype, shape, nbytes = facts(piece)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, piece in shard:
            _write_piece(file, piece)
            fault("write.after_tensor")
    return {name: facts(piece)[2] for name, piece in shard}


def _write_piece(file, piece: Any) -> None:
    if isinstance(piece, Entry):
        file.flush()
        copy_range(piece, file.fileno())
    elif isinstance(piece, Fill):
        one = packed(piece.value, piece.dtype)
        for at in range(0, piece.nbytes, 1 << 20):
            file.write(one * (min(1 << 20, piece.nbytes - at) // len(one)))
    elif isinstance(piece, Computed):
        made = piece.make()
        if facts(made)[:2] != (piece.dtype, piece.shape):
            raise AssertionError(f"promised {piece.dtype} {piece.shape}, made {facts(made)[:2]}")
        _write_tensor(file, made)
    else:
        _write_tensor(file, piece)


def _write_tensor(file, tensor: Any) -> None:
    import torch

    file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def copy_range(entry: Entry, target: int) -> None:
    """The bytes of a tensor from file to file inside the kernel, at the end of `target`."""
    with entry.file.open("rb") as source:
        at = entry.start
        while at < entry.end:
            try:
                n = os.copy_file_range(source.fileno(), target, entry.end - at, at)
            except OSError as error:
                if error.errno not in NO_RANGES:
                    raise
                return _copy_blocks(entry, at, target)
            if n == 0:
                raise UserError(f"{entry.file} became shorter while it was copied")
            at += n


def _copy_blocks(entry: Entry, at: int, target: int) -> None:
    rest = Entry(entry.dtype, entry.shape, entry.file, at, entry.end)
    for block in blocks(rest):
        view = memoryview(block)
        while view:
            view = view[os.write(target, view) :]
