"""BERT_CAT: query and passage read as one text."""

from __future__ import annotations

from torch import Tensor, nn

from distill import loading
from distill.ranking.encoding import Texts, encoded, first, last
from distill.ranking.joining import joined
from distill.ranking.kinds import CrossKind
from distill.ranking.ranker import Ranker, WideLinear


class CrossEncoder(Ranker):
    """A linear layer on the first token of [q; d], of a decoder on the last (Nogueira, Cho 2019, arXiv 1901.04085)."""

    def __init__(self, encoder: nn.Module, kind: CrossKind = CrossKind()):  # noqa: B008 (a frozen value)
        super().__init__(encoder, kind)
        self.linear = WideLinear(self.width, 1, dtype=encoder.dtype)
        self.pick = last if loading.causal(encoder.config) else first

    def score(self, queries: Texts, passages: Texts, pairs: Tensor) -> Tensor:
        return self.linear(encoded(self.encoder, joined(queries, passages, pairs, self.kind.join), self.pick))[:, 0]
