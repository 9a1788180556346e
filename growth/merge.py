"""Several fine-tuned checkpoints of one model as one: averages, task vectors, interpolation on the sphere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.errors import UsageError, UserError
from growth.families.table import Slot
from growth.operate import PLAIN, Output, Result, delivered, opened, seen
from growth.pieces import Computed
from growth.reindex import Stream, widely
from growth.writer import guard

HOW = ("linear", "task", "slerp")


def merge(
    sources: Sequence[Any],
    dst: str | Path | None = None,
    *,
    how: str = "linear",
    weights: Sequence[float] | None = None,
    base: Any = None,
    lines: float | None = None,
    output: Output = PLAIN,
) -> Any:
    """One checkpoint of several with the same tensors; of models in memory, a model.

    `linear`: their weighted sum, the mean by default (model soups: Wortsman et al. 2022, arXiv 2203.05482).
    `task`: `base` plus the weighted differences from it (Ilharco et al. 2022, arXiv 2212.04089); with `lines` the
    factor of the differences rises from `lines` in the first layer to 1 in the last (LiNeS: Wang et al. 2024, arXiv
    2410.17146). `slerp`: two of them, along the great circle between every pair of tensors (Shoemake 1985).
    """
    weights = _weights(how, len(sources), weights)
    _refuse(how, sources, base, lines)
    for source in sources[1:] if dst is not None else ():
        guard(Path(dst), [Path(source)], output.overwrite)
    first = opened(sources[0], dst, output)
    if output.check:
        for source in sources[1:]:
            seen(source).check_values()
    everything = [first, *(seen(source) for source in [*sources[1:], *([] if base is None else [base])])]
    anatomies = [dissect(checkpoint) for checkpoint in everything]
    for checkpoint, anatomy in zip(everything[1:], anatomies[1:], strict=True):
        _refuse_others(first, anatomies[0], checkpoint, anatomy)
    formula = partial({"linear": _linear, "task": _task, "slerp": _slerp}[how], weights)
    stream = _merged(everything, anatomies, formula, lines)
    arguments = {
        "how": how,
        "weights": weights,
        "lines": lines,
        "base": None if base is None else everything[-1].origin,
    }
    facts = {"maps": {}, "new": {}, "preserves": "no"}
    return delivered(Result("merge", arguments, first.config, stream, facts), dst, output, *everything)


def _weights(how: str, n: int, weights: Sequence[float] | None) -> list[float]:
    if how not in HOW:
        raise UsageError(f"how {how!r}: one of {', '.join(HOW)}")
    if weights is None:
        weights = {"linear": [1 / n] * n, "task": [1.0] * n, "slerp": [0.5, 0.5]}[how]
    if len(weights) != n or not all(math.isfinite(w) for w in weights):
        raise UsageError(f"{len(weights)} weights for {n} models: one finite number for each is expected")
    if how == "slerp" and sum(weights) <= 0:
        raise UsageError(f"weights {weights}: shares of the way from one to the other must sum to more than nothing")
    return [float(w) for w in weights]


def _refuse(how: str, sources: Sequence[Any], base: Any, lines: float | None) -> None:
    if len(sources) < (1 if how == "task" else 2) or (how == "slerp" and len(sources) != 2):
        raise UsageError(f"{how} of {len(sources)} models: {'two' if how == 'slerp' else 'more'} are expected")
    if (base is None) == (how == "task"):
        raise UsageError("task vectors need the base that they were trained from, and nothing else does")
    if lines is not None and how != "task":
        raise UsageError("lines scales task vectors: --how task")


def _refuse_others(first: Any, anatomy: Anatomy, other: Any, its: Anatomy) -> None:
    if its.family is not anatomy.family:
        raise UserError(
            f"{first.path} is {anatomy.family.name}, {other.path} is {its.family.name}: only one can be merged"
        )
    if unequal := [axis for axis in anatomy.sizes if anatomy.sizes[axis] != its.sizes[axis]]:
        axis = unequal[0]
        raise UserError(f"{axis} is {anatomy.sizes[axis]} in {first.path} and {its.sizes[axis]} in {other.path}")
    names = [{slot.key: name for slot, name in one.places.items()} for one in (anatomy, its)]
    if lone := names[0].keys() ^ names[1].keys():
        key = min(lone, key=str)
        raise UserError(f"only one of {first.path} and {other.path} has {(names[0] | names[1])[key]}")


def _merged(
    everything: list[Any], anatomies: list[Anatomy], formula: Callable[..., Any], lines: float | None
) -> Stream:
    names = [{slot.key: name for slot, name in anatomy.places.items()} for anatomy in anatomies]
    for slot in anatomies[0].places:
        rise = 1.0 if lines is None else lines + (1 - lines) * depth(slot, anatomies[0])
        places = [(checkpoint, name[slot.key]) for checkpoint, name in zip(everything, names, strict=True)]
        entry = places[0][0][places[0][1]]
        yield slot.name, Computed(entry.dtype, entry.shape, partial(_one, places, formula, rise))


def _one(places: list[tuple[Any, str]], formula: Callable[..., Any], rise: float):
    tensors = [checkpoint.tensor(name) for checkpoint, name in places]
    return widely(lambda wide: formula([wide, *(one.to(wide.dtype) for one in tensors[1:])], rise), tensors[0])


def depth(slot: Slot, anatomy: Anatomy) -> float:
    """0 in front of and in the first layer, 1 in the last one and behind it."""
    for axis, i in slot.at:
        if axis in anatomy.family.depth:
            return i / max(1, anatomy.sizes[axis] - 1)
    return 0.0 if slot.row.spec.looked_up is not None else 1.0


def _linear(weights: list[float], tensors: list[Any], _: float):
    return sum(tensor * weight for tensor, weight in zip(tensors, weights, strict=True))


def _task(weights: list[float], tensors: list[Any], rise: float):
    *tuned, base = tensors
    return base + rise * sum((one - base) * weight for one, weight in zip(tuned, weights, strict=True))


def _slerp(weights: list[float], tensors: list[Any], _: float):
    """Weights are shares of the way; nearly parallel tensors, and zeros, are averaged."""
    a, b = tensors
    share = weights[1] / (weights[0] + weights[1])
    cosine = float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300)) if a.norm() > 0 and b.norm() > 0 else 1.0
    if abs(cosine) > 0.9995:
        return a * (1 - share) + b * share
    angle = math.acos(cosine)
    return (a * math.sin((1 - share) * angle) + b * math.sin(share * angle)) / math.sin(angle)
