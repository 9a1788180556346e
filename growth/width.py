"""Growth in width: more hidden channels, heads, key-value heads or neurons, exactly where that is possible."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect, once
from growth.behind import told
from growth.errors import UsageError, UserError
from growth.fill import filled
from growth.maps import Units
from growth.operate import PLAIN, Output, Result, delivered, opened
from growth.reindex import units_stream
from growth.shapes import EMBED, HEAD, Key
from growth.sizes import CALLED, Sizes, by_axis, new_sizes
from growth.take import Widening, facts

HOW = ("exact", "fpi", "aki", "weighted", "mean", "zero", "random")
LOUDEST = 100  # noise; beyond it rounding would eat the weights


def widen(
    src: Any,
    dst: str | Path | None = None,
    *,
    how: str = "exact",
    noise: float = 0.01,
    seed: int = 0,
    output: Output = PLAIN,
    **sizes: int | None,
) -> Any:
    """A wider checkpoint, or a wider model where the source is one: `widen(src, dst, hidden=768, ffn=3072)`.

    The sizes are those of `Sizes`: hidden, heads, kv_heads, head_size, ffn, vocab, vocab_multiple. `how` fills the new
    hidden channels: `exact` picks even copies, weighted copies (RMS norms) or mean channels (layer norms), and refuses
    where none keeps the function; `weighted` and `mean` ask for one of them; `fpi` samples copies and `aki` also takes
    the new units from the layer above (Chen et al. 2022, arXiv 2110.07143): both leave the function where the width is
    no multiple. `zero` and `random` are no copies at all: new parameters are zero, which RMS norms can make up for, or
    as a new model starts (the operators of Du et al. 2024, arXiv 2405.15319, in width; MSG fades random ones in with a
    mask, which no checkpoint holds). `noise` tells copies, and zeros, apart without changing the function. Heads grow
    by channels that start silent, the vocabulary by rows of zeros behind its own.
    """
    asked = Sizes.of(sizes)
    if how not in HOW:
        raise UsageError(f"how {how!r}: one of {', '.join(HOW)}; `growth learn` trains maps")
    if not 0 <= noise <= LOUDEST:
        raise UsageError(f"noise {noise}: from 0 to {LOUDEST}, where 1 is as loud as the weights")
    checkpoint = opened(src, dst, output)
    anatomy = once(checkpoint, dissect(checkpoint))
    widening, preserves = planned(anatomy, asked, how, noise, seed)
    widening = replace(widening, told=told(checkpoint, anatomy))
    config = anatomy.family.resized(anatomy.config, new_sizes(widening))
    stream = units_stream(checkpoint, anatomy, widening, above=how == "aki")
    arguments = {**asdict(asked), "how": how, "noise": noise, "seed": seed}
    story = {"maps": facts(widening), "new": _new(widening), "preserves": preserves}
    return delivered(Result("widen", arguments, config, stream, story), dst, output, checkpoint)


def planned(anatomy: Anatomy, asked: Sizes, how: str, noise: float, seed: int) -> tuple[Widening, str]:
    """The maps for the sizes asked for, and whether they keep the function."""
    want = _wanted(anatomy, asked)
    maps = filled(anatomy, want, how, seed)
    if not maps:
        given = "these sizes are the source's own" if asked else "no size is given"
        raise UsageError(f"nothing to widen: {given}; --hidden, --heads, --kv-heads, --head-size, --ffn, --vocab")
    tied, root = anatomy.tied_head and EMBED in maps, _root(anatomy, want["embed"])
    deviation = anatomy.config.get("initializer_range", 0.02)
    widening = Widening(anatomy.family, anatomy.sizes, maps, tied, root, noise, seed, deviation)
    kept = keeps(anatomy, maps)
    if how == "exact" and not kept:
        raise UserError(
            f"{anatomy.family.name} norms over all heads at once: only whole multiples of them keep the function"
        )
    if how in ("aki", "random") or (how == "zero" and not kept and anatomy.family.norm == "layer"):
        return widening, "no"  # layer norms take another mean off where channels are zero
    return widening, "exact" if kept else "approximate"


def _wanted(anatomy: Anatomy, asked: Sizes) -> dict[str, int]:
    want, old = by_axis(anatomy, asked), anatomy.sizes
    if smaller := next((axis for axis in want if axis != "group" and want[axis] < old[axis]), None):
        raise UserError(
            f"{CALLED.get(smaller, smaller)} {want[smaller]} is less than the source's {old[smaller]}: widen only grows"
        )
    return want


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


def _new(widening: Widening) -> dict[str, Any]:
    return {" ".join(key): {"from": units.old, "to": len(units)} for key, units in widening.maps.items()}
