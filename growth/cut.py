"""Smaller checkpoints: chosen layers of a bigger one, the usual start of a student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from growth.depth import checked, evenly, transform
from growth.errors import UsageError, UserError
from growth.maps import Layers


def kept(layers: int | Sequence[int], n: int) -> list[int]:
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
    src: str | Path,
    dst: str | Path,
    layers: int | Sequence[int],
    *,
    shard_size: str | int = "5GB",
    check: bool = False,
    overwrite: bool = False,
) -> Path:
    """A checkpoint of some of the layers: `layers=3` spaces them evenly, `layers=[0, 1, 5]` names them."""
    if isinstance(layers, bool) or (not isinstance(layers, int) and not all(isinstance(i, int) for i in layers)):
        raise UsageError(f"layers {layers!r}: a number of layers or a list of them")
    arguments = {"layers": layers if isinstance(layers, int) else list(layers)}
    return transform(
        *("cut", arguments, src, dst, lambda n: Layers.of(kept(layers, n))),
        **dict(shard_size=shard_size, check=check, overwrite=overwrite),
    )
