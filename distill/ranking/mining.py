"""Documents that look like an answer and are none: negatives worth training on. No torch.

Candidates come from a run (`search`: BM25, or a model's vectors); what is known to answer a query, or has the same
text, is never among its negatives. Answers that nobody has labelled are common at the top of a ranking (Qu et al.
2020, arXiv 2010.08191): a teacher's scores take them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.ranking import groups, stores
from distill.ranking.collection import Collection
from distill.ranking.groups import Group, Groups
from distill.ranking.trec import Run, ranked
from distill.scores import Reader
from growth import files
from growth.console import say
from growth.errors import UsageError, UserError

Search = Callable[[Mapping[str, str], Mapping[str, str], int], Run]  # documents, queries, how many of each
VERSION = 1  # of the rules below: another number means mine again


def candidates(collection: Collection, run: Run, *, depth: int = 100, skip: int = 0, at_least: int = 1) -> Groups:
    """A group for each query of the run and each document that answers it, with every other one that was found.

    From the best down to `depth`, without the `skip` best; `at_least`: the grade of a positive. A document of a lower
    grade above 0 is neither positive nor negative.
    """
    if not 0 <= skip < depth:
        raise UsageError(f"depth {depth} and skip {skip}: nothing is left between them")
    mined = groups.gather(_mined(collection, run, depth, skip, at_least))
    if not len(mined):
        raise UserError(f"none of {len(run)} queries has both an answer in the collection and another document found")
    return mined


def _mined(collection: Collection, run: Run, depth: int, skip: int, at_least: int) -> Iterator[Group]:
    for query, scores in run.items():
        answers = [name for name in collection.positives(query) if name in collection.documents]
        texts = {collection.documents[name] for name in answers}
        found = [name for name in ranked(scores)[:depth][skip:] if collection.documents[name] not in texts]
        for positive in collection.positives(query, at_least):
            if found and positive in collection.documents:
                yield Group(query, positive, tuple(found))


@dataclass(frozen=True)
class FalseNegatives:
    """When a negative is too good to be one: `margin` below its positive it must score, or at most `share` of it."""

    margin: float | None = None
    share: float | None = None

    def __post_init__(self):
        if (self.margin is None) == (self.share is None):
            raise UsageError("a false negative is told either by `margin` or by `share`; give one of them")
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"share {self.share}: expected above 0 and at most 1")

    def __call__(self, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
        """Whether the negatives, each beside its positive, are true ones [M] bool."""
        if self.margin is not None:
            return negative <= positive - self.margin
        if (below := int((positive <= 0).sum())) > 0:
            raise UserError(f"{below} positives score 0 or less, and a share of that is no bound; give a margin")
        return negative <= self.share * positive


@dataclass(frozen=True)
class Filtered:
    groups: Groups
    dropped: int  # negatives
    emptied: int  # groups of which none was left


def filtered(found: Groups, collection: Collection, reader: Reader, told: FalseNegatives) -> Filtered:
    """Without the false negatives, by the scores of a teacher, which must have all of these pairs."""
    positive, negative = stores.of_groups(reader, collection, found)
    if lacking := int(np.isnan(positive).sum() + np.isnan(negative).sum()):
        raise UserError(f"{reader.path} lacks the scores of {lacking} places in the groups; score their pairs first")
    true = told(positive[found.owner], negative)
    kept = found.only(true)
    return Filtered(kept, int((~true).sum()), len(found) - len(kept))


def cached(directory: str | Path, about: Mapping, make: Callable[[], Groups]) -> Groups:
    """What `make` makes, or made before of the same: `about` holds the digests and settings that it depends on."""
    about = {"version": VERSION, **about}
    path = Path(directory) / files.digest(about)[:16]
    if not path.exists():
        groups.save(path, make(), about)
    return groups.load(path)


def by_words(
    collection: Collection, directory: str | Path, *, depth: int = 100, skip: int = 0, at_least: int = 1
) -> Groups:
    """Candidates by BM25, kept in `directory` under the digest of the collection and of these settings."""
    from distill.ranking import search

    settings = {"depth": depth, "skip": skip, "at_least": at_least}
    about = {"by": "bm25", "k1": search.K1, "b": search.B, "collection": collection.digest, **settings}
    return cached(directory, about, lambda: _searched(collection, search.by_words, settings))


def mine(collection: Collection, out: Path, find: Search, *, by: str, **settings: int) -> dict[str, Any]:
    """The groups in `out` of what a search finds; what stage.json says of them."""
    found = _searched(collection, find, settings)
    groups.save(out, found, {"version": VERSION, "by": by, "collection": collection.digest, **settings})
    without = len(collection.judgements) - len(set(found.query.tolist()))
    say(
        f"{len(found)} groups with {len(found.negative)} negatives, {len(found.negative) / len(found):.1f} each"
        + (f"; {without} judged queries have none" if without else "")
    )
    return {"groups": len(found), "negatives": len(found.negative), "queries_without": without}


def _searched(collection: Collection, find: Search, settings: Mapping[str, int]) -> Groups:
    asked = {query: collection.queries[query] for query in collection.judgements if query in collection.queries}
    # the answers themselves, and texts equal to them, come out of these again
    return candidates(collection, find(collection.documents, asked, settings["depth"]), **settings)


def drop(collection: Collection, found: Groups, reader: Reader, told: FalseNegatives, out: Path) -> dict[str, Any]:
    """The groups in `out` without false negatives; what stage.json says of them."""
    kept = filtered(found, collection, reader, told)
    if not len(kept.groups):
        raise UserError(f"all {kept.dropped} negatives are false ones by {reader.path}; ask for a smaller margin")
    groups.save(out, kept.groups, {"version": VERSION, "of": found.digest, "told": asdict(told)})
    share = kept.dropped / max(len(found.negative), 1)
    say(f"{kept.dropped} of {len(found.negative)} negatives dropped ({share:.1%}), {kept.emptied} groups emptied")
    return {
        "groups": len(kept.groups),
        "negatives": len(kept.groups.negative),
        "dropped": kept.dropped,
        "emptied": kept.emptied,
    }
