"""Sizes of a model as users name them, and as the axes of its family have them."""

from __future__ import annotations

from collections.abc import Mapping

from growth.anatomy import Anatomy
from growth.errors import UserError
from growth.shapes import Axes

NAMES = {"embed": "hidden", "ffn": "ffn", "head": "head_size", "vocab": "vocab"}  # axis -> what users call its size


def sizes_asked(anatomy: Anatomy, asked: Mapping[str, int | None]) -> dict[str, int]:
    """Sizes by axis; what is not asked for stays, and heads follow where they divide the model's width."""
    sizes = anatomy.sizes
    want = {axis: asked.get(name) or sizes[axis] for axis, name in NAMES.items()}
    if "kv" in sizes:
        return want | _grouped(sizes, asked)
    if asked.get("kv_heads"):
        raise UserError(f"{anatomy.family.name} has no key-value heads apart from its heads")
    return want | {"heads": asked.get("heads") or _followed(anatomy, want["embed"], want["head"])}


def _grouped(sizes: Mapping[str, int], asked: Mapping[str, int | None]) -> dict[str, int]:
    heads, kv = asked.get("heads") or sizes["kv"] * sizes["group"], asked.get("kv_heads") or sizes["kv"]
    if heads % kv:
        raise UserError(f"{heads} heads cannot share {kv} key-value heads evenly; {nearest(heads, kv)} can")
    return {"kv": kv, "group": heads // kv}


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


def new_sizes(axes: Axes) -> dict[str, int]:
    """Of every axis that is mapped."""
    sizes = {key[0]: len(units) for key, units in axes.maps.items() if len(key) == 1}
    if ("kv", "group") in axes.maps:
        sizes["group"] = len(axes.maps["kv", "group"]) // sizes["kv"]
    return sizes
