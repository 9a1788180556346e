"""Sizes of a model as users name them, and as the axes of its family have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from growth.anatomy import Anatomy
from growth.errors import UsageError, UserError, did_you_mean
from growth.shapes import Axes

MOST = 1 << 24  # of any axis; the largest vocabularies have a million tokens
CALLED = {"embed": "hidden", "kv": "kv-heads", "head": "head-size"}  # axes whose size users know by another name


def _size(of: str) -> Any:
    return field(default=None, metadata={"help": of})


@dataclass(frozen=True)
class Sizes:
    """How large a model is to be; what is None stays as it is, or follows."""

    hidden: int | None = _size("Channels of the residual stream.")
    heads: int | None = _size("Query heads.")
    kv_heads: int | None = _size("Key-value heads.")
    head_size: int | None = _size("Channels of a head.")
    ffn: int | None = _size("Neurons of the feed-forward part.")
    vocab: int | None = _size("Rows of the embeddings: zeros behind the tokens.")
    vocab_multiple: int | None = _size("Or as many as make a multiple, such as 64.")

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> Sizes:
        """Of what a user wrote."""
        names = [one.name for one in fields(cls)]
        if strange := next((name for name in asked if name not in names), None):
            raise UsageError(f"no size is called {strange!r}{did_you_mean(strange, names)}; {', '.join(names)} are")
        if wrong := next((name for name, n in asked.items() if n is not None and (type(n) is not int or n < 1)), None):
            raise UsageError(f"{wrong} {asked[wrong]!r}: a whole number, at least 1")
        if large := next((name for name, n in asked.items() if (n or 0) > MOST), None):
            raise UsageError(f"{large} {asked[large]}: at most {MOST}")
        if asked.get("vocab") and asked.get("vocab_multiple"):
            raise UsageError("vocab says how many rows, so vocab_multiple cannot: give one of them")
        return cls(**asked)

    def __bool__(self) -> bool:
        return any(asdict(self).values())


def by_axis(anatomy: Anatomy, asked: Sizes) -> dict[str, int]:
    """The size of every axis; heads follow where they divide the model's width."""
    old = anatomy.sizes
    want = {
        "embed": asked.hidden or old["embed"],
        "ffn": asked.ffn or old["ffn"],
        "head": asked.head_size or old["head"],
        "vocab": asked.vocab or _multiple(old["vocab"], asked.vocab_multiple or 1),
    }
    if "kv" in old:
        return want | _grouped(old, asked)
    if asked.kv_heads:
        raise UserError(f"{anatomy.family.name} has no key-value heads apart from its heads")
    return want | {"heads": _followed(anatomy, asked.heads, want["embed"], want["head"])}


def _multiple(n: int, unit: int) -> int:
    """The smallest that is no less."""
    return -(-n // unit) * unit


def _grouped(old: Mapping[str, int], asked: Sizes) -> dict[str, int]:
    heads, kv = asked.heads or old["kv"] * old["group"], asked.kv_heads or old["kv"]
    if heads % kv:
        raise UserError(f"{heads} heads cannot share {kv} key-value heads evenly; {nearest(heads, kv)} can")
    return {"kv": kv, "group": heads // kv}


def _followed(anatomy: Anatomy, heads: int | None, embed: int, head: int) -> int:
    """Where heads divide the model's width, more width is more heads, unless these are to be larger."""
    if not callable(anatomy.family.sizes["head"]):
        return heads or anatomy.sizes["heads"]
    if heads and heads * head != embed:
        other = f" or --head-size {embed // heads}" if embed % heads == 0 and embed // heads > head else ""
        raise UserError(f"{heads} heads of {head} channels are {heads * head}, not hidden {embed};"
                        f" with --hidden {heads * head}{other} they fit")  # fmt: skip
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
