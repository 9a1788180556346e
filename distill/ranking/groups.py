"""What is trained on: a query, a document that answers it, and some that do not. No torch.

Forty million triples of MS MARCO are held as four arrays of numbers and the ids they stand for.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill.ranking import rows, texts
from distill.ranking.collection import ALLOWED, Collection, Missing
from growth import files
from growth.errors import UserError

MANIFEST, ARRAYS, NAMES = "manifest.json", ("query", "positive", "negative", "ends"), ("query_ids", "document_ids")


class Group(NamedTuple):
    query: str
    positive: str
    negatives: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Groups:
    """Places in the lists of ids; the negatives of group g end at `ends[g]`."""

    query_ids: list[str]
    document_ids: list[str]
    query: np.ndarray  # [N] int32
    positive: np.ndarray  # [N] int32
    negative: np.ndarray  # [M] int32
    ends: np.ndarray  # [N] int64

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, g: int) -> Group:
        if not 0 <= g < len(self):
            raise IndexError(f"group {g} of {len(self)}")
        negatives = self.negative[self.ends[g] - self.counts[g] : self.ends[g]]
        named = tuple(self.document_ids[n] for n in negatives)
        return Group(self.query_ids[self.query[g]], self.document_ids[self.positive[g]], named)

    def __iter__(self) -> Iterator[Group]:
        return (self[g] for g in range(len(self)))

    @cached_property
    def counts(self) -> np.ndarray:
        """Negatives of each group [N]."""
        return np.diff(self.ends, prepend=0)

    @cached_property
    def owner(self) -> np.ndarray:
        """The group of each negative [M]."""
        return np.repeat(np.arange(len(self)), self.counts)

    @cached_property
    def digest(self) -> str:
        named = [self.query_ids, self.document_ids]
        return files.digest([named, [_sha256(getattr(self, name)) for name in ARRAYS]])

    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Each pair once, as a number [U], and where those of all positives and negatives stand there [N + M]."""
        queries = np.concatenate([self.query, self.query[self.owner]]).astype(np.int64)
        every = queries * len(self.document_ids) + np.concatenate([self.positive, self.negative])
        return np.unique(every, return_inverse=True)

    def named(self, codes: np.ndarray) -> Iterator[tuple[str, str]]:
        """(query, document) of such numbers."""
        both = (divmod(code, len(self.document_ids)) for code in codes.tolist())
        return ((self.query_ids[query], self.document_ids[document]) for query, document in both)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """(query, document), each once: what a teacher is asked for, however often it stands in groups."""
        return self.named(self.codes()[0])

    def only(self, kept: np.ndarray) -> Groups:
        """With these of the negatives [M] bool; a group that keeps none is left out."""
        counts = np.bincount(self.owner[kept], minlength=len(self))
        some, kept_ends = counts > 0, np.cumsum(counts[counts > 0])
        return replace(self, query=self.query[some], positive=self.positive[some], negative=self.negative[kept],
                       ends=kept_ends)  # fmt: skip

    def first(self, count: int) -> Groups:
        """At most so many negatives a group, the first ones: of mined groups the hardest."""
        place = np.arange(len(self.negative)) - (self.ends - self.counts)[self.owner]
        return self.only(place < count)

    def drawn(self, count: int, seed: int) -> Groups:
        """At most so many negatives a group, drawn evenly, in the order in which they stood."""
        drawn = np.random.default_rng(seed).random(len(self.negative))
        order = np.lexsort((drawn, self.owner))
        kept = np.zeros(len(order), dtype=bool)
        kept[order] = np.arange(len(order)) - (self.ends - self.counts)[self.owner] < count
        return self.only(kept)


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(f"{values.dtype}{values.shape}".encode() + values.tobytes()).hexdigest()


