"""Batches: rows by their place in the stream, masked, the same whoever asks and however the stream is cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np

from distill.corpus import masking
from distill.corpus.order import Order
from distill.corpus.store import UNKNOWN, Corpus
from growth.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# input_ids, segment_ids (0 = padding), labels (-100 = none) [B, T]; sample_ids [B]; of a corpus with classes, where
# these are to be predicted: classes (-100 = none) [B]
Batch = dict[str, "Tensor"]


class Batches:
    """`objective`: whose labels a batch carries; with None nothing is masked and nothing is to be predicted."""

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        objective: Literal["mlm", "causal", "classify"] | None = None,
        mask: float = 0.15,
    ):
        if objective == "mlm" and corpus.facts.mask is None:
            raise UserError("objective mlm: the tokeniser of the corpus has no mask token; `causal` needs none")
        self.corpus, self.seed, self.objective, self.mask = corpus, seed, objective, mask
        self.order = Order(seed, len(corpus))
        self._ordinary = np.ones(corpus.facts.vocabulary, dtype=bool)
        self._ordinary[corpus.facts.special] = False
        self._words = np.flatnonzero(self._ordinary)

    def at(self, positions: Iterable[int], mask: float | None = None) -> Batch:
        """The rows at these places of the stream; `mask` is the masking rate where it changes during a run."""
        import torch

        places = [self.order.at(position) for position in positions]
        ids, segments = (np.stack(column) for column in zip(*(self.corpus.row(row) for _, row in places), strict=True))
        hidden, labels = self._predicted(ids, segments, places, self.mask if mask is None else mask)
        columns = {"input_ids": hidden, "segment_ids": segments, "labels": labels}  # [B, T]
        batch = {name: torch.from_numpy(values) for name, values in columns.items()}
        batch["sample_ids"] = torch.tensor([row for _, row in places])
        return {**batch, "classes": self._classes(batch["sample_ids"])} if self.objective == "classify" else batch

    def _classes(self, rows: Tensor) -> Tensor:
        import torch

        known = torch.from_numpy(self.corpus.labels[rows.numpy()].astype(np.int64))
        return known.where(known != UNKNOWN, masking.NONE)  # [B]

    def _predicted(self, ids: np.ndarray, segments: np.ndarray, places: list, rate: float) -> tuple:
        """(ids as the model sees them, labels)."""
        if self.objective in (None, "classify"):
            return ids, np.full_like(ids, masking.NONE)
        if self.objective == "causal":
            return ids, np.where(segments > 0, ids, masking.NONE)
        numbers = np.stack([masking.numbers(ids.shape[1], self.seed, epoch, row) for epoch, row in places])
        maskable = (segments > 0) & self._ordinary[ids]
        return masking.hide(ids, maskable, numbers, rate, mask=self.corpus.facts.mask, words=self._words)


def unpack(batch: Batch) -> Batch:
    """Every document in a row of its own, padded on the right, for models that cannot keep packed documents apart.

    The tokens and their labels are the same; sample ids repeat.
    """
    import torch

    segments = batch["segment_ids"]  # [B, T]
    row, place = torch.nonzero(segments, as_tuple=True)
    numbered = row * (segments.shape[1] + 1) + segments[row, place]
    documents, document, sizes = torch.unique(numbered, return_inverse=True, return_counts=True)
    start = torch.cumsum(sizes, 0) - sizes
    within = torch.arange(len(document), device=row.device) - start[document]  # a document's tokens stand together
    shape = len(documents), int(sizes.max()) if len(sizes) else 0

    def scattered(values: Tensor, padding: int) -> Tensor:
        out = values.new_full(shape, padding)
        out[document, within] = values[row, place]
        return out

    of = documents // (segments.shape[1] + 1)  # the row it was in
    return {
        "input_ids": scattered(batch["input_ids"], 0),
        "segment_ids": scattered(torch.ones_like(segments), 0),
        "labels": scattered(batch["labels"], masking.NONE),
        **{name: values[of] for name, values in batch.items() if values.dim() == 1},
    }
