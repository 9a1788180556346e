"""A frozen model over documents of any length: what it makes of every next token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from distill.heads import Logits
from distill.taps import trace


def passes(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Places of the documents of each forward pass: the longest first, as many as fit with their padding."""
    order, first = np.argsort(-lengths, kind="stable"), 0
    while first < len(order):
        end = first + max(1, tokens // max(int(lengths[order[first]]), 1))
        yield order[first:end]
        first = end


def next_tokens(model: nn.Module, several: Sequence[np.ndarray]) -> tuple[Logits, Tensor]:
    """Its logits at each token that has a next one, document after document, and that next one [N].

    Padding stands behind the documents, where a causal model never looks: it needs no mask, and attention none either.
    """
    lengths = np.array([len(one) for one in several])
    place = np.arange(lengths.max())
    ids = np.zeros((len(several), len(place)), dtype=np.int64)
    ids[place < lengths[:, None]] = np.concatenate(several)
    rows = torch.from_numpy(np.flatnonzero(place < lengths[:, None] - 1)).to(model.device)
    batch = {"input_ids": torch.from_numpy(ids).to(model.device)}
    batch["segment_ids"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        head = trace(model, batch, (), rows).head
    return head, batch["input_ids"].flatten()[rows + 1]
