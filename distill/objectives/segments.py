"""Segment ids [B, T] as dense problems: which tokens see each other, without a mask over T x T.

A segment (a number other than 0 within a row) is one sequence of its own, wherever its tokens stand: padding on
either side and other documents of a packed row are never read and cost nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SIMILAR = 0.75  # sequences of a group are at least this share of its longest: at most 44 % of its scores are wasted
SHORT = 16  # below this length a further group costs more in calls than it saves in arithmetic


@dataclass(frozen=True)
class Sight:
    """Which tokens of its sequence a token sees."""

    causal: bool = False  # those up to itself
    window: int | None = None  # those nearer than this

    def reach(self, length: int) -> tuple[int, int]:
        """How many tokens before and behind itself a token sees at most."""
        near = length if self.window is None else self.window - 1
        return near, 0 if self.causal else near

    def keys(self, rows: slice, length: int) -> slice:
        """Those that any of these rows sees."""
        before, behind = self.reach(length)
        return slice(max(0, rows.start - before), min(length, rows.stop + behind))

    def unseen(self, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
        """True where a row does not see a key [rows, keys]; None where every one sees all."""
        if not self.causal and self.window is None:
            return None
        row, key = (torch.arange(s.start, s.stop, device=device) for s in (rows, keys))
        ahead, far = key - row[:, None], math.inf if self.window is None else self.window
        return (ahead <= -far) | (ahead >= (1 if self.causal else far))


@dataclass(frozen=True)
class Form:
    """A relation of two models: how their channels are divided, what is compared and what counts."""

    heads: int
    scales: tuple[float, float]  # factors on the scores of teacher and student
    sight: Sight
    reduction: str  # sample or token
    measure: str = "kl"  # of a row's distributions; mse: of its scores

    def weight(self, lengths: Tensor) -> Tensor:
        """What a row counts, by the length of its sequence, float64."""
        lengths = lengths.double()  # a bool or int tensor divided would be float32
        return 1 / (self.heads * (lengths if self.reduction == "sample" else lengths**0))


@dataclass(frozen=True)
class Group:
    """S sequences of similar length; a short one repeats its last token where `real` is False."""

    index: Tensor  # [S, L] flat positions b * T + t
    real: Tensor  # [S, L] bool
    lengths: Tensor  # [S]
    ragged: bool


def sequences(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions of all real tokens, sequence after sequence [tokens], and the length of each [sequences]."""
    row = torch.arange(len(segments), device=segments.device)[:, None]
    name = row * (segments.max() + 1) + segments  # one number for each (row, segment)
    real = segments.flatten().nonzero().squeeze(1)
    name, order = name.flatten()[real].sort(stable=True)
    return real[order], name.unique_consecutive(return_counts=True)[1]


def groups(segments: Tensor) -> list[Group]:
    """All sequences of a batch, longest first, together with others of similar length."""
    positions, lengths = sequences(segments)
    starts = lengths.cumsum(0) - lengths
    lengths, order = lengths.sort(descending=True)
    return [_group(positions, starts[order[cut]], lengths[cut]) for cut in _cuts(lengths.tolist())]


def _cuts(lengths: list[int]) -> list[slice]:
    """Lengths in descending order, cut where the next one is no longer similar to the longest of its group."""
    edges = [0]
    for i, length in enumerate(lengths):
        longest = lengths[edges[-1]]
        if longest > SHORT and length < SIMILAR * longest:
            edges.append(i)
    return [slice(first, end) for first, end in pairwise([*edges, len(lengths)]) if first < end]


def _group(positions: Tensor, starts: Tensor, lengths: Tensor) -> Group:
    step = torch.arange(int(lengths[0]), device=positions.device)  # [L]
    last = lengths[:, None] - 1
    return Group(
        index=positions[starts[:, None] + torch.minimum(step, last)],
        real=step <= last,
        lengths=lengths,
        ragged=bool(lengths[0] != lengths[-1]),
    )
