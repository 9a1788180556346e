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


class Split:
    """Documents go to a side by the hash of their text: each stays where it is when others come and go."""

    def __init__(self, heldout: float, directory: Path):
        self.heldout = heldout
        self.sides = {name: Side(directory, name) for name in (store.SIDES if heldout else [store.TRAIN])}
        self.parts: dict[str, int] = {}
        self.counts = {"bytes": 0, "documents": 0, "words": 0, "blank": 0, "cut": 0}
        self._hash = hashlib.sha256()

    def read(self, documents: Iterable[Document], source: str) -> None:
        """All documents of a source; an error when a side stays empty."""
        side = None
        with bar(None, f"reading {source}") as advance:
            for document in documents:
                text = document.text.strip()
                side = side if document.continues else self._side(text)
                self._add(text, document.part, side)
                self.counts["cut"] += document.continues
                advance()
        for texts in self.sides.values():
            texts.close()
        self._check(source)

    @property
    def source(self) -> dict:
        """What the texts are, whatever side they are on: sizes, and the sha256 of all of them, one a line."""
        return {**self.counts, "digest": self._hash.hexdigest()}

    def _side(self, text: str) -> str:
        """Spaces and case make no other document."""
        key = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
        return store.HELDOUT if int.from_bytes(key[:8], "big") < self.heldout * 2**64 else store.TRAIN

    def _add(self, text: str, part: str, side: str) -> None:
        if not text:
            self.counts["blank"] += 1
            return
        data = text.encode()
        self.sides[side].add(data, self.parts.setdefault(part, len(self.parts)))
        self._hash.update(data + b"\n")
        self.counts["bytes"] += len(data) + 1
        self.counts["words"] += len(text.split())
        self.counts["documents"] += 1

    def _check(self, source: str) -> None:
        n = self.counts["documents"]
        if not n:
            raise UserError(f"{source}: no text here ({self.counts['blank']} blank documents)")
        if not all(side.ends for side in self.sides.values()):
            some = f"{n} documents are" if n > 1 else "1 document is"
            raise UserError(f"{source}: {some} too few to hold out {self.heldout:g}; set heldout: 0 or give more text")


class Side:
    """The texts of one side, end to end in one file; `store.Texts` reads them."""

    def __init__(self, directory: Path, name: str):
        self.directory, self.name = directory, name
        self.ends, self.parts = array("Q"), array("I")
        self._file = (directory / f"{name}.texts").open("wb")

    def add(self, data: bytes, part: int) -> None:
        self._file.write(data)
        self.ends.append(self._file.tell())
        self.parts.append(part)

    def close(self) -> None:
        self._file.close()
        store.write_array(self.directory / f"{self.name}.ends.npy", np.array(self.ends, dtype=np.uint64))
        store.write_array(self.directory / f"{self.name}.parts.npy", np.array(self.parts, dtype=np.uint32))
