"""The run of an opened ranker over a collection: candidates in its order, or what it finds among all documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from distill.ranking import measures, search
from distill.ranking.collection import Collection
from distill.ranking.dual import DualEncoder
from distill.ranking.opening import Opened, Pair
from distill.ranking.trec import Run, ranked
from growth.console import bar
from growth.errors import UserError

TEXTS = 256  # read between two signs of life


def in_order(found: Opened, collection: Collection, candidates: Run, depth: int, who: str) -> Run:
    """The `depth` best candidates of each query, with the scores of a ranker; `who`: what the user calls it."""
    if isinstance(found.ranker, DualEncoder):
        return _by_vectors(found, collection, candidates, depth, who)
    with bar(sum(min(len(run), depth) for run in candidates.values()), f"{who} scores pairs") as advance:

        def score(pairs: Sequence[Pair]) -> np.ndarray:
            scores = [np.zeros(0, np.float32)]
            for start in range(0, len(pairs), TEXTS):
                scores.append(found.scores(pairs[start : start + TEXTS]).numpy())
                advance(len(scores[-1]))
            return np.concatenate(scores)

        return measures.reranked(candidates, collection, score, depth)


def _by_vectors(found: Opened, collection: Collection, candidates: Run, depth: int, who: str) -> Run:
    """The same scores where a text has one vector: each is read once for all queries."""
    listed = {query: ranked(run)[:depth] for query, run in candidates.items()}
    names = list(dict.fromkeys(name for some in listed.values() for name in some))
    place = {name: i for i, name in enumerate(names)}
    vectors = _of_documents(found, collection, names, lambda width: np.empty((len(names), width), np.float32), who)
    queries = found.query_vectors([collection.queries[query] for query in listed]).numpy()
    return {
        query: dict(zip(some, (vectors[[place[name] for name in some]] @ vector).tolist(), strict=True))
        for (query, some), vector in zip(listed.items(), queries, strict=True)
    }


def searched(
    found: Opened, collection: Collection, asked: Mapping[str, str], depth: int, scratch: Path, who: str
) -> Run:
    """The `depth` documents of each query with the largest dot products; all vectors lie in a file in `scratch`."""
    if not isinstance(found.ranker, DualEncoder):
        raise UserError(f"{who} reads a query and a passage together, so it cannot search all documents: only a "
                        "dual_encoder can")  # fmt: skip
    names = list(collection.documents)

    def on_disk(width: int) -> np.ndarray:
        return np.memmap(scratch / "vectors", np.float32, "w+", shape=(len(names), width))

    vectors = _of_documents(found, collection, names, on_disk, who)
    queries = found.query_vectors(list(asked.values()))
    device = str(found.ranker.encoder.device)
    return search.dense(queries, vectors, list(asked), names, depth, device=device)


def _of_documents(
    found: Opened, collection: Collection, names: Sequence[str], room: Callable[[int], np.ndarray], who: str
) -> np.ndarray:
    """Vectors [N, k], in the array that `room(k)` makes."""
    vectors = None
    with bar(len(names), f"{who} reads documents") as advance:
        for start in range(0, len(names), TEXTS):
            texts = [collection.documents[name] for name in names[start : start + TEXTS]]
            made = found.passage_vectors(texts).numpy()
            vectors = room(made.shape[1]) if vectors is None else vectors
            vectors[start : start + len(made)] = made
            advance(len(made))
    return room(0) if vectors is None else vectors
