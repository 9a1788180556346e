"""Growth in width: more hidden channels, heads, key-value heads or neurons, exactly where that is possible."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.errors import UsageError, UserError
from growth.maps import Units, dealt, kept_first, padded, rotary, sampled, tiled
from growth.operate import PLAIN, Output, Result, delivered, opened
from growth.reindex import units_stream
from growth.take import EMBED, HEAD, Axes, Key, Widening, facts

HOW = ("exact", "fpi", "aki", "weighted", "zero", "mean")
FOLLOWERS = ("pool", "transform")  # as wide as the model, but not its residual stream


def widen(
    src: Any,
    dst: str | Path | None = None,
    *,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    ffn: int | None = None,
    head_size: int | None = None,
    vocab: int | None = None,
    vocab_multiple: int | None = None,
    how: str = "exact",
    noise: float = 0.01,
    seed: int = 0,
    output: Output = PLAIN,
) -> Any:
    """A wider checkpoint, or a wider model where the source is one.

    `how` fills the new hidden channels: `exact` picks even copies, weighted copies (RMS norms) or mean channels (layer
    norms), and refuses where none keeps the function; `weighted`, `zero` and `mean` ask for one of them; `fpi` samples
    copies and `aki` also takes the new units from the layer above (Chen et al. 2022, arXiv 2110.07143): both leave the
    function where the width is no multiple. `noise` tells copies apart without changing the function. Heads grow by
    channels that start silent, the vocabulary by rows of zeros behind its own, to `vocab` or up to a multiple.
    """
    if how not in HOW:
        raise UsageError(f"how {how!r}: one of {', '.join(HOW)}")
    checkpoint = opened(src, dst, output)
    anatomy = dissect(checkpoint)
    if vocab_multiple and vocab is None:
        vocab = -(-anatomy.sizes["vocab"] // vocab_multiple) * vocab_multiple
    asked = dict(hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, head_size=head_size, vocab=vocab)
    widening, preserves = planned(anatomy, asked, how, noise, seed)
    config = anatomy.family.resized(anatomy.config, new_sizes(widening))
    stream = units_stream(checkpoint, anatomy, widening, above=how == "aki")
    arguments = {**asked, "how": how, "noise": noise, "seed": seed}
    facts_ = {"maps": facts(widening), "new": _new(widening), "preserves": preserves}
    return delivered(Result("widen", arguments, config, stream, facts_), dst, output, checkpoint)


def planned(
    anatomy: Anatomy, asked: Mapping[str, int | None], how: str, noise: float, seed: int
) -> tuple[Widening, str]:
    """The maps for the sizes asked for, and whether they keep the function."""
    want = _wanted(anatomy, asked)
    maps = _embed_maps(anatomy, want["embed"], how, seed)
    maps |= _head_maps(anatomy, want, how, seed + 1) | _plain_map(anatomy, "ffn", want["ffn"], how, seed + 2)
    maps |= _size_of_heads(anatomy, want["head"]) | _vocabulary(anatomy, want["vocab"])
    if not maps:
        raise UsageError(
            "nothing to widen: give --hidden, --heads, --kv-heads, --head-size, --ffn or --vocab, above SRC"
        )
    tied, root = anatomy.tied_head and EMBED in maps, _root(anatomy, want["embed"])
    widening = Widening(anatomy.family, anatomy.sizes, maps, tied, root, noise, seed)
    kept = keeps(anatomy, maps)
    if how == "exact" and not kept:
        raise UserError(
            f"{anatomy.family.name} norms over all heads at once: only whole multiples of them keep the function"
        )
    return widening, "no" if how == "aki" else "exact" if kept else "approximate"


def _wanted(anatomy: Anatomy, asked: Mapping[str, int | None]) -> dict[str, int]:
    want = sizes_asked(anatomy, asked)
    smaller = next((axis for axis in want if axis != "group" and want[axis] < anatomy.sizes[axis]), None)
    if smaller:
        old = anatomy.sizes[smaller]
        raise UserError(f"{smaller} {want[smaller]} is less than the source's {old}: widen only grows")
    return want


def sizes_asked(anatomy: Anatomy, asked: Mapping[str, int | None]) -> dict[str, int]:
    """Sizes by axis; what is not asked for stays, and heads follow where they divide the model's width."""
    sizes, family = anatomy.sizes, anatomy.family
    names = {"embed": "hidden", "ffn": "ffn", "head": "head_size", "vocab": "vocab"}
    want = {axis: asked.get(name) or sizes[axis] for axis, name in names.items()}
    if "kv" in sizes:
        heads, kv = asked.get("heads") or sizes["kv"] * sizes["group"], asked.get("kv_heads") or sizes["kv"]
        if heads % kv:
            raise UserError(f"{heads} heads cannot share {kv} key-value heads evenly; {nearest(heads, kv)} can")
        want |= {"kv": kv, "group": heads // kv}
    elif asked.get("kv_heads"):
        raise UserError(f"{family.name} has no key-value heads apart from its heads")
    else:
        want["heads"] = asked.get("heads") or _followed(anatomy, want["embed"], want["head"])
    return want


def _followed(anatomy: Anatomy, embed: int, head: int) -> int:
    """Where heads divide the model's width, more width is more heads, unless these are to be larger."""
    if not callable(anatomy.family.sizes["head"]):
        return anatomy.sizes["heads"]
    if embed % head:
        raise UserError(f"hidden {embed} is not made of whole heads of {head} channels; {nearest(embed, head)} is")
    return embed // head


def nearest(n: int, unit: int) -> str:
    """The multiples around a number."""
    return " or ".join(str(m) for m in (n // unit * unit, n // unit * unit + unit) if m)


def _embed_maps(anatomy: Anatomy, new: int, how: str, seed: int) -> dict[Key, Units]:
    """The residual stream, and what is as wide as it without being part of it."""
    old, family = anatomy.sizes["embed"], anatomy.family
    if new == old:
        return {}
    stream = _stream_map(anatomy, old, new, how, seed)
    followers = {(axis,): Units(stream.index, old, extra=stream.extra) for axis in FOLLOWERS if axis in family.sizes}
    return {EMBED: stream, **followers}


def _stream_map(anatomy: Anatomy, old: int, new: int, how: str, seed: int) -> Units:
    family = anatomy.family
    if how in ("fpi", "aki"):
        return Units(sampled(old, new, seed), old)
    if how == "exact":
        how = _exact_way(anatomy, old, new)
    if (how in ("weighted", "zero")) != (family.norm == "rms") and how != "even":
        others = "mean, fpi or aki" if family.norm == "layer" else "weighted, zero, fpi or aki"
        raise UserError(f"{how} channels do not suit the {family.norm} norms of {family.name}; {others} do")
    if how == "even":
        return Units(tiled(old, new), old)
    if how == "weighted":
        even = Units(tiled(old, new), old)
        return Units(even.index, old, tuple(math.sqrt(new / (old * c)) for c in even.copies))
    return Units(padded(old, new), old, math.sqrt(new / (new // old * old)), how)


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
    shared = Units(_chosen(kv, want["kv"], how, seed), kv)
    try:
        return {("kv",): shared, ("kv", "group"): Units(dealt(shared, group, want["group"]), kv * group)}
    except ValueError:
        heads = group * want["kv"]
        raise UserError(
            f"{want['kv'] * want['group']} heads over {want['kv']} key-value heads leave no place for some of the"
            f" {group} that share one now; {heads} heads would do"
        ) from None


def _plain_map(anatomy: Anatomy, axis: str, new: int, how: str, seed: int) -> dict[Key, Units]:
    old = anatomy.sizes[axis]
    return {} if new == old else {(axis,): Units(_chosen(old, new, how, seed), old)}


def _chosen(old: int, new: int, how: str, seed: int) -> tuple[int, ...]:
    return sampled(old, new, seed) if how in ("fpi", "aki") else tiled(old, new)


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
    each = [one for one in (facts, *facts.values()) if isinstance(one, dict)]
    kinds = [one.get("rope_type", one.get("type", "default")) for one in each]
    if bent := next((kind for kind in kinds if kind not in ("default", "linear", "llama3")), None):
        raise UserError(f"heads cannot grow: rotary positions of type {bent!r} depend on their size")


def _vocabulary(anatomy: Anatomy, new: int) -> dict[Key, Units]:
    old = anatomy.sizes["vocab"]
    return {} if new == old else {("vocab",): Units(kept_first(old, new), old)}


def _root(anatomy: Anatomy, new: int) -> float:
    """What makes up for a division by sqrt(embed) in front of the head."""
    family = anatomy.family
    scaled = family.head_scale and getattr(family.view(anatomy.config), family.head_scale)
    return math.sqrt(new / anatomy.sizes["embed"]) if scaled else 1.0


def keeps(anatomy: Anatomy, maps: Mapping[Key, Units]) -> bool:
    """Whether norms see the same statistic: on the stream, and on anything else they stand over."""
    normed = {tuple(dim) for row in anatomy.family.rows if row.is_norm for dim in [row.spec.out] if row.body}
    others = [key for dim in normed for key in _mapped(dim, maps) if key not in (EMBED, HEAD)]
    return all(maps[key].even for key in others) and (EMBED not in maps or _stream_kept(anatomy, maps[EMBED]))


def _mapped(dim: tuple[str, ...], maps: Mapping[Key, Units]) -> list[Key]:
    return [key for key in maps if any(dim[i : i + len(key)] == key for i in range(len(dim)))]


def _stream_kept(anatomy: Anatomy, units: Units) -> bool:
    """Even copies always are; else the energy of every unit must grow as the width does."""
    if units.even:
        return True
    if anatomy.family.norm == "layer":
        return units.extra == "mean" and anatomy.family.norms == "pre" and not anatomy.family.closing
    energy = dict.fromkeys(range(units.old), 0.0)
    for old, scale in zip(units.index, units.scales, strict=True):
        if old >= 0:
            energy[old] += scale**2
    return all(math.isclose(e, len(units) / units.old, rel_tol=1e-9) for e in energy.values())


def new_sizes(axes: Axes) -> dict[str, int]:
    """Of every axis that is mapped."""
    sizes = {key[0]: len(units) for key, units in axes.maps.items() if len(key) == 1}
    if ("kv", "group") in axes.maps:
        sizes["group"] = len(axes.maps["kv", "group"]) // sizes["kv"]
    return sizes


def _new(widening: Widening) -> dict[str, Any]:
    return {" ".join(key): {"from": units.old, "to": len(units)} for key, units in widening.maps.items()}
