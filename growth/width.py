"""Growth in width: more hidden channels, heads, key-value heads or neurons, exactly where that is possible."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.errors import UsageError, UserError
from growth.fill import filled
from growth.maps import Units
from growth.operate import PLAIN, Output, Result, delivered, opened
from growth.reindex import units_stream
from growth.shapes import EMBED, HEAD, Key
from growth.sizes import new_sizes, sizes_asked
from growth.take import Widening, facts

HOW = ("exact", "fpi", "aki", "weighted", "zero", "mean")


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
    maps = filled(anatomy, want, how, seed)
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
