"""What a model said about rows of tokens or pairs of texts, on disk, found by the content that was read. No torch.

A store is a directory of shards that are only ever added. A shard carries its own sha256 in its name and appears
whole, so ranks write at once without a lock, and a kill at any moment loses no more than the shard that was not yet
written. `manifest.json` says what the values mean, whose they are and of which corpus; `seal` adds the list of shards,
from when on none may be missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.scores import shards
from distill.scores.keys import Index, Known
from distill.scores.shards import Column, Ragged
from growth import files
from growth.errors import UserError

VERSION, MANIFEST = 1, "manifest.json"
SHARD_BYTES, SHARD_SECONDS = 64 << 20, 60.0  # a shard is written when it has so much, or is so old


@dataclass(frozen=True)
class About:
    """What a store holds, from whom and of which corpus: another one is another store."""

    kind: str
    columns: Mapping[str, Column]
    producers: list[dict] = field(default_factory=list)  # model_digest, tokenizer_digest, lengths, dtype, activation
    corpus_digest: str | None = None

    def plain(self) -> dict[str, Any]:
        return {"version": VERSION, **json.loads(json.dumps(asdict(self)))}

    def refuse_other(self, path: Path) -> None:
        """The store at `path` must be this one: whatever differs is named."""
        there, here = _read(path)[0].plain(), self.plain()
        other = [f"{key} is {there[key]}, not {here[key]}" for key in here if there[key] != here[key]]
        if other:
            raise UserError(f"{path} holds other scores: {'; '.join(other)}; remove it or give another directory")


def _read(path: Path) -> tuple[About, dict]:
    manifest = files.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UserError(f"{path} was not written by this version; score again")
    columns = {name: Column(**{**c, "shape": tuple(c["shape"])}) for name, c in manifest["columns"].items()}
    return About(manifest["kind"], columns, manifest["producers"], manifest["corpus_digest"]), manifest


def forecast(columns: Mapping[str, Column], rows: int, length: float | Mapping[str, float] = 1.0) -> int:
    """Bytes that so many rows will take; `length`: how many values a row has in a ragged column (or in each), mean."""
    long = length if isinstance(length, Mapping) else dict.fromkeys(columns, length)
    each = (c.nbytes * long[name] + 8 if c.ragged else c.nbytes for name, c in columns.items())
    return round(rows * (16 + sum(each)))


class Writer:
    """Adds rows to a store, each key once; a context, so that the last shard is written as well.

    Another run goes on where the first one stopped: `missing` says which rows are still to be scored. With `seconds`
    infinite, what a shard holds depends on the rows alone.
    """

    def __init__(self, path: str | Path, about: About, rank: int = 0, *, seconds: float = SHARD_SECONDS):
        self.path, self.about, self.rank, self.seconds = Path(path), about, rank, seconds
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / MANIFEST).exists():
            files.write_json(self.path / MANIFEST, about.plain())
        about.refuse_other(self.path)
        shards.sweep(self.path, rank)
        self._there = Known()  # in shards of any rank
        for shard in shards.found(self.path, about.columns):
            self._there.add(shard.keys)
        self._begin()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, failure, *_) -> None:
        if failure is None:
            self.flush()

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Which of these no shard of any rank has and were not added here [N] bool."""
        held = [key.tobytes() in self._keys for key in keys] if self._keys else np.zeros(len(keys))
        return ~(self._there.has(keys) | np.array(held, dtype=bool))

    def add(self, keys: np.ndarray, values: Mapping[str, Any]) -> None:
        """Rows that are there already are left out. Values are arrays or tensors [N, ...], or `Ragged` ones."""
        if values.keys() != self.about.columns.keys():
            raise ValueError(f"columns {sorted(values)}; the store has {sorted(self.about.columns)}")
        rows = {n: _rows(n, column, values[n], len(keys)) for n, column in self.about.columns.items()}
        for i in np.flatnonzero(self.missing(keys)):
            if (key := keys[i].tobytes()) not in self._keys:  # twice in this very batch
                self._keep(key, {name: column[i] for name, column in rows.items()})
        if self._held >= SHARD_BYTES or time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard as a new one."""
        if self._keys:
            keys = np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 16)
            shards.write(self.path, self.rank, keys, self._rows, self.about.columns)
            self._there.add(keys)
        self._begin()

    def _keep(self, key: bytes, row: dict[str, np.ndarray]) -> None:
        self._keys[key] = None
        for name, value in row.items():
            self._rows[name].append(value)
            self._held += value.nbytes

    def _begin(self) -> None:
        self._keys: dict[bytes, None] = {}  # of the shard to come, in order
        self._rows: dict[str, list] = {name: [] for name in self.about.columns}
        self._held, self._since = 0, time.monotonic()


def _rows(name: str, column: Column, given: Any, n: int) -> list | np.ndarray:
    """One array for each row, of the column's dtype and shape and finite."""
    values, lengths = given if isinstance(given, Ragged) else (given, None)
    values, ragged = _array(values), lengths is not None
    if (ragged, values.dtype, values.shape[1:]) != (column.ragged, column.numpy, column.shape):
        raise ValueError(f"column {name} is {column}, found {values.dtype} {values.shape}, ragged: {ragged}")
    if not _finite(values, column):
        raise UserError(f"column {name}: a score is NaN or infinite; is the model sound, and its dtype wide enough?")
    rows = Ragged(values, lengths).split() if ragged else values
    if len(rows) != n or sum(map(len, rows) if ragged else [len(rows)]) != len(values):
        raise ValueError(f"column {name} has {len(rows)} rows and {len(values)} values for {n} keys")
    return rows


