"""The run of an opened ranker: the candidates of every query in its order."""

from __future__ import annotations

from distill.ranking.collection import Collection
from distill.ranking.opening import PAIRS, Opened
from distill.ranking.trec import Run
from growth.console import bar
from growth.errors import UserError


def in_order(found: Opened, collection: Collection, candidates: Run, who: str) -> Run:
    """Candidates with the scores of a ranker; `who`: what the user calls it.

    Pairs are scored in the order of their documents, the shortest first: a document is read once for all its queries.
    """
    pairs = [(query, name) for query, run in candidates.items() for name in run]
    sizes = {name: len(collection.documents[name]) for _, name in pairs}
    pairs.sort(key=lambda pair: (sizes[pair[1]], pair[1]))
    run: dict[str, dict[str, float]] = {query: {} for query in candidates}
    with bar(len(pairs), f"{who} scores pairs") as advance:
        for start in range(0, len(pairs), PAIRS):
            some = pairs[start : start + PAIRS]
            scores = found.scores([collection.pair(*pair) for pair in some])
            if not bool(scores.isfinite().all()):
                raise UserError(f"{who}: a score is NaN or infinite; is it sound, and its dtype wide enough?")
            for (query, name), score in zip(some, scores.tolist(), strict=True):
                run[query][name] = score
            advance(len(some))
    return run
