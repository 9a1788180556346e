"""What all rankers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.score_lists import wide
from distill.ranking.encoding import Texts, texts
from distill.ranking.kinds import RankerKind
from growth.errors import UserError

ENCODER = "encoder."


class Ranker(nn.Module, ABC):
    """An encoder, what makes scores of its hidden states, and the value that says how."""

    margin_bound: float | None = None  # the widest difference of two scores for one query, if there is one

    def __init__(self, encoder: nn.Module, kind: RankerKind):
        super().__init__()
        self.encoder, self.kind = encoder, kind

    def forward(self, queries: Mapping[str, Tensor], passages: Mapping[str, Tensor], pairs: Tensor) -> Tensor:
        """Scores [P] in float32 or float64 of pairs [P, 2], rows of queries and of passages.

        Both are {input_ids, segment_ids} [N, T], one text a row and every text once, padded on whichever side. A score
        does not depend on what else is in the batch.
        """
        if pairs.dim() != 2 or pairs.shape[1] != 2:
            raise UserError(f"pairs are rows of queries and of passages [P, 2], not {list(pairs.shape)}")
        sides = texts(queries), texts(passages)
        for name, side, most in zip(("query", "passage"), sides, self.kind.lengths, strict=True):
            if side.ids.shape[1] > most:
                raise UserError(f"a {name} of {side.ids.shape[1]} tokens; {name}_length is {most}")
        return self.score(*sides, pairs)

    @abstractmethod
    def score(self, queries: Texts, passages: Texts, pairs: Tensor) -> Tensor: ...

    def head(self) -> dict[str, Tensor]:
        """All weights that are not the encoder's."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(ENCODER)}

    @property
    def width(self) -> int:
        return self.encoder.config.hidden_size


class WideLinear(nn.Linear):
    """A linear layer that makes a score: never in half precision, where one of 20 may be off by 0.06."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(wide(x), wide(self.weight), None if self.bias is None else wide(self.bias))
