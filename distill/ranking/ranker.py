"""What all rankers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.score_lists import wide
from distill.ranking.encoding import Texts, passes_at_once, texts
from distill.ranking.kinds import RankerKind
from growth.errors import UserError

ENCODER = "encoder."
NUMBERS, NUMBERS_ON_A_GPU = 2**22, 2**27  # of the copies and similarities of a chunk of pairs: guesses


class Ranker(nn.Module, ABC):
    """An encoder, what makes scores of its hidden states, and the value that says how."""

    margin_bound: float | None = None  # the widest difference of two scores for one query, if there is one
    at_once: bool = False  # all texts in one pass through the encoder, so that all ranks make equally many

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
        with passes_at_once(self.at_once):
            return self.score(*sides, pairs) if len(pairs) else wide(self.encoder.get_input_embeddings().weight[:0, 0])

    @abstractmethod
    def score(self, queries: Texts, passages: Texts, pairs: Tensor) -> Tensor: ...

    def head(self) -> dict[str, Tensor]:
        """All weights that are not the encoder's."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(ENCODER)}

    @property
    def base_model(self) -> nn.Module:
        """Where the layers are, by the name that transformers has for it."""
        return self.encoder.base_model

    @property
    def width(self) -> int:
        return self.encoder.config.hidden_size


def in_chunks(pairs: Tensor, each: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """score(pairs) [P], of some at a time, for every pair takes `each` numbers of memory."""
    most = NUMBERS if pairs.device.type == "cpu" else NUMBERS_ON_A_GPU
    return torch.cat([score(some) for some in pairs.split(max(1, most // each))])


class WideLinear(nn.Linear):
    """A linear layer that makes a score: never in half precision, where one of 20 may be off by 0.06."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(wide(x), wide(self.weight), None if self.bias is None else wide(self.bias))
