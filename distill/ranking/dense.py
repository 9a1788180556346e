"""Search by the vectors of a ranker that makes one of each text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from distill.ranking import search
from distill.ranking.dual import DualEncoder
from distill.ranking.opening import Opened
from distill.ranking.trec import Run
from growth import console, files
from growth.errors import UserError

TEXTS = 4096  # in memory at once


def run(ranker: Opened, documents: Mapping[str, str], queries: Mapping[str, str], depth: int, scratch: Path) -> Run:
    """The `depth` documents of each query with the largest scores; `scratch`: where vectors lie until then."""
    if not isinstance(ranker.ranker, DualEncoder):
        raise UserError(f"a {type(ranker.ranker).__name__} makes no vector of a text, so it cannot search")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    try:
        asked = np.concatenate([part for _, part in vectors(queries, ranker.query_vectors, "queries")])
        said = _written(scratch / "vectors.npy", documents, ranker, asked.shape[1])
        device = str(ranker.ranker.encoder.device)
        return search.dense(asked, said, list(queries), list(documents), depth, device=device)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def vectors(texts: Mapping[str, str], encode, label: str) -> Iterator[tuple[int, np.ndarray]]:
    """(place of the first, [n, k]) of some texts at a time."""
    rows, began, done = iter(texts.values()), time.perf_counter(), 0
    with console.bar(len(texts), label) as advance:
        while some := list(islice(rows, TEXTS)):
            yield done, encode(some).numpy()
            done += len(some)
            advance(len(some), note=f"{done / (time.perf_counter() - began):.0f} texts/s")


def _written(path: Path, documents: Mapping[str, str], ranker: Opened, width: int) -> np.ndarray:
    shape = len(documents), width
    files.ensure_space(path.parent, 4 * len(documents) * width, "the vectors")
    found = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for start, part in vectors(documents, ranker.passage_vectors, "documents"):
        found[start : start + len(part)] = part
    return found
