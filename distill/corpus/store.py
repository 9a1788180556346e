"""A prepared corpus on disk: rows of token ids that are read where they lie, and the texts they came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from distill.corpus import tokens
from growth import files
from growth.errors import UserError

VERSION = 3  # of the files and of the rules by which they are made: another number means prepare again
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
TRAIN, HELDOUT = SIDES = ("train", "heldout")
COLUMNS = ("ids", "segments")  # one array each in a shard
UNKNOWN = -1  # the class of a row of which none is known


class Corpus:
    """One side of a prepared corpus. A row is the sample; which documents share it was settled at preparation."""

    def __init__(self, path: Path, side: str, manifest: dict):
        self.path, self.side, self.manifest = path, side, manifest
        self.facts = tokens.Facts(**manifest["tokenizer"])
        self.length: int = manifest["length"]
        self.digest: str = manifest["sides"][side]["digest"]
        self.tokens: int = manifest["sides"][side]["tokens"]
        self.classes: list[str] | None = manifest["classes"]
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

    def block(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Several rows: ids and segments [n, T]."""
        return tuple(np.stack(column) for column in zip(*(self.row(i) for i in rows), strict=True))

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of every row, by its place in `classes` [rows]; UNKNOWN where there is none."""
        if self.classes is None:
            return np.full(len(self), UNKNOWN, dtype=np.int32)
        return np.load(self.path / labels_name(self.side), mmap_mode="r")

    @cached_property
    def texts(self) -> Texts:
        return Texts(self.path, self.side)

    @cached_property
    def spans(self) -> Spans:
        return Spans(self.path, self.side)

    def pieces(self, i: int) -> list[str]:
        """The text of each document of a row, as far as it stands in it."""
        return [self.texts.slice(*map(int, span)) for span in self.spans[i]]

    def documents(self, limit: int | None = None) -> list[tuple[str, str]]:
        """(text, part of the source); with a limit, that many from all over the corpus."""
        texts, parts = self.texts, self.manifest["parts"]
        n = len(texts)
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
        return self.slice(i, 0, self.size(i))

    def slice(self, i: int, start: int, end: int) -> str:
        """Some bytes of a document."""
        first = int(self.ends[i - 1]) if i else 0
        return self._bytes[first + start : first + end].tobytes().decode()

    def size(self, i: int) -> int:
        """Bytes of a document."""
        return int(self.ends[i]) - (int(self.ends[i - 1]) if i else 0)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Spans:
    """Which text every row stands for: (document, first byte, end) [n, 3] of each of its n pieces, segment 1 first."""

    def __init__(self, path: Path, side: str):
        self.all, self.ends = (np.load(path / f"{side}.{name}.npy", mmap_mode="r") for name in ("spans", "spans.ends"))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.all[int(self.ends[row - 1]) if row else 0 : int(self.ends[row])]

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The spans of several rows end to end, and the place in `rows` that each is of."""
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)[rows]
        counts = self.ends[rows].astype(np.int64) - starts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.all[np.repeat(starts, counts) + within], np.repeat(np.arange(len(rows)), counts)


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
    manifest = files.read_json(Path(path) / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UserError(f"{path} was not prepared by this version; prepare the corpus again")
    return manifest


def write_array(path: Path, values: np.ndarray) -> None:
    """As np.save, by a plain write: numpy's own does not say that it was the disk that is full."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(np.ascontiguousarray(values).data)


def write_shard(directory: Path, side: str, number: int, *columns: np.ndarray) -> None:
    """ids and segments [rows, T] each."""
    for what, values in zip(COLUMNS, columns, strict=True):
        write_array(directory / shard_name(side, number, what), values)


def labels_name(side: str) -> str:
    """The file of the classes of a side's rows; its name makes it count in the digest of the side."""
    return f"{side}-classes.npy"


def shard_name(side: str, number: int, what: str) -> str:
    return f"{side}-{number:05d}.{what}.npy"