class Gathered:
    """Groups that come one after the other."""

    def __init__(self):
        self.queries: dict[str, int] = {}
        self.documents: dict[str, int] = {}
        self.query, self.positive, self.negative, self.ends = array("i"), array("i"), array("i"), array("q")

    def add(self, group: Group) -> None:
        self.query.append(self.queries.setdefault(group.query, len(self.queries)))
        self.positive.append(self._document(group.positive))
        self.negative.extend(map(self._document, group.negatives))
        self.ends.append(len(self.negative))

    def _document(self, name: str) -> int:
        return self.documents.setdefault(name, len(self.documents))

    def done(self) -> Groups:
        return Groups(list(self.queries), list(self.documents), *(np.asarray(getattr(self, name)) for name in ARRAYS))


def gather(found: Iterable[Group]) -> Groups:
    gathered = Gathered()
    for group in found:
        gathered.add(group)
    return gathered.done()


def read(
    path: str | Path, collection: Collection | None = None, allowed: float = ALLOWED, *, store: Path | None = None
) -> tuple[Collection, Groups, Missing]:
    """The groups of a file of triples, scored or not, and the collection they are of: the one given, or their texts.

    Rows that name what the collection lacks are left out and counted. `store`: where texts are kept that are too many
    for memory.
    """
    found = Missing()
    if collection is not None:
        groups = gather(_named(rows.read(path, ids=True), collection, found))
        found.refuse_many(path, allowed)
    else:
        collection, groups = _of_texts(rows.read(path, ids=False), store)
    return collection, groups, found


def _named(found: Iterable[rows.Row], collection: Collection, missing: Missing) -> Iterator[Group]:
    for row in found:
        group = _group(row)
        if not row.ids:
            raise UserError(f"{row.where}: texts, not ids; give no collection, and they are one of their own")
        if missing.row(collection, row.query, *row.documents):
            yield group


def _group(row: rows.Row) -> Group:
    if not row.positive or len(row.documents) < 2:
        raise UserError(f"{row.where}: expected a positive and at least one negative document")
    return Group(row.query, row.documents[0], row.documents[1:])


def _of_texts(found: Iterable[rows.Row], store: Path | None) -> tuple[Collection, Groups]:
    """A text is known by its digest, so that one that stands often is kept once."""
    queries: dict[str, str] = {}
    judged: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    gathered = Gathered()

    def documents() -> Iterator[tuple[str, str, str]]:
        for row in found:
            if row.ids:
                raise UserError(f"{row.where}: ids, not texts; give the collection they are of")
            group = _group(row)
            query, (positive, *negatives) = name_of(group.query), map(name_of, row.documents)
            queries[query] = group.query
            judged.setdefault(query, {})[positive] = 1
            gathered.add(Group(query, positive, tuple(negatives)))
            new = dict(zip((positive, *negatives), row.documents, strict=True))
            yield from ((row.where, name, text) for name, text in new.items() if name not in seen)
            seen.update(new)

    kept = texts.once(documents()) if store is None else texts.store(store, None, documents())
    return Collection(queries, kept, judged), gathered.done()


def name_of(text: str) -> str:
    """The id of a text that has none: its content."""
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def save(path: str | Path, groups: Groups, about: Mapping) -> None:
    """A directory; `about`: what they were made of."""
    with files.committed(path) as temporary:
        for name in ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(groups, name))
        for name in NAMES:
            lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in getattr(groups, name))
            files.write_bytes(temporary / f"{name}.jsonl", (line.encode() for line in lines))
        counts = {"groups": len(groups), "negatives": len(groups.negative)}
        files.write_json(temporary / MANIFEST, {"about": about, **counts, "digest": groups.digest})


def load(path: str | Path) -> Groups:
    """Verified: what is read is what was written."""
    path = Path(path)
    manifest = files.read_json(path / MANIFEST)
    named = [[json.loads(line) for _, line in texts.numbered(path / f"{name}.jsonl")] for name in NAMES]
    found = Groups(*named, *(np.load(path / f"{name}.npy", allow_pickle=False) for name in ARRAYS))
    if found.digest != manifest["digest"]:
        raise UserError(f"{path} is damaged; remove it, and it is made again")
    return found
