"""Relation KL on a GPU: blocks of scores that never leave the chip (as in Dao et al. 2022, arXiv 2205.14135).

One sweep over the keys finds the statistics of every row, a second one the gradient. All sequences stand behind each
other as N tokens; a row sees the keys `first` to `last`, whatever bounds them (its sequence, causality, a window), and
a key is seen by such a range of rows. relation_blocks is the reference. Needs Triton.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.objectives import relation_blocks
from distill.objectives.segments import Form, Group, Sight

WIDEST = 128  # of a relation head: tiles of both models must fit on the chip
OWN, OTHERS = 64, 64  # tokens of a tile: not timed, but compiled for sm_90 without spills at widths up to 64
LOG2_E = 1 / math.log(2)  # scores are kept in units of log 2, for hardware has exp2

Pair = tuple[Tensor, Tensor]  # left (query rows) and right (keys); the same tensor for a relation with itself
Range = tuple[Tensor, Tensor]  # of tokens: first and behind the last, int32 [N]


def solve(teacher: Pair, student: Pair, problems: list[Group], form: Form, learns: bool) -> tuple[Tensor, list[Tensor]]:
    """As relation_blocks.solve. Sums are float32, products of half-precision tensors are exact in it."""
    if not problems:
        return relation_blocks.solve(teacher, student, problems, form, learns)
    place, lengths = _behind_each_other(problems)
    weight = form.weight(lengths).repeat_interleave(lengths)  # [N]
    t, s = (_by_heads(pair, place, form.heads) for pair in (teacher, student))
    sees, seen = _ranges(lengths, form.sight)
    with torch.cuda.device_of(s[0]):
        kl, *statistics = _statistics(t, s, sees, form.scales)
        found = _gradients(t, s, sees, seen, statistics, weight.float(), form.scales) if learns else []
    return (kl.double() @ weight).sum().float(), [_as_tokens(gradient, place, len(student[0])) for gradient in found]


def refused(teacher: Pair, student: Pair, form: Form) -> str | None:
    """Why this cannot be solved here."""
    t, s = teacher[0], student[0]
    widest = max(t.shape[1], s.shape[1]) // form.heads
    if not (s.is_cuda or triton.knobs.runtime.interpret):
        return f"it runs on a GPU, not on the {s.device.type}"
    if torch.float64 in (t.dtype, s.dtype):
        return "it knows no float64"
    if widest > WIDEST:
        return f"relation heads may be {WIDEST} wide at most, not {widest}"
    return None if form.measure == "kl" else f"it makes no {form.measure}"


def _statistics(t: Pair, s: Pair, sees: Range, scales: tuple[float, float]) -> list[Tensor]:
    """KL of every row and the log-sum-exps of teacher and student, [heads, N]."""
    heads, tokens, _ = s[0].shape
    results = [s[0].new_empty(heads, tokens, dtype=torch.float32) for _ in range(3)]
    _statistics_kernel[_grid(s)](*t, *s, *sees, *results, tokens, *_in_log2(scales), **_sizes(t, s))
    return results


def _gradients(t: Pair, s: Pair, sees: Range, seen: Range, statistics, weight: Tensor, scales) -> list[Tensor]:
    """By both of the student's tensors [heads, N, d]; for a relation with itself one sweep does, as rows and keys."""

    def sweep(own: int, as_row: bool, as_key: bool) -> Tensor:
        gradient = torch.empty_like(s[0], dtype=torch.float32)
        _gradient_kernel[_grid(s)](
            *(t[own], t[1 - own], s[own], s[1 - own], *sees, *seen, *statistics, weight, gradient, s[0].shape[1]),
            *(*_in_log2(scales), scales[1]),
            **_sizes(t, s),
            AS_ROW=as_row,
            AS_KEY=as_key,
        )
        return gradient

    if t[0] is t[1] and s[0] is s[1]:
        return [sweep(0, True, True)] * 2
    left, right = sweep(0, True, False), sweep(1, False, True)
    return [left + right] * 2 if s[0] is s[1] else [left, right]


