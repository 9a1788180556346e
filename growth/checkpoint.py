"""A Hugging Face directory as a lazy mapping from names to tensors, one file or shards, checked when it is opened."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from growth.errors import UserError
from growth.files import digest, read_json
from growth.ranges import Entry, blocks, header, inside, torch_dtype
from growth.shards import MODEL, PACKED, index_of, single_of
from growth.writer import CONFIG, write

__all__ = ["Checkpoint", "Entry", "open", "write"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
VOLATILE = {"transformers_version", "_name_or_path"}  # config keys that say nothing about the model


class Checkpoint(Mapping[str, Entry]):
    """`checkpoint[name]` is where a tensor lies, `checkpoint.tensor(name)` is the tensor."""

    def __init__(self, path: Path, config: dict[str, Any], files: list[Path], entries: dict[str, Entry]):
        self.path, self.config, self.files, self._entries = path, config, files, entries

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<checkpoint {self.path}: {len(self)} tensors in {len(self.files)} files>"

    @property
    def origin(self) -> str:
        """What a lineage calls it."""
        return str(self.path.resolve())

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.values())

    def tensor(self, name: str):
        """A view into the file (private: writing to it changes nothing on the disk)."""
        import torch

        entry, dtype = self[name], torch_dtype(self[name].dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        raw = torch.frombuffer(self._maps[entry.file], dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
        aligned = raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).reshape(entry.shape)

    @cached_property
    def _maps(self) -> dict[Path, mmap.mmap]:
        return {path: _map(path) for path in self.files}

    def loaded(self, kind: type, **how: Any):
        """By transformers, as a model of a class."""
        return kind.from_pretrained(self.path, local_files_only=True, **how)

    def check_values(self, names: Iterable[str] | None = None) -> None:
        """Refuse tensors with NaN or infinity, by name; `names`: of these alone."""
        refuse_not_finite(self, names)

    def digest(self) -> str:
        """sha256 of what the model is: its config, and name, dtype, shape and bytes of every tensor in name order.

        How the tensors are spread over files does not matter, nor which version of transformers wrote them.
        """
        kept = {key: value for key, value in self.config.items() if key not in VOLATILE}
        state = hashlib.sha256(digest(kept).encode())
        for name, entry in sorted(self.items()):
            state.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            for block in blocks(entry):
                state.update(block)
        return state.hexdigest()

    def header_digest(self) -> str:
        """sha256 of the names, types and shapes alone: instant, for the lineage."""
        return digest({name: [entry.dtype, entry.shape] for name, entry in self.items()})


def open(path: str | Path) -> Checkpoint:
    """Read config.json and all headers of a checkpoint directory, and check that they tell one consistent story."""
    return opened_as(path, MODEL)


def opened_as(path: str | Path, stem: str) -> Checkpoint:
    """The same where the files of weights have another name."""
    path, single, index = Path(path), single_of(stem), index_of(stem)
    if not path.is_dir():
        raise UserError(f"{path} is not a checkpoint directory")
    config = read_json(inside(path, CONFIG))
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG}: an object is expected")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path / CONFIG}: architectures is {names!r}; a list of class names is expected")
    shards = not (path / single).exists() and (path / index).exists()
    entries = _indexed(path, index) if shards else _single(path, single)
    if not entries:
        raise UserError(f"{path} holds no tensors")
    return Checkpoint(path, config, sorted({entry.file for entry in entries.values()}), entries)


def _single(path: Path, single: str) -> dict[str, Entry]:
    if os.path.lexists(path / single):
        return header(inside(path, single))
    if any((path / name).exists() for name in (single_of(PACKED), index_of(PACKED))):
        raise UserError(f"{path} is packed: `growth unpack` makes a checkpoint of it")
    pickles = sorted(found.name for pattern in PICKLES for found in path.glob(pattern))
    if pickles:
        raise UserError(f"{path} holds only pickle ({pickles[0]}), which can run code: convert it to safetensors")
    raise UserError(f"{path} has neither {single} nor {single}.index.json")


def _indexed(path: Path, index: str) -> dict[str, Entry]:
    told = read_json(inside(path, index))
    where = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{path / index}: 'weight_map' from tensor to file name is expected")
    entries: dict[str, Entry] = {}
    safe = {file: inside(path, file) for file in sorted(set(where.values()))}  # all of them before any is opened
    for file, place in safe.items():
        found = header(place)
        _compare(path / file, index, found, where)
        entries.update(found)
    return entries


def _compare(file: Path, index: str, found: Mapping[str, Entry], where: Mapping[str, str]) -> None:
    for name in found:
        if name not in where:
            raise UserError(f"{file} holds {name}, which {index} does not list")
        if where[name] != file.name:
            raise UserError(f"{file} holds {name}, which {index} places in {where[name]}")
    lost = next((name for name, place in where.items() if place == file.name and name not in found), None)
    if lost:
        raise UserError(f"{file} lacks {lost}, which {index} places there")


def refuse_not_finite(checkpoint, names: Iterable[str] | None = None) -> None:
    wrong = [name for name in (checkpoint if names is None else names) if not _finite(checkpoint.tensor(name))]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{checkpoint.path}: {wrong[0]}{more} not finite (NaN or infinity)")


def _finite(tensor) -> bool:
    parts = tensor.reshape(-1).split(1 << 22)
    return all(bool((part.float() if part.itemsize == 1 else part).isfinite().all()) for part in parts)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
