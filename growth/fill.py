"""What new units are made of: which old unit each place on a wider axis copies, or what else it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from growth.anatomy import Anatomy
from growth.errors import UserError
from growth.maps import Units, dealt, kept_first, padded, placed, rotary, sampled, tiled
from growth.shapes import EMBED, HEAD, Key
from growth.sizes import nearest

FOLLOWERS = ("pool", "transform")  # as wide as the model, but not its residual stream
BARE = ("zero", "random")  # old units once, and new parameters behind them


def filled(anatomy: Anatomy, want: Mapping[str, int], how: str, seed: int) -> dict[Key, Units]:
    """The maps to the wanted sizes of axes; what keeps its size has none."""
    stream = _embed_maps(anatomy, want["embed"], how, seed)
    heads, neurons = _head_maps(anatomy, want, how, seed + 1), _plain_map(anatomy, "ffn", want["ffn"], how, seed + 2)
    return stream | heads | neurons | _size_of_heads(anatomy, want["head"]) | _vocabulary(anatomy, want["vocab"])


def _embed_maps(anatomy: Anatomy, new: int, how: str, seed: int) -> dict[Key, Units]:
    """The residual stream, and what is as wide as it without being part of it."""
    old = anatomy.sizes["embed"]
    if new == old:
        return {}
    stream = _stream_map(anatomy, old, new, how, seed)
    followers = {(axis,): Units(stream.index, old, extra=stream.extra) for axis in FOLLOWERS if anatomy.sizes.get(axis)}
    return {EMBED: stream, **followers}


def _stream_map(anatomy: Anatomy, old: int, new: int, how: str, seed: int) -> Units:
    family = anatomy.family
    if how in ("fpi", "aki"):
        return Units(sampled(old, new, seed), old)
    if how == "exact":
        how = _exact_way(anatomy, old, new)
    if how in BARE:  # what is not there takes energy from a norm's statistic, which the rest makes up for with zeros
        return Units(kept_first(old, new), old, math.sqrt(new / old) if how == "zero" else 1.0, how)
    if (how == "weighted") != (family.norm == "rms") and how != "even":
        others = ("mean" if family.norm == "layer" else "weighted") + ", fpi or aki"
        raise UserError(f"{how} channels do not suit the {family.norm} norms of {family.name}; {others} do")
    if how == "even":
        return Units(tiled(old, new), old)
    if how == "weighted":
        even = Units(tiled(old, new), old)
        return Units(even.index, old, tuple(math.sqrt(new / (old * c)) for c in even.copies))
    return Units(padded(old, new), old, math.sqrt(new / (new // old * old)), "mean")


def _exact_way(anatomy: Anatomy, old: int, new: int) -> str:
    """The way that keeps the function at this width."""
    family = anatomy.family
    if new % old == 0:
        return "even"
    if family.norm == "rms":
        return "weighted"
    if family.norms == "pre" and not family.closing:
        return "mean"
    raise UserError(
        f"{family.name} norms what it writes to its residual stream, so only multiples of {old} keep the function:"
        f" {nearest(new, old)}; --how fpi, aki or mean come near at {new}"
    )


def _head_maps(anatomy: Anatomy, want: Mapping[str, int], how: str, seed: int) -> dict[Key, Units]:
    if "heads" in want:
        return _plain_map(anatomy, "heads", want["heads"], how, seed)
    kv, group = anatomy.sizes["kv"], anatomy.sizes["group"]
    if (want["kv"], want["group"]) == (kv, group):
        return {}
    shared = _units(kv, want["kv"], how, seed)
    deal = placed if how in BARE else dealt
    try:
        queries = replace(shared, index=deal(shared, group, want["group"]), old=kv * group)
        return {("kv",): shared, ("kv", "group"): queries}
    except ValueError:
        heads = group * want["kv"]
        raise UserError(
            f"{want['kv'] * want['group']} heads over {want['kv']} key-value heads leave no place for some of the"
            f" {group} that share one now; {heads} heads would do"
        ) from None


def _plain_map(anatomy: Anatomy, axis: str, new: int, how: str, seed: int) -> dict[Key, Units]:
    old = anatomy.sizes[axis]
    return {} if new == old else {(axis,): _units(old, new, how, seed)}


def _units(old: int, new: int, how: str, seed: int) -> Units:
    if how in BARE:
        return Units(kept_first(old, new), old, extra=how)
    return Units(sampled(old, new, seed) if how in ("fpi", "aki") else tiled(old, new), old)


def _size_of_heads(anatomy: Anatomy, new: int) -> dict[Key, Units]:
    """Rotary heads grow by pairs of the same speed, others by channels behind their own."""
    old, family = anatomy.sizes["head"], anatomy.family
    if new == old:
        return {}
    if not family.rotary:
        return {HEAD: Units(kept_first(old, new), old)}
    _refuse_bent_rotation(anatomy)
    turned = family.rotary(family.view(anatomy.config))
    if new % old or turned % 2:
        near = nearest(new, old)
        raise UserError(f"head size {new}: rotary pairs keep their speed in multiples of {old} only; {near}")
    return {HEAD: Units(rotary(old, new, turned, turned * new // old), old)}


def _refuse_bent_rotation(anatomy: Anatomy) -> None:
    """Some ways to stretch rotary positions depend on the place of a pair, not on its speed alone."""
    facts = anatomy.config.get("rope_parameters") or anatomy.config.get("rope_scaling") or {}
    if not isinstance(facts, dict):
        raise UserError(f"config.json: rotary positions {facts!r} are not an object")
    each = [one for one in (facts, *facts.values()) if isinstance(one, dict)]
    kinds = [one.get("rope_type", one.get("type", "default")) for one in each]
    if bent := next((kind for kind in kinds if kind not in ("default", "linear", "llama3")), None):
        raise UserError(f"heads cannot grow: rotary positions of type {bent!r} depend on their size")


def _vocabulary(anatomy: Anatomy, new: int) -> dict[Key, Units]:
    old = anatomy.sizes["vocab"]
    return {} if new == old else {("vocab",): Units(kept_first(old, new), old)}
