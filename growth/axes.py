"""The notation of tensor axes: which names the dimensions of a tensor carry, and which way it computes.

    "(kv group head) <- embed"     stored (out, in), torch's Linear; in a parenthesis: axes that share a dimension
    "embed -> (qkv heads head)"    stored (in, out): GPT-2's Conv1D
    "vocab | embed"                a table, looked up by row and not summed over
    "embed"                        a vector: a norm's gain

The stored order is the order written. ` + bias` says that a bias goes with it, which has the produced axes;
` + bias if KEY` asks the config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

Dims = tuple[tuple[str, ...], ...]  # one tuple of axes per stored dimension


@dataclass(frozen=True)
class Spec:
    """A parsed notation. The positions of the dimension that is written, summed over, or looked up."""

    dims: Dims
    produced: int
    consumed: int | None = None
    looked_up: int | None = None
    bias: bool | str = False  # never, always, or the config key that says so

    @property
    def out(self) -> tuple[str, ...]:
        return self.dims[self.produced]

    @property
    def read(self) -> tuple[str, ...]:
        return () if self.consumed is None else self.dims[self.consumed]

    def axes(self) -> set[str]:
        return {axis for dim in self.dims for axis in dim}


@cache
def parse(text: str) -> Spec:
    body, plus, bias = text.partition(" + bias")
    kind = next((arrow for arrow in ("<-", "->", "|") if arrow in body), "")
    dims = tuple(_dimension(part, text) for part in (body.split(kind) if kind else [body]))
    if len(dims) > 2 or (bias and not bias.startswith(" if ")):
        raise ValueError(f"{text!r}: write `out <- in`, `in -> out`, `rows | out` or `axis`, then ` + bias [if KEY]`")
    positions = {"<-": (0, 1, None), "->": (1, 0, None), "|": (1, None, 0), "": (0, None, None)}[kind]
    return Spec(dims, *positions, bias=bias.removeprefix(" if ") or bool(plus))


def _dimension(text: str, whole: str) -> tuple[str, ...]:
    found = re.fullmatch(r"\s*(?:\(([\w ]+)\)|(\w+))\s*", text)
    if not found:
        raise ValueError(f"{whole!r}: {text.strip()!r} is neither an axis nor a parenthesis of axes")
    return tuple((found[1] or found[2]).split())


def shape(dims: Dims, sizes: Mapping[str, int | None]) -> tuple[int | None, ...]:
    """Stored sizes; None where an axis is free (the labels of a classifier)."""
    return tuple(_product([sizes[axis] for axis in dim]) for dim in dims)


def _product(sizes: list[int | None]) -> int | None:
    return None if None in sizes else math.prod(sizes)


def fits(actual: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(actual) == len(expected) and all(e is None or a == e for a, e in zip(actual, expected, strict=True))
