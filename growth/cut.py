"""Smaller checkpoints: chosen layers, heads, neurons, channels or tokens of a bigger one, as students start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from growth.anatomy import dissect
from growth.depth import checked, depth_facts, evenly
from growth.errors import UsageError, UserError
from growth.maps import Layers
from growth.masks import masks_of
from growth.operate import PLAIN, Output, Result, Staged, delivered, opened
from growth.reindex import followed, reindex, units_stream

Chosen = int | Sequence[int]


def kept(layers: Chosen, n: int) -> list[int]:
    """So many layers, evenly spaced and always with the last one, or the listed ones in their order."""
    if isinstance(layers, int):
        if not 1 <= layers <= n:
            raise UserError(f"{layers} layers cannot be kept: the model has {n}")
        return evenly(n, layers)
    order = checked(layers, n)
    twice = next((layer for layer in order if order.count(layer) > 1), None)
    if twice is not None:
        raise UserError(f"layer {twice} is listed twice; `growth stack --order` repeats layers, cut does not")
    return order


def cut(
    src: Any,
    dst: str | Path | None = None,
    layers: Chosen | None = None,
    *,
    hidden: Chosen | None = None,
    heads: Chosen | None = None,
    kv_heads: Chosen | None = None,
    ffn: Chosen | None = None,
    vocab: Chosen | None = None,
    output: Output = PLAIN,
) -> Any:
    """A smaller checkpoint, or a smaller model where the source is one.

    A number keeps so many: layers evenly spaced, tokens from the first, all else by the norm of its weights, every
    layer its own heads and neurons. A list names what is kept.
    """
    units = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "vocab": vocab}
    asked = {name: _plain(name, chosen) for name, chosen in {"layers": layers, **units}.items() if chosen is not None}
    if not asked:
        raise UsageError("nothing to cut: say what to keep, such as layers=6")
    checkpoint = opened(src, dst, output)
    result = Result("cut", asked, checkpoint.config, checkpoint.items(), {"maps": {}, "new": {}, "preserves": "exact"})
    if layers is not None:
        result = _cut_layers(result, checkpoint, asked["layers"])
    if units := {name: asked[name] for name in units if name in asked}:
        result = _cut_units(result, Staged.of(result, checkpoint), units)
    return delivered(result, dst, output, checkpoint)


def _plain(name: str, chosen: Any) -> Chosen:
    if isinstance(chosen, int) and not isinstance(chosen, bool):
        return chosen
    if isinstance(chosen, (list, tuple, range)) and all(type(i) is int for i in chosen):
        return list(chosen)
    raise UsageError(f"{name} {chosen!r}: a number or a list of numbers")


def _cut_layers(result: Result, checkpoint: Any, layers: Chosen) -> Result:
    anatomy = dissect(checkpoint)
    maps = {axis: Layers.of(kept(layers, anatomy.sizes[axis])) for axis in anatomy.family.depth}
    config, stream = reindex(checkpoint, anatomy, maps)
    masks = followed(anatomy, config, maps, masks_of(checkpoint, anatomy))
    return replace(result, config=config, pieces=stream, facts=depth_facts(anatomy, maps), masks=masks)


def _cut_units(result: Result, staged: Staged, asked: Mapping[str, Chosen]) -> Result:
    from growth.choose import chosen, facts, new_tokens

    anatomy = dissect(staged)
    axes = chosen(staged, anatomy, asked)
    config, carry = new_tokens(anatomy, axes)
    maps = {**result.facts["maps"], **facts(axes)}
    return replace(
        *(result,),
        **dict(config=config, pieces=units_stream(staged, anatomy, axes), carry=carry),
        facts={"maps": maps, "new": result.facts["new"], "preserves": "no"},
        masks=None,
    )