def _array(values: Any) -> np.ndarray:
    """A tensor as an array; numpy sees bfloat16 by its bits."""
    if isinstance(values, np.ndarray):
        return values
    import torch

    values = values.detach().cpu()
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()


def _finite(values: np.ndarray, column: Column) -> bool:
    if column.dtype == "bfloat16":
        return bool(((values & 0x7F80) != 0x7F80).all())  # an exponent of ones is infinite or NaN
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def seal(path: str | Path) -> None:
    """Nothing is missing: list the shards of all ranks in the manifest. Once, when every writer has ended."""
    path = Path(path)
    for left in path.glob(f"{MANIFEST}.tmp-*"):  # of a run that was killed
        left.unlink()
    about, _ = _read(path)
    listed = {
        s.path.name: {"rows": len(s), "sha256": shards.NAME.fullmatch(s.path.name)[1]}
        for s in shards.found(path, about.columns)
    }
    rows = sum(shard["rows"] for shard in listed.values())
    files.write_json(path / MANIFEST, {**about.plain(), "rows": rows, "shards": listed})


class Reader:
    """Rows by their keys, in any order, from files that are read where they lie."""

    def __init__(self, path: str | Path, expected: About | None = None, *, verify: bool = True):
        """`verify` reads every byte once; a rank may leave that to another one."""
        self.path = Path(path)
        self.about, manifest = _read(self.path)
        if expected is not None:
            expected.refuse_other(self.path)
        self._shards = list(shards.found(self.path, self.about.columns, verify=verify))
        lost = manifest.get("shards", {}).keys() - {shard.path.name for shard in self._shards}
        if lost:
            raise UserError(f"{self.path} lacks {len(lost)} of its shards, first {min(lost)}; score again")
        every = np.concatenate([np.empty((0, 16), np.uint8), *(shard.keys for shard in self._shards)])
        self._index, self._starts = Index(every), np.cumsum([0, *map(len, self._shards)])
        self.keys = every[self._index.find(every) == np.arange(len(every))]  # each once [N, 16]

    def __len__(self) -> int:
        return len(self.keys)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """[N] bool."""
        return self._index.find(keys) < 0

    def rows(self, keys: np.ndarray, names: Iterable[str] | None = None) -> dict[str, np.ndarray | Ragged]:
        """{column: values of these rows}, `Ragged` where the column is."""
        place = self._index.find(keys)
        if (place < 0).any():
            raise UserError(
                f"{self.path} lacks {(place < 0).sum()} of {len(keys)} rows; score them with the same corpus, "
                "tokeniser and row length"
            )
        number = np.searchsorted(self._starts, place, side="right") - 1
        return {n: self._gathered(n, number, place - self._starts[number]) for n in names or self.about.columns}

    def tensors(self, keys: np.ndarray, names: Iterable[str] | None = None) -> dict[str, Any]:
        """As `rows`, in tensors."""
        found = self.rows(keys, names)
        return {name: _tensors(values, self.about.columns[name]) for name, values in found.items()}

    def _gathered(self, name: str, number: np.ndarray, row: np.ndarray) -> np.ndarray | Ragged:
        """`row` of shard `number`, one after another."""
        column = self.about.columns[name]
        empty = np.empty((len(row), *column.shape), column.numpy)
        if column.ragged:
            rows = [self._shards[n].ragged(name, r) for n, r in zip(number, row, strict=True)]
            return Ragged(np.concatenate([empty[:0], *rows]), np.array([len(one) for one in rows], dtype=np.int64))
        for n in np.unique(number):
            empty[number == n] = self._shards[n].fixed(name, row[number == n])
        return empty


def _tensors(values: np.ndarray | Ragged, column: Column) -> Any:
    import torch

    if isinstance(values, Ragged):
        return Ragged(_tensors(values.values, column), torch.from_numpy(values.lengths))
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if column.dtype == "bfloat16" else tensor
