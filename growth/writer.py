"""Writing a checkpoint: shards of bounded size, lineage, what belongs beside the weights; whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from growth.console import bar
from growth.errors import UserError
from growth.files import committed, digest, ensure_space, fault, write_json, write_text
from growth.ranges import BYTES, Entry, blocks, dtype_name, inside, torch_dtype

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

LINEAGE, CARD = "growth.json", "README.md"
CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    "generation_config.json",
)
ORDER = list(BYTES)
NO_RANGES = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}  # where copy_file_range cannot
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


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


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return BYTES[dtype] * math.prod(shape)


def write(
    dst: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Any]],
    *,
    shard_size: str | int = "5GB",
    lineage: Mapping[str, Any] | None = None,
    carry: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """A checkpoint directory from (name, tensor) pairs, as transformers would save it.

    A tensor is a torch one, or bytes at rest (`Entry`, `Fill`), or `Computed` when its turn comes. Tokenizer and
    generation files come from `carry`, which is never written to.
    """
    dst = Path(dst)
    guard(dst, [Path(carry)] if carry else [], overwrite)
    with committed(dst, overwrite=overwrite) as directory:
        _write_shards(directory, tensors, bytes_of(shard_size))
        write_json(directory / CONFIG, dict(config))
        if lineage is not None:
            write_json(directory / LINEAGE, {"version": 1, **lineage, "versions": versions()})
        if carry:
            _carry(Path(carry), directory)
            _carry_card(Path(carry), directory, lineage or {})
        fault("write.before_commit")
    return dst


def guard(dst: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """The source is never written, and only a checkpoint is ever replaced."""
    there = dst.resolve()
    for source in (source.resolve() for source in sources):
        if there == source or source in there.parents or there in source.parents:
            raise UserError(f"{dst} and its source {source} must not lie in each other; give another path")
    if os.path.lexists(dst) and not overwrite:
        raise UserError(f"{dst} exists; give another path or --overwrite")
    if dst.is_dir() and any(dst.iterdir()) and not (dst / CONFIG).exists():
        raise UserError(f"{dst} is not a checkpoint, so it is not replaced; give another path")


def bytes_of(text: str | int) -> int:
    """`5GB` -> 5000000000."""
    number, unit = str(text)[:-2], str(text)[-2:].upper()
    if isinstance(text, str) and unit in UNITS and number.replace(".", "", 1).isdigit() and float(number) > 0:
        return int(float(number) * UNITS[unit])
    if isinstance(text, int) and text > 0:
        return text
    raise UserError(f"shard size {text!r}: write 500MB or 5GB")


def versions() -> dict[str, str]:
    return {"growth": metadata.version("distill-growth"), "python": platform.python_version()}


def lineage(operator: str, arguments: Mapping[str, Any], sources: Iterable[Any], **facts: Any) -> dict:
    """What growth.json says of a result: where it came from, through which maps, what is new, what is preserved."""
    return {"operator": operator, "arguments": dict(arguments), "sources": [_origin(s) for s in sources], **facts}


def _origin(source: Any) -> dict[str, Any]:
    return {
        "path": source.origin,
        "config_digest": digest(source.config),
        "header_digest": source.header_digest(),
        "size": source.nbytes,
    }


def _carry(source: Path, directory: Path) -> None:
    for name in CARRIED:
        if os.path.lexists(source / name):
            shutil.copyfile(inside(source, name), directory / name)


def _carry_card(source: Path, directory: Path, story: Mapping[str, Any]) -> None:
    """The source's model card, and at its end what has been done since."""
    if not os.path.lexists(source / CARD) or "preserves" not in story:
        return
    text = inside(source, CARD).read_text(encoding="utf-8", errors="replace").rstrip()
    kept = {"exact": "computes the same", "approximate": "computes nearly the same"}
    does = kept.get(story["preserves"], "does not compute the same")
    done = f"`growth {story['operator']}` made these weights of the model described above; the result {does}."
    write_text(directory / CARD, f"{text}\n\n## Changed since\n\n{done} See `{LINEAGE}`.\n")


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Any]], limit: int) -> None:
    shards: list[dict[str, int]] = []
    with bar(None, f"writing {directory.name.partition('.tmp-')[0]}") as advance:
        for number, shard in enumerate(_shards(tensors, limit)):
            ensure_space(directory, sum(_facts(piece)[2] for _, piece in shard), f"shard {number + 1}")
            shards.append(write_file(directory / f"{number}.part", shard))
            fault("write.after_shard")
            advance(len(shard), f"shard {number + 1}")
    _name_shards(directory, shards)


def _shards(tensors: Iterable[tuple[str, Any]], limit: int) -> Iterator[list[tuple[str, Any]]]:
    shard, filled, seen = [], 0, set()
    for name, piece in tensors:
        if name in seen:
            raise UserError(f"tensor {name} is to be written twice")
        seen.add(name)
        nbytes = _facts(piece)[2]
        if shard and filled + nbytes > limit:
            yield shard
            shard, filled = [], 0
        shard.append((name, piece))
        filled += nbytes
    yield shard


def _name_shards(directory: Path, shards: list[dict[str, int]]) -> None:
    if len(shards) == 1:
        (directory / "0.part").rename(directory / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (directory / f"{i}.part").rename(directory / name)
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(sum(shard.values()) for shard in shards)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _facts(piece: Any) -> tuple[str, tuple[int, ...], int]:
    if isinstance(piece, Piece):
        return piece.dtype, piece.shape, piece.nbytes
    dtype = dtype_name(piece.dtype)
    return dtype, tuple(piece.shape), piece.numel() * BYTES[dtype]


def write_file(path: Path, shard: list[tuple[str, Any]]) -> dict[str, int]:
    """One safetensors file, to the byte as its own library would write it: widest types first, then by name."""
    shard = sorted(shard, key=lambda item: (ORDER.index(_facts(item[1])[0]), item[0]))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, piece in shard:
        dtype, shape, nbytes = _facts(piece)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, piece in shard:
            _write_piece(file, piece)
            fault("write.after_tensor")
    return {name: _facts(piece)[2] for name, piece in shard}


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
        if _facts(made)[:2] != (piece.dtype, piece.shape):
            raise AssertionError(f"promised {piece.dtype} {piece.shape}, made {_facts(made)[:2]}")
        _write_tensor(file, made)
    else:
        _write_tensor(file, piece)


def _write_tensor(file, tensor: Any) -> None:
    import torch

    file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def packed(value: float, dtype: str) -> bytes:
    """The bytes of one number."""
    if value == 0:
        return bytes(BYTES[dtype])  # of every type
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]  # the upper half; exact for the 0, 1 and -1 that are ever filled in
    return struct.pack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], value)


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
