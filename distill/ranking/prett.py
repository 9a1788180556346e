"""PreTT: query and passage apart in the first layers, so that those of passages could be kept; then as one text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from distill import layout, taps
from distill.forwards import replaced
from distill.ranking.encoding import Texts, in_order, inputs, padded
from distill.ranking.joining import joined
from distill.ranking.kinds import Join, PreTTKind
from distill.ranking.ranker import Ranker, WideLinear
from growth.errors import UserError

FAMILIES = ("bert", "roberta", "distilbert", "modernbert")  # those that tests/test_rankers.py proves
CLS_LEFT_OUT = Join(skip=1)


class PreTT(Ranker):
    """Precomputed transformer terms, without their compression (MacAvaney et al. 2020, arXiv 2004.14255).

    Positions of a passage begin after the longest query that may be (`query_length`), whatever is in the batch.
    """

    def __init__(self, encoder: nn.Module, kind: PreTTKind = PreTTKind()):  # noqa: B008 (a frozen value)
        config = encoder.config
        if config.model_type not in FAMILIES:
            raise UserError(f"no PreTT of {config.model_type}: its layers cannot be run in two parts; {_known()} can")
        if not kind.apart < config.num_hidden_layers:
            raise UserError(f"apart: {kind.apart} leaves no layer to join, the encoder has {config.num_hidden_layers}")
        longest = layout.longest(config)
        if longest is not None and kind.query_length + kind.passage_length > longest:
            raise UserError(
                f"query_length + passage_length is {kind.query_length + kind.passage_length}, "
                f"this {config.model_type} has {longest} positions"
            )
        super().__init__(encoder, kind)
        self.linear = WideLinear(self.width, 1, bias=False, dtype=encoder.dtype)

    def score(self, queries: Texts, passages: Texts, pairs: Tensor) -> Tensor:
        sides = self.apart(queries, 0), self.apart(passages, self.kind.query_length)
        hidden = torch.cat([states.flatten(0, 1) for states, _ in sides])  # [all tokens, D]
        places = torch.cat([places.flatten() for _, places in sides])
        tables = _numbered(queries, 0), _numbered(passages, queries.ids.numel())
        texts = joined(*tables, pairs, CLS_LEFT_OUT)  # ids are rows of hidden
        return in_order(texts.lengths, lambda rows: self.together(texts.at(rows), hidden, places))

    def apart(self, texts: Texts, start: int) -> tuple[Tensor, Tensor]:
        """Hidden states after the first layers [N, T, D], and the positions [N, T] that were told to the encoder."""

        def some(rows: Tensor) -> Tensor:
            given = self._inputs(texts.at(rows))
            given["position_ids"] = given["position_ids"] + start
            with _only(self._blocks()[: self.kind.apart], self._blocks()) as kept:
                self.encoder(**given)
            return padded(kept[-1], texts.ids.shape[1])

        places = self._inputs(Texts(torch.zeros_like(texts.ids), texts.lengths))["position_ids"] + start
        return in_order(texts.lengths, some), places

    def together(self, texts: Texts, hidden: Tensor, places: Tensor) -> Tensor:
        """Scores of texts whose ids are rows of `hidden`, by the layers that are left."""
        given = self._inputs(Texts(torch.zeros_like(texts.ids), texts.lengths))
        given["position_ids"] = places[texts.ids]
        with _only(self._blocks()[self.kind.apart :], self._blocks(), hidden[texts.ids]):
            return self.linear(self.encoder(**given).last_hidden_state[:, 0])[:, 0]

    def _inputs(self, texts: Texts) -> dict[str, Tensor]:
        return inputs(self.encoder, texts.ids, texts.real.long())

    def _blocks(self) -> list[nn.Module]:
        return taps.blocks(self.encoder)


@contextmanager
def _only(run: list[nn.Module], blocks: list[nn.Module], hidden: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Inside, other blocks hand on what they are given; `hidden` is what the first that runs sees instead.

    The list handed out keeps what came out of the last.
    """
    kept: list[Tensor] = []
    with ExitStack() as undo:
        undo.callback(run[-1].register_forward_hook(lambda *call: kept.append(call[-1])).remove)
        if hidden is not None:
            undo.callback(run[0].register_forward_pre_hook(lambda block, given: (hidden, *given[1:])).remove)
        for block in blocks:
            if block not in run:
                undo.enter_context(replaced(block, lambda given, *_, **__: given))
        yield kept


def _numbered(texts: Texts, start: int) -> Texts:
    """The place of each token among all."""
    ids = texts.ids
    return Texts(start + torch.arange(ids.numel(), device=ids.device).view(ids.shape), texts.lengths)


def _known() -> str:
    return ", ".join(FAMILIES[:-1]) + f" and {FAMILIES[-1]}"
