"""TK: few and small transformer layers, and kernels that count how many words of a passage are how like a query's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.score_lists import wide
from distill.ranking.encoding import Texts, encoded, padded
from distill.ranking.kinds import TKKind
from distill.ranking.ranker import Ranker, WideLinear, in_chunks

LEAST = 1e-10  # of a soft count, before its logarithm: a word may have no like
SPREAD = 0.014  # of the first weights of the kernels, which see logarithms down to -23


class TK(Ranker):
    """Kernels over cosines of contextualised words (Hofstaetter et al. 2020, arXiv 2002.01854).

    A word is a learnt mixture of its embedding and of what the layers make of it. Each kernel adds up its responses
    over the real words of a passage; logarithms of these, added up over those of the query, make the score.
    """

    def __init__(self, encoder: nn.Module, kind: TKKind = TKKind()):  # noqa: B008 (a frozen value)
        super().__init__(encoder, kind)
        self.mixture = nn.Parameter(torch.full((1,), 0.5, dtype=encoder.dtype))
        self.linear = WideLinear(len(kind.centres), 1, bias=False, dtype=encoder.dtype)
        nn.init.uniform_(self.linear.weight, -SPREAD, SPREAD)

    def vectors(self, texts: Texts) -> Tensor:
        """One of length 1 for each word [N, T, D], in float32 or float64."""
        contextual = wide(encoded(self.encoder, texts, lambda h, some: padded(h, texts.ids.shape[1])))
        words = wide(self.encoder.get_input_embeddings()(texts.ids))
        return F.normalize(torch.lerp(contextual, words, wide(self.mixture)), dim=-1)

    def score(self, queries: Texts, passages: Texts, pairs: Tensor) -> Tensor:
        asked, said = self.vectors(queries), self.vectors(passages)

        def some(pairs: Tensor) -> Tensor:
            q, p = pairs.unbind(1)
            cosines, hidden = asked[q] @ said[p].mT, ~passages.real[p][:, None, :]  # [P, Tq, Td]
            counts = [self._response(cosines, centre).masked_fill(hidden, 0).sum(-1) for centre in self.kind.centres]
            logs = torch.stack(counts, -1).clamp(min=LEAST).log()  # [P, Tq, kernels]
            return logs.masked_fill(~queries.real[q][:, :, None], 0).sum(1)

        (_, a, k), b = asked.shape, said.shape[1]
        return self.linear(in_chunks(pairs, (a + b) * k + a * b * len(self.kind.centres), some))[:, 0]

    def _response(self, cosines: Tensor, centre: float) -> Tensor:
        return torch.exp((cosines - centre).square() / (-2 * self.kind.width**2))
