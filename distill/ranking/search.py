"""What a query finds among all documents: by words (BM25) or by dot products. Exact, and the same every time.

Equal scores are ordered by document id, wherever the documents were cut into chunks. torch only while it searches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.ranking.trec import Run
from growth.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WORD = re.compile(r"\w+")
K1, B = 0.9, 0.4  # Anserini's, as most published baselines
CHUNK = 1 << 16  # documents
QUERIES = 256


class BM25:
    """An index of words: lower case, no stemming, no stop words (Lucene's variant, by bm25s).

    A word that stands twice in a query counts twice.
    """

    def __init__(self, documents: Mapping[str, str], k1: float = K1, b: float = B):
        self.ids, self.vocabulary = list(documents), {}
        words = [[self.vocabulary.setdefault(w, len(self.vocabulary)) for w in _words(t)] for t in documents.values()]
        if not self.vocabulary:
            raise UserError(f"{len(self.ids)} documents without a single word: there is nothing to search")
        self._index = _bm25s()(k1=k1, b=b, method="lucene", csc_backend="scipy")
        self._index.index((words, self.vocabulary), create_empty_token=False, show_progress=False)

    def run(self, queries: Mapping[str, str], k: int) -> Run:
        """The best k documents of each query, fewer where fewer share a word with it."""
        import torch

        order, found = Order(self.ids), {}
        for query, text in queries.items():
            words = [self.vocabulary[w] for w in _words(text) if w in self.vocabulary]
            scores = torch.from_numpy(self._index.get_scores_from_ids(words)) if words else torch.zeros(len(self.ids))
            found[query] = {name: score for name, score in order.best(scores[None], k)[0].items() if score > 0}
        return found


def by_words(documents: Mapping[str, str], queries: Mapping[str, str], k: int) -> Run:
    return BM25(documents).run(queries, k)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _bm25s():
    try:
        from bm25s import BM25
    except ImportError:
        raise UserError("BM25 needs the package bm25s: pip install 'distill-growth[ranking]'") from None
    return BM25


def dense(
    queries: Any, documents: Any, query_ids: Sequence[str], document_ids: Sequence[str], k: int, *,
    device: str = "cpu", chunk: int = CHUNK,
) -> Run:  # fmt: skip
    """The k documents of each query with the largest dot products; vectors [Q, d] and [N, d], arrays or tensors.

    The documents may be a memory-mapped array: a chunk at a time is read.
    """
    if len(queries) != len(query_ids) or len(documents) != len(document_ids):
        raise ValueError(f"{len(queries)} vectors of {len(query_ids)} queries, {len(documents)} of {len(document_ids)}")
    order, found = Order(document_ids), {}
    for start in range(0, len(queries), QUERIES):
        rows = _vectors(queries[start : start + QUERIES], device)  # [q, d]
        scores = ((at, rows @ part.mT) for at, part in _chunks(documents, chunk, device))
        best = order.merged(scores, k)
        found.update(zip(query_ids[start : start + QUERIES], best, strict=True))
    return found


def _chunks(documents: Any, chunk: int, device: str) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(documents), chunk):
        yield start, _vectors(documents[start : start + chunk], device)


def _vectors(values: Any, device: str) -> Tensor:
    import torch

    found = torch.as_tensor(np.array(values) if isinstance(values, np.ndarray) else values).to(device, torch.float32)
    if not bool(found.isfinite().all()):
        raise UserError("a vector is NaN or infinite; is the encoder sound, and its dtype wide enough?")
    return found


class Order:
    """Documents by score, of equal ones by id: each pair of the two is one whole number, and no two are equal.

    A float32 that is not negative orders as its bits do, a negative one as they do when all but the sign are turned;
    these 32 bits go above the place of the id among the sorted ones.
    """

    def __init__(self, ids: Sequence[str]):
        import torch

        self.sorted = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)  # the smallest id is the largest place
        self.names = [ids[i] for i in self.sorted]
        self.places = torch.empty(len(ids), dtype=torch.int64)
        self.places[torch.tensor(self.sorted, dtype=torch.int64)] = torch.arange(len(ids))

    def best(self, scores: Tensor, k: int) -> list[dict[str, float]]:
        """Of scores of all documents [q, N]: {id: score} of each query, best first."""
        return self.merged([(0, scores)], k)

    def merged(self, chunks, k: int) -> list[dict[str, float]]:
        """The same of (first document, scores [q, n]) of one chunk of documents after the other."""
        import torch

        best = None
        for start, scores in chunks:
            found = self._codes(scores, start)
            found = found if best is None else torch.cat([best, found], 1)
            best = found.topk(min(k, found.shape[1]), 1).values
        return [] if best is None else [self._read(row) for row in best.cpu()]

    def _codes(self, scores: Tensor, start: int) -> Tensor:
        import torch

        bits = (scores.float() + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0
        places = self.places[start : start + scores.shape[1]].to(scores.device)
        return (_turned(bits) << 32) | places

    def _read(self, codes: Tensor) -> dict[str, float]:
        import torch

        scores = _turned(codes >> 32).to(torch.int32).view(torch.float32).tolist()
        return {self.names[place]: score for place, score in zip((codes & 0xFFFFFFFF).tolist(), scores, strict=True)}


def _turned(bits: Tensor) -> Tensor:
    """Negative numbers with all bits but the sign turned; twice is not at all."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
