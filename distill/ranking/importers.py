"""Teacher scores that others have published, into a store. No torch.

Read are the score files of neural-ranking-kd (Hofstätter et al. 2020, arXiv 2010.02666) by id or with texts, the
score dictionaries of sentence-transformers, and lines of JSON or parquet (`rows`). Ids need their collection, for a
score is kept by texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distill import scores
from distill.ranking import rows, stores
from distill.ranking.collection import ALLOWED, Collection, Missing
from distill.ranking.groups import Groups
from distill.scores import Reader, Writer, pair_keys
from growth import files
from growth.console import say
from growth.errors import UserError

BLOCK = 1 << 14  # rows


@dataclass
class Imported:
    """What was found in a file."""

    pairs: int = 0
    scored: int = 0  # how often a pair stood there with a score
    differing: int = 0  # of these with another score than the first one, which is kept
    largest: float = 0.0  # such difference
    missing: Missing = field(default_factory=Missing)

    def __str__(self) -> str:
        again = f"{self.differing} stand again with another score (by up to {self.largest:.3g}; the first is kept)"
        return f"{self.pairs} pairs from {self.scored} scores; {again}; {self.missing}"


def store(
    file: str | Path,
    out: str | Path,
    *,
    teacher: str,
    collection: Collection | None = None,
    activation: str = "none",
    allowed: float = ALLOWED,
) -> Imported:
    """Import a file; `teacher`: whose scores these are, `activation`: what its logits went through.

    A run that was stopped goes on when it is called again. With a collection the columns of a tab-separated file are
    ids, without one texts.
    """
    file, found = Path(file), Imported()
    about = stores.about([_producer(file, teacher, activation)], stores.LOGIT if activation == "none" else activation)
    with Writer(out, about, seconds=math.inf) as writer:
        for keys, values in _blocks(file, collection, found.missing):
            writer.add(keys, {stores.SCORE: values})
        found.missing.refuse_many(file, allowed)  # before the last shard is written
    scores.seal(out)
    _compare(Reader(out), _blocks(file, collection, Missing()), found)
    return found


def bring(
    file: Path, out: Path, collection: Collection, groups: Groups | None, *, allowed: float, **whose: str
) -> dict[str, Any]:
    """A file of either form into the store in `out`; what stage.json says of it."""
    named = of_ids(file, collection)
    found = store(file, out, collection=collection if named else None, allowed=allowed, **whose)
    say(str(found))
    told = asdict(found) | {"missing": {"rows": found.missing.rows, "lost": found.missing.lost}}
    return told | ({"margins": stores.told(out, collection, groups, out.parent.name)} if groups else {})


def of_ids(file: Path, collection: Collection) -> bool:
    """Whether a file names what it scores by id, by its first row: a column that no key names may hold either."""
    first = next(iter(rows.read(file, ids=True)), None)
    if first is None:
        raise UserError(f"{file} is empty; expected {rows.FORMS} columns, or {rows.RECORD}")
    if not first.ids or first.query in collection.queries:
        return first.ids
    return all(name.isdecimal() for name in (first.query, *first.documents))


def _producer(file: Path, teacher: str, activation: str) -> dict:
    unknown = dict.fromkeys(("model_digest", "tokenizer_digest", "lengths"))
    return {"teacher": teacher, "file": files.sha256(file), **unknown, "dtype": "float32", "activation": activation}


def _compare(reader: Reader, blocks: Iterator[tuple[np.ndarray, np.ndarray]], found: Imported) -> None:
    found.pairs = len(reader)
    for keys, values in blocks:
        off = np.abs(reader.rows(keys, [stores.SCORE])[stores.SCORE] - values)
        found.scored += len(off)
        found.differing += int((off > 0).sum())
        found.largest = max(found.largest, float(off.max(initial=0)))


def _blocks(file: Path, collection: Collection | None, missing: Missing) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys [n, 16] and scores [n] of some rows at a time."""
    found = rows.read(file, ids=collection is not None)
    while some := list(islice(found, BLOCK)):
        scored = [pair for row in some for pair in _pairs(row, collection, missing)]
        yield pair_keys(pair for pair, _ in scored), np.array([score for _, score in scored], dtype=np.float32)


def _pairs(row: rows.Row, collection: Collection | None, missing: Missing) -> list[tuple[tuple[str, str], float]]:
    if row.scores is None:
        raise UserError(f"{row.where}: no scores here; expected {rows.FORMS} columns, or {rows.RECORD}")
    if row.ids != (collection is not None):
        what = "ids; give the collection they are of" if row.ids else "texts; give no collection"
        raise UserError(f"{row.where}: {what}")
    if collection is None:
        named = [(row.query, document) for document in row.documents]
    elif missing.row(collection, row.query, *row.documents):
        named = [collection.pair(row.query, document) for document in row.documents]
    else:
        return []
    return list(zip(named, row.scores, strict=True))
