"""Texts to disk, each on its side: for training or held out."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from distill.corpus import store
from distill.corpus.documents import Document
from growth.console import bar
from growth.errors import UserError


def split(documents: Iterable[Document], heldout: float, directory: Path, source: str) -> Sides:
    """All documents of a source, stripped; an error when a side stays empty.

    A document goes to a side by the hash of its text: it stays where it is when others come and go.
    """
    sides, side = Sides(directory, store.SIDES if heldout else [store.TRAIN]), None
    with bar(None, f"reading {source}") as advance:
        for document in documents:
            text = document.text.strip()
            side = side if document.continues else _side(text, heldout)
            sides.counts["cut"] += document.continues
            if text:
                sides.add(text, document.part, side, document.label)
            else:
                sides.counts["blank"] += 1
            advance()
    sides.close()
    _check(sides, heldout, source)
    return sides


def _side(text: str, heldout: float) -> str:
    """Spaces and case make no other document."""
    key = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
    return store.HELDOUT if int.from_bytes(key[:8], "big") < heldout * 2**64 else store.TRAIN


def _check(sides: Sides, heldout: float, source: str) -> None:
    n = sides.counts["documents"]
    if not n:
        raise UserError(f"{source}: no text here ({sides.counts['blank']} blank documents)")
    if not all(side.ends for side in sides.values()):
        some = f"{n} documents are" if n > 1 else "1 document is"
        raise UserError(f"{source}: {some} too few to hold out {heldout:g}; set heldout: 0 or give more text")


class Sides(dict):
    """{name: the texts of a side}, while they are written."""

    def __init__(self, directory: Path, names: Iterable[str], classes: Iterable[str] = ()):
        super().__init__({name: Side(directory, name) for name in names})
        self.parts: dict[str, int] = {}
        self._labels = {name: i for i, name in enumerate(classes)}
        self.classes = list(self._labels) or None  # unless given, those that documents have, sorted
        self.counts = {"bytes": 0, "documents": 0, "words": 0, "blank": 0, "cut": 0}
        self._hash = hashlib.sha256()

    def add(self, text: str, part: str, side: str, label: str | None = None) -> None:
        data = text.encode()
        known = store.UNKNOWN if label is None else self._labels.setdefault(label, len(self._labels))
        self[side].add(data, self.parts.setdefault(part, len(self.parts)), known)
        self._hash.update(data + b"\n")
        self.counts["bytes"] += len(data) + 1
        self.counts["words"] += len(text.split())
        self.counts["documents"] += 1

    def close(self) -> None:
        for side in self.values():
            side.close()
        self.classes = list(self._labels) if self.classes else sorted(self._labels) or None

    def labels(self, side: str) -> np.ndarray:
        """The class of every document of a side as a place in `classes`."""
        places = {name: i for i, name in enumerate(self.classes)}
        table = np.array([*(places[name] for name in self._labels), store.UNKNOWN], dtype=np.int32)
        return table[np.array(self[side].labels)]  # the last place is that of -1

    @property
    def source(self) -> dict:
        """What the texts are, whatever side they are on: sizes, and the sha256 of all of them, one a line."""
        return {**self.counts, "digest": self._hash.hexdigest()}


class Side:
    """The texts of one side, end to end in one file; `store.Texts` reads them."""

    def __init__(self, directory: Path, name: str):
        self.directory, self.name = directory, name
        self.ends, self.parts, self.labels = array("Q"), array("I"), array("i")
        self._file = (directory / f"{name}.texts").open("wb")

    def add(self, data: bytes, part: int, label: int) -> None:
        self._file.write(data)
        self.ends.append(self._file.tell())
        self.parts.append(part)
        self.labels.append(label)

    def close(self) -> None:
        self._file.close()
        store.write_array(self.directory / f"{self.name}.ends.npy", np.array(self.ends, dtype=np.uint64))
        store.write_array(self.directory / f"{self.name}.parts.npy", np.array(self.parts, dtype=np.uint32))
