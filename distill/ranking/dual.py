"""BERT_DOT: one vector for each text."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from distill import loading
from distill.objectives.score_lists import wide
from distill.ranking.encoding import POOLING, Texts, encoded
from distill.ranking.kinds import DualKind
from distill.ranking.ranker import Ranker
from growth.errors import UserError


class DualEncoder(Ranker):
    """One encoder for both sides; dot product or cosine of two pooled vectors (arXiv 2010.02666, 1908.10084)."""

    def __init__(self, encoder: nn.Module, kind: DualKind = DualKind()):  # noqa: B008 (a frozen value)
        if kind.pooling == "cls" and loading.causal(encoder.config):
            raise UserError(
                f"the first token of a {encoder.config.model_type} sees no other: take pooling last or mean"
            )
        super().__init__(encoder, kind)
        self.linear = nn.Linear(self.width, kind.dims, bias=False, dtype=encoder.dtype) if kind.dims else nn.Identity()
        self.margin_bound = 2.0 if kind.similarity == "cosine" else None

    def vectors(self, texts: Texts) -> Tensor:
        """One for each text [N, k], in float32 or float64."""
        found = wide(self.linear(encoded(self.encoder, texts, POOLING[self.kind.pooling])))
        return F.normalize(found, dim=-1) if self.kind.similarity == "cosine" else found

    def score(self, queries: Texts, passages: Texts, pairs: Tensor) -> Tensor:
        q, p = pairs.unbind(1)
        return (self.vectors(queries)[q] * self.vectors(passages)[p]).sum(-1)
