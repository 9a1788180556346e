"""Texts, one a row, through an encoder: each once, and hardly any padding with them.

Several share a row where the family can keep them apart, which was faster; else they go with others of their length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import layout
from distill.corpus.packing import Layout, best_fit
from growth.errors import UserError

# Places of a pass through the encoder, padding counted: the first is measured (benchmarks/LOG.md), the second a guess
PLACES, PLACES_ON_A_GPU = 1024, 2**17
AT_ONCE = ContextVar("at once", default=False)


@dataclass(frozen=True)
class Texts:
    """Ids [N, T], all padding behind; how many of a row are real [N]; types [N, T] where there are two of them."""

    ids: Tensor
    lengths: Tensor
    types: Tensor | None = None

    @cached_property
    def real(self) -> Tensor:
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]  # [N, T]

    def at(self, rows: Tensor) -> Texts:
        """Some of them, without places that are padding in all."""
        lengths = self.lengths[rows]
        ids, types = (x if x is None else x[rows, : int(lengths.max())] for x in (self.ids, self.types))
        return Texts(ids, lengths, types)


def texts(batch: Mapping[str, Tensor]) -> Texts:
    """From input_ids and segment_ids [N, T], padded on whichever side."""
    ids, segments = batch["input_ids"], batch["segment_ids"]
    if ids.dim() != 2 or segments.shape != ids.shape:
        raise UserError(f"texts are [N, T]: input_ids is {list(ids.shape)}, segment_ids {list(segments.shape)}")
    if bool((segments > 1).any()):
        raise UserError("rankers take one text a row, these rows hold several documents: corpora need packed: false")
    return flush(ids, segments > 0)


def flush(ids: Tensor, real: Tensor, types: Tensor | None = None) -> Texts:
    """Of rows with gaps, what is real, moved to the front; zeros behind it."""
    lengths = real.sum(1)
    if len(ids) and not bool(lengths.all()):
        raise UserError(f"text {int(lengths.argmin())} of a batch has no token: there is nothing to score")
    order = (~real).long().argsort(dim=1, stable=True)[:, : int(lengths.max()) if len(ids) else 0]
    ids, types = (x if x is None else x.masked_fill(~real, 0).gather(1, order) for x in (ids, types))
    return Texts(ids, lengths, types)


def encoded(encoder: nn.Module, texts: Texts, pick: Callable[[Tensor, Texts], Tensor]) -> Tensor:
    """What `pick` makes of hidden states [n, t, D] of some texts [n, ...], of all of them [N, ...] in their order."""
    if layout.packable(encoder.config):
        return pick(packed(encoder, texts), texts)
    return in_order(texts.lengths, lambda rows: _picked(encoder, texts.at(rows), pick))


def packed(encoder: nn.Module, texts: Texts) -> Tensor:
    """Hidden states [N, T, D]; what stands where there is padding is of some other token."""
    room = texts.ids.shape[1]
    row, place, number = _shared(texts.lengths, room)
    at = ((row * room + place)[:, None] + torch.arange(room, device=row.device)).masked_fill(~texts.real, 0)  # [N, T]
    shape = int(row.max()) + 1, room

    def laid_out(values: Tensor) -> Tensor:
        return values.new_zeros(shape).flatten().scatter(0, at[texts.real], values[texts.real]).view(shape)

    columns = [laid_out(x) for x in (texts.ids, number[:, None].expand_as(at), texts.types) if x is not None]
    passes = zip(*(x.split(max(1, _most(row) // room)) for x in columns), strict=True)
    hidden = torch.cat([encoder(**inputs(encoder, *some)).last_hidden_state for some in passes])  # [rows, room, D]
    return hidden.flatten(0, 1)[at]


def _shared(lengths: Tensor, room: int) -> tuple[Tensor, ...]:
    """Of each text its row, its place in it and its number among the texts of the row [N], 1 being the first."""
    sizes = lengths.cpu().numpy()
    fit = Layout(sizes, best_fit(sizes, room), room)
    back = np.argsort(fit.order)
    return tuple(torch.from_numpy(x[back]).to(lengths.device) for x in (fit.row_of, fit.places, fit.numbers))


def in_order(lengths: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """run(rows) [n, ...] for rows of like length, put together as if it had been called with all of them."""
    order = lengths.argsort(stable=True)
    parts = [run(rows) for rows in passes(order, lengths[order].tolist())]
    return torch.cat(parts)[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))]


def passes(order: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    """Runs of the order that, padded to their longest (the last), have at most so many places; at least one row."""
    most, start = _most(order), 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * lengths[end] > most:
            yield order[start:end]
            start = end


@contextmanager
def passes_at_once(whole: bool) -> Iterator[None]:
    """Inside, whether all texts are one pass, whatever their number."""
    token = AT_ONCE.set(whole)
    try:
        yield
    finally:
        AT_ONCE.reset(token)


def _most(like: Tensor) -> int:
    if AT_ONCE.get():
        return sys.maxsize
    return PLACES if like.device.type == "cpu" else PLACES_ON_A_GPU


def _picked(encoder: nn.Module, texts: Texts, pick: Callable[[Tensor, Texts], Tensor]) -> Tensor:
    given = inputs(encoder, texts.ids, texts.real.long(), texts.types)
    return pick(encoder(**given).last_hidden_state, texts)


def inputs(encoder: nn.Module, ids: Tensor, segments: Tensor, types: Tensor | None = None) -> dict[str, Tensor]:
    """The arguments of the encoder's forward."""
    longest = layout.longest(encoder.config)
    if longest is not None and ids.shape[1] > longest:
        raise UserError(
            f"a text of {ids.shape[1]} tokens, and this {encoder.config.model_type} reads {longest}: "
            "make query_length or passage_length smaller"
        )
    given = layout.inputs(encoder, {"input_ids": ids, "segment_ids": segments})
    return given if types is None else given | {"token_type_ids": types}


# What a ranker takes from hidden states


def first(hidden: Tensor, texts: Texts) -> Tensor:
    return hidden[:, 0]  # [N, D]


def last(hidden: Tensor, texts: Texts) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), texts.lengths - 1]  # [N, D]


def mean(hidden: Tensor, texts: Texts) -> Tensor:
    return hidden.masked_fill(~texts.real[:, :, None], 0).sum(1) / texts.lengths[:, None]  # [N, D]


POOLING = {"cls": first, "last": last, "mean": mean}


def padded(hidden: Tensor, length: int) -> Tensor:
    """[n, t, D] -> [n, length, D]."""
    return F.pad(hidden, (0, 0, 0, length - hidden.shape[1]))