@triton.jit
def _statistics_kernel(
    t_left, t_right, s_left, s_right, sees_first, sees_last, kl, lse_t, lse_s, N, scale_t, scale_s,
    T: tl.constexpr, S: tl.constexpr, T_TILE: tl.constexpr, S_TILE: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """KL = sum_j P_j (a_j - b_j) - lse(a) + lse(b), with running maxima and sums over blocks of keys."""
    head = tl.program_id(1).to(tl.int64) * N
    rows = tl.program_id(0) * OWN + tl.arange(0, OWN)
    first, last = _range(sees_first, sees_last, rows, N)
    own_t, own_s = _tile(t_left + head * T, rows, N, T, T_TILE), _tile(s_left + head * S, rows, N, S, S_TILE)
    top_a = tl.full([OWN], -1e30, tl.float32)
    top_b = tl.full([OWN], -1e30, tl.float32)
    sum_a = tl.zeros([OWN], tl.float32)
    sum_b = tl.zeros([OWN], tl.float32)
    expected = tl.zeros([OWN], tl.float32)
    for start in range(tl.min(first), tl.max(last), OTHERS):
        keys = start + tl.arange(0, OTHERS)
        seen = _inside(keys[None, :], first[:, None], last[:, None])
        a = _scores(own_t, _tile(t_right + head * T, keys, N, T, T_TILE), scale_t, PRECISION)
        b = _scores(own_s, _tile(s_right + head * S, keys, N, S, S_TILE), scale_s, PRECISION)
        higher_a = tl.maximum(top_a, tl.max(tl.where(seen, a, -1e30), 1))
        higher_b = tl.maximum(top_b, tl.max(tl.where(seen, b, -1e30), 1))
        p = tl.where(seen, tl.exp2(a - higher_a[:, None]), 0.0)
        q = tl.where(seen, tl.exp2(b - higher_b[:, None]), 0.0)
        fewer_a, fewer_b = tl.exp2(top_a - higher_a), tl.exp2(top_b - higher_b)
        sum_a, sum_b = sum_a * fewer_a + tl.sum(p, 1), sum_b * fewer_b + tl.sum(q, 1)
        expected = expected * fewer_a + tl.sum(p * (a - b), 1)
        top_a, top_b = higher_a, higher_b
    lse_a, lse_b = top_a + tl.log2(sum_a), top_b + tl.log2(sum_b)
    tl.store(lse_t + head + rows, lse_a, rows < N)
    tl.store(lse_s + head + rows, lse_b, rows < N)
    tl.store(kl + head + rows, (expected / sum_a - lse_a + lse_b) * 0.6931471805599453, rows < N)  # log 2


@triton.jit
def _gradient_kernel(
    own_t, other_t, own_s, other_s, sees_first, sees_last, seen_first, seen_last, lse_t, lse_s, weight, gradient, N,
    scale_t, scale_s, scale,
    T: tl.constexpr, S: tl.constexpr, T_TILE: tl.constexpr, S_TILE: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, PRECISION: tl.constexpr, AS_ROW: tl.constexpr, AS_KEY: tl.constexpr,
):  # fmt: skip
    """Sum of G x others: G = Q - P of the tokens as rows, as keys of the others' rows, or of both."""
    head = tl.program_id(1).to(tl.int64) * N
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    sees_from, sees_to = _range(sees_first, sees_last, own, N)
    seen_from, seen_to = _range(seen_first, seen_last, own, N)
    first, last = tl.where(AS_ROW, sees_from, seen_from), tl.where(AS_ROW, sees_to, seen_to)
    if AS_ROW and AS_KEY:
        first, last = tl.minimum(sees_from, seen_from), tl.maximum(sees_to, seen_to)
    t, s = _tile(own_t + head * T, own, N, T, T_TILE), _tile(own_s + head * S, own, N, S, S_TILE)
    own_a = tl.load(lse_t + head + own, own < N, 0.0)
    own_b = tl.load(lse_s + head + own, own < N, 0.0)
    total = tl.zeros([OWN, S_TILE], tl.float32)
    for start in range(tl.min(first), tl.max(last), OTHERS):
        others = start + tl.arange(0, OTHERS)
        theirs = _tile(other_s + head * S, others, N, S, S_TILE)
        a = _scores(t, _tile(other_t + head * T, others, N, T, T_TILE), scale_t, PRECISION)
        b = _scores(s, theirs, scale_s, PRECISION)
        difference = tl.zeros([OWN, OTHERS], tl.float32)
        if AS_ROW:
            seen = _inside(others[None, :], sees_from[:, None], sees_to[:, None])
            difference += tl.where(seen, tl.exp2(b - own_b[:, None]) - tl.exp2(a - own_a[:, None]), 0.0)
        if AS_KEY:
            seen = _inside(others[None, :], seen_from[:, None], seen_to[:, None])
            their_a = tl.load(lse_t + head + others, others < N, 0.0)
            their_b = tl.load(lse_s + head + others, others < N, 0.0)
            difference += tl.where(seen, tl.exp2(b - their_b[None, :]) - tl.exp2(a - their_a[None, :]), 0.0)
        total += tl.dot(difference, theirs.to(tl.float32), input_precision=PRECISION)
    total *= scale * tl.load(weight + own, own < N, 0.0)[:, None]
    channel = tl.arange(0, S_TILE)
    inside = (own[:, None] < N) & (channel[None, :] < S)
    tl.store(gradient + head * S + own[:, None] * S + channel[None, :], total, inside)


@triton.jit
def _tile(x, tokens, N, D: tl.constexpr, TILE: tl.constexpr):
    """Tokens of one head of x [N, D], as [tokens, TILE] with zeros around."""
    channel = tl.arange(0, TILE)
    inside = (tokens[:, None] < N) & (channel[None, :] < D)
    return tl.load(x + tokens[:, None] * D + channel[None, :], inside, 0.0)


@triton.jit
def _scores(own, others, scale, PRECISION: tl.constexpr):
    return tl.dot(own, tl.trans(others), input_precision=PRECISION) * scale


@triton.jit
def _range(first, last, tokens, N):
    """Where there is no token, an empty one."""
    return tl.load(first + tokens, tokens < N, N), tl.load(last + tokens, tokens < N, 0)


@triton.jit
def _inside(tokens, first, last):
    return (tokens >= first) & (tokens < last)


def _grid(s: Pair) -> tuple[int, int]:
    heads, tokens, _ = s[0].shape
    return triton.cdiv(tokens, OWN), heads


def _sizes(t: Pair, s: Pair) -> dict:
    """What a kernel is compiled for; the axes of a product are powers of two and 16 at least."""
    wide_t, wide_s = t[0].shape[2], s[0].shape[2]
    tiles = {name: max(16, triton.next_power_of_2(d)) for name, d in (("T_TILE", wide_t), ("S_TILE", wide_s))}
    exact = torch.float32 in (t[0].dtype, s[0].dtype)
    return {"T": wide_t, "S": wide_s, **tiles, "OWN": OWN, "OTHERS": OTHERS, "PRECISION": "ieee" if exact else "tf32"}


def _in_log2(scales: tuple[float, float]) -> tuple[float, float]:
    return scales[0] * LOG2_E, scales[1] * LOG2_E


# Between rows of tokens and sequences behind each other


def _behind_each_other(problems: list[Group]) -> tuple[Tensor, Tensor]:
    """Flat position of every real token, sequence after sequence [N], and the length of each sequence."""
    return torch.cat([g.index[g.real] for g in problems]), torch.cat([g.lengths for g in problems])


def _ranges(lengths: Tensor, sight: Sight) -> tuple[Range, Range]:
    """Which tokens each one sees, and which see it."""
    last = lengths.cumsum(0)
    first, last = (x.repeat_interleave(lengths) for x in (last - lengths, last))
    token = torch.arange(len(first), device=first.device)

    def range_of(before: int, behind: int) -> Range:
        return (token - before).maximum(first).int(), (token + 1 + behind).minimum(last).int()

    before, behind = sight.reach(len(first))
    return range_of(before, behind), range_of(behind, before)


def _by_heads(pair: Pair, place: Tensor, heads: int) -> Pair:
    """[B * T, W] as [heads, N, d]: what a program reads stands together."""
    made = {x: x[place].unflatten(1, (heads, -1)).transpose(0, 1).contiguous() for x in pair}
    return made[pair[0]], made[pair[1]]


def _as_tokens(gradient: Tensor, place: Tensor, tokens: int) -> Tensor:
    """[heads, N, d] as [B * T, W], zero where nothing is real."""
    rows = gradient.transpose(0, 1).flatten(1)
    return rows.new_zeros(tokens, rows.shape[1]).index_copy_(0, place, rows)
