"""Texts by id: lines of files, and a store of them that is read where it lies. No torch."""

from __future__ import annotations

import hashlib
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill.corpus.streams import lines, opened
from growth import files
from growth.errors import UserError

VERSION, MANIFEST = 1, "manifest.json"
LONGEST_LINE = 16 << 20  # bytes
ARRAYS = {"ends": "q", "id_ends": "q", "hashes": "Q", "order": "q"}


def numbered(path: Path, *, ended: bool = False) -> Iterator[tuple[str, str]]:
    """(`file:line`, line) of a text file that may be packed; lines end at `\\n` alone.

    `ended`: the last line as well, for without its end nobody knows whether the last id is whole.
    """
    with opened(path) as stream:
        for number, line in lines(stream, path, LONGEST_LINE, whole=True):
            if ended and not line.endswith("\n"):
                raise UserError(f"{path}:{number}: expected a line end; truncated? (add one if the line is whole)")
            yield f"{path}:{number}", line.removesuffix("\n").removesuffix("\r")


def records(path: Path, expected: str) -> Iterator[tuple[str, dict]]:
    """(`file:line`, object) of a file of JSON lines; `expected`: what the user is told an object looks like."""
    for where, line in numbered(path):
        if line.strip():
            try:
                record = files.parse_json(line.encode(), where)
            except UserError as error:
                raise UserError(f"{error}; expected {expected}") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: found a {type(record).__name__}, expected {expected}")
            yield where, record


def tab_separated(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where, id, text) of MS MARCO's collection and query files, and of topics of one line each."""
    for where, line in numbered(path):
        name, tab, text = line.partition("\t")
        if not tab or not name.strip():
            raise UserError(f"{where}: expected an id, a tab and a text")
        yield where, name.strip(), text


def once(found: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """(where, id, text) as a dictionary; an id stands once."""
    texts: dict[str, str] = {}
    for where, name, text in found:
        if name in texts:
            raise UserError(f"{where}: the id {name!r} stands twice in this file")
        texts[name] = text
    return texts


def digest(texts: Mapping[str, str]) -> str:
    """Of ids and texts in their order."""
    if isinstance(texts, Stored):
        return texts.digest
    state = hashlib.sha256()
    for name, text in texts.items():
        state.update(_framed(name.encode(), text.encode()))
    return state.hexdigest()


def _framed(name: bytes, text: bytes) -> bytes:
    return struct.pack("<QQ", len(name), len(text)) + name + text


class Stored(Mapping[str, str]):
    """Texts of a directory by their ids: memory does not grow with them.

    An id is found by its hash among the sorted ones, which lie on the disk as everything does.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = files.read_json(self.path / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
            raise UserError(f"{self.path} was not written by this version; remove it, and it is made again")
        for name, size in manifest["sizes"].items():
            if not (self.path / name).is_file() or (self.path / name).stat().st_size != size:
                raise UserError(f"{self.path / name} is missing or not as long as it was; remove {self.path}")
        self.digest, self.source, self._count = manifest["digest"], manifest["source"], manifest["texts"]
        # as memory views, which give plain numbers and bytes; arrays would make an array of every one
        self._arrays = {name: memoryview(np.load(self.path / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}
        self._texts, self._ids = (_bytes(self.path / name) for name in ("texts", "ids"))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return (self._id(i) for i in range(len(self)))

    def __getitem__(self, name: str) -> str:
        if (place := self._place(name)) is None:
            raise KeyError(name)
        return _slice(self._texts, self._arrays["ends"], place)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._place(name) is not None

    def _place(self, name: str) -> int | None:
        hashes, order, wanted = self._arrays["hashes"], self._arrays["order"], _hash(name.encode())
        found = bisect_left(hashes, wanted)
        while found < len(hashes) and hashes[found] == wanted:  # of several ids of one hash, the one that is meant
            if self._id(order[found]) == name:
                return order[found]
            found += 1
        return None

    def _id(self, i: int) -> str:
        return _slice(self._ids, self._arrays["id_ends"], i)


def store(path: str | Path, source: Any, found: Iterable[tuple[str, str, str]]) -> Stored:
    """(where, id, text) as a directory; one that was made of the same `source` is opened instead."""
    path = Path(path)
    if path.exists() and (there := Stored(path)).source == source:
        return there
    with files.committed(path, overwrite=True) as temporary:
        about = _written(temporary, found)
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
        files.write_json(temporary / MANIFEST, {"version": VERSION, "source": source, **about, "sizes": sizes})
    return Stored(path)


def _written(directory: Path, found: Iterable[tuple[str, str, str]]) -> dict:
    ends, id_ends, hashes, state = array("q"), array("q"), array("Q"), hashlib.sha256()
    with (directory / "texts").open("wb") as texts, (directory / "ids").open("wb") as ids:
        for _, name, text in found:
            key, value = name.encode(), text.encode()
            state.update(_framed(key, value))
            texts.write(value)
            ids.write(key)
            hashes.append(_hash(key))
            ends.append(texts.tell())
            id_ends.append(ids.tell())
    order = np.argsort(np.asarray(hashes), kind="stable")
    arrays = dict(ends=np.asarray(ends), id_ends=np.asarray(id_ends), hashes=np.asarray(hashes)[order], order=order)
    for name, kind in ARRAYS.items():
        np.save(directory / f"{name}.npy", arrays[name].astype(kind))
    _refuse_twice(_bytes(directory / "ids"), arrays)
    return {"texts": len(ends), "digest": state.hexdigest()}


def _refuse_twice(ids: memoryview, arrays: Mapping[str, np.ndarray]) -> None:
    order, hashes = arrays["order"], arrays["hashes"]
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
        one, other = (_slice(ids, arrays["id_ends"], int(order[i])) for i in (place, place + 1))
        if one == other:
            raise UserError(f"the id {one!r} stands twice among the documents")


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def _bytes(path: Path) -> memoryview:
    """An empty file cannot be mapped."""
    return memoryview(np.memmap(path, np.uint8, "r") if path.stat().st_size else b"")


def _slice(data: memoryview, ends: memoryview | np.ndarray, i: int) -> str:
    return bytes(data[ends[i - 1] if i else 0 : ends[i]]).decode()


def identity(file: Path) -> list:
    """Of a file, without reading it."""
    facts = file.stat()
    return [file.name, facts.st_size, facts.st_mtime_ns]


def written(record: Mapping[str, Any], name: str, where: str, expected: str) -> str:
    """A text or id of a record; numbers are accepted as ids are often written so."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{where}: {name!r} is {found}; expected {expected}")
    return str(value)
