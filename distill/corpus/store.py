"""A prepared corpus on disk: rows of token ids that are read where they lie, and the texts they came from."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from distill.corpus import tokens
from growth import files
from growth.errors import UserError

VERSION = 2  # of the files and of the rules by which they are made: another number means prepare again
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
TRAIN, HELDOUT = SIDES = ("train", "heldout")
COLUMNS = ("ids", "segments")  # one array each in a shard


class Corpus:
    """One side of a prepared corpus. A row is the sample; which documents share it was settled at preparation."""

    def __init__(self, path: Path, side: str, manifest: dict):
        self.path, self.side, self.manifest = path, side, manifest
        self.facts = tokens.Facts(**manifest["tokenizer"])
        self.length: int = manifest["length"]
        self.digest: str = manifest["sides"][side]["digest"]
        self.tokens: int = manifest["sides"][side]["tokens"]
        self._rows: int = manifest["rows"][side]
        self._shard: int = manifest["rows_per_shard"]

    def __len__(self) -> int:
        return self._rows

    @cached_property
    def tokenizer(self):
        return tokens.load(self.path / TOKENIZER)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [T] and segments [T]: 0 is padding, 1, 2, ... are the documents of the row."""
        if not 0 <= i < self._rows:
            raise IndexError(f"row {i} of {self._rows}")
        shard, place = divmod(i, self._shard)
        ids, segments = self._shards[shard]
        return ids[place].astype(np.int64), segments[place].astype(np.int64)

    def documents(self, limit: int | None = None) -> list[tuple[str, str]]:
        """(text, part of the source); with a limit, that many from all over the corpus."""
        texts = Texts(self.path, self.side)
        parts, n = self.manifest["parts"], len(texts)
        kept = n if limit is None else min(limit, n)
        chosen = (i * n // kept for i in range(kept))
        return [(texts[i], parts[texts.parts[i]]) for i in chosen]

    def verify(self) -> None:
        """Every file is what was written."""
        for name, about in self.manifest["files"].items():
            if files.sha256(self.path / name) != about["sha256"]:
                raise UserError(f"{self.path / name} has changed since it was written; prepare the corpus again")

    @cached_property
    def _shards(self) -> list[tuple[np.ndarray, np.ndarray]]:
        count = -(-self._rows // self._shard)
        names = [[shard_name(self.side, i, what) for what in COLUMNS] for i in range(count)]
        return [tuple(np.load(self.path / name, mmap_mode="r", allow_pickle=False) for name in pair) for pair in names]


class Texts:
    """The documents of one side by number, read from the disk one at a time."""

    def __init__(self, path: Path, side: str):
        self.ends, self.parts = (np.load(path / f"{side}.{name}.npy", mmap_mode="r") for name in ("ends", "parts"))
        self._bytes = np.memmap(path / f"{side}.texts", dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self.ends):
            raise IndexError(i)
        start, end = int(self.ends[i - 1]) if i else 0, int(self.ends[i])
        return self._bytes[start:end].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def open(path: Path, part: str = TRAIN) -> Corpus:
    """A side of the corpus in a directory: `train` or `heldout`."""
    path = Path(path)
    manifest = read_manifest(path)
    if part not in manifest["sides"]:
        raise UserError(f"{path}: the corpus has no {part} part, only {', '.join(manifest['sides'])}; set `heldout`")
    for name, about in manifest["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != about["size"]:
            raise UserError(f"{path / name} is missing or not as long as it was; prepare the corpus again")
    return Corpus(path, part, manifest)


def read_manifest(path: Path) -> dict:
    manifest = files.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UserError(f"{path} was not prepared by this version; prepare the corpus again")
    return manifest


def write_array(path: Path, values: np.ndarray) -> None:
    """As np.save, by a plain write: numpy's own does not say that it was the disk that is full."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(np.ascontiguousarray(values).data)


def shard_name(side: str, number: int, what: str) -> str:
    return f"{side}-{number:05d}.{what}.npy"
