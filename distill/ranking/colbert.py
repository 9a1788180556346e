"""ColBERT: one vector for each token; a query's token looks for the passage's token most like it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import loading
from distill.objectives.score_lists import wide
from distill.ranking.encoding import Texts, encoded, flush, padded
from distill.ranking.kinds import ColBERTKind
from distill.ranking.ranker import Ranker, in_chunks
from growth.errors import UserError


class ColBERT(Ranker):
    """Each token of a query finds its most similar one of a passage (Khattab, Zaharia 2020, arXiv 2004.12832)."""

    def __init__(self, encoder: nn.Module, kind: ColBERTKind = ColBERTKind()):  # noqa: B008 (a frozen value)
        if kind.masks and (kind.mask_token is None or loading.causal(encoder.config)):
            raise UserError("masks in queries need mask_token, the id of [MASK], and an encoder that knows it")
        super().__init__(encoder, kind)
        self.linear = nn.Linear(self.width, kind.dims or self.width, bias=False, dtype=encoder.dtype)
        self.margin_bound = 2.0 * (kind.query_length + kind.masks) if kind.similarity == "cosine" else None

    def vectors(self, texts: Texts) -> Tensor:
        """One for each token [N, T, k], in float32 or float64; those of padding are zero."""
        found = wide(encoded(self.encoder, texts, lambda h, some: padded(self.linear(h), texts.ids.shape[1])))
        found = F.normalize(found, dim=-1) if self.kind.similarity == "cosine" else found
        return found.masked_fill(~texts.real[:, :, None], 0)

    def score(self, queries: Texts, passages: Texts, pairs: Tensor) -> Tensor:
        queries = _augmented(queries, self.kind.masks, self.kind.mask_token) if self.kind.masks else queries
        return maxsim(self.vectors(queries), queries.real, self.vectors(passages), passages.real, pairs)


def maxsim(queries: Tensor, query_real: Tensor, passages: Tensor, passage_real: Tensor, pairs: Tensor) -> Tensor:
    """Of pairs [P, 2]: the sum over real query tokens of the maximum over real passage tokens of their dot products.

    Vectors [N, T, k] and masks [N, T] of both sides. Padding of a passage is minus infinity before the maximum, that of
    a query zero after it, so that similarities below zero are kept. Which tokens match is found without gradient; the
    dot products are then those of the matches alone.
    """

    def some(pairs: Tensor) -> Tensor:
        q, p = pairs.unbind(1)
        with torch.no_grad():
            similar = (queries[q] @ passages[p].mT).masked_fill(~passage_real[p][:, None, :], -torch.inf)
            best = similar.argmax(-1)  # [c, Tq]
        found = (queries[q] * passages[p[:, None], best]).sum(-1)  # [c, Tq]
        return found.masked_fill(~query_real[q], 0).sum(-1)

    (_, a, k), b = queries.shape, passages.shape[1]
    return in_chunks(pairs, (a + b) * k + a * b, some)


def _augmented(queries: Texts, masks: int, token: int) -> Texts:
    """With so many masks before the last token of each."""
    there = queries.ids.new_full((len(queries.ids), masks), token)
    ids = torch.cat([queries.ids, there, queries.ids.gather(1, queries.lengths[:, None] - 1)], 1)
    real = queries.real.scatter(1, queries.lengths[:, None] - 1, False)
    return flush(ids, torch.cat([real, real.new_ones(len(real), masks + 1)], 1))
