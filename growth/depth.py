"""Growth in depth: the model stacked, its layers interleaved or in any order, blocks that start as the identity."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.checkpoint import open
from growth.errors import UsageError, UserError
from growth.files import ensure_space
from growth.maps import Layers
from growth.reindex import bytes_after, reindex
from growth.writer import guard, lineage, write

RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def stacked(layers: int, factor: int) -> list[int]:
    """G_stack: the whole depth, repeated (Du et al. 2024, arXiv 2405.15319)."""
    return list(range(layers)) * factor


def interleaved(layers: int, factor: int) -> list[int]:
    """Every layer followed by its copies: 0 0 1 1 2 2."""
    return [layer for layer in range(layers) for _ in range(factor)]


def evenly(layers: int, inserted: int) -> list[int]:
    """The layers behind which blocks are inserted: spread over the depth (Wu et al. 2024, arXiv 2401.02415)."""
    return [round((i + 1) * layers / inserted) - 1 for i in range(inserted)]


def parse_order(text: str, layers: int) -> list[int]:
    """`0-23,8-31` -> [0, ..., 23, 8, ..., 31]; both ends of a range belong to it."""
    order: list[int] = []
    for part in text.replace(" ", "").split(","):
        found = RANGE.fullmatch(part)
        if not found:
            raise UsageError(f"order {text!r}: {part!r} is neither a layer nor a range such as 0-23")
        first, last = int(found[1]), int(found[2] or found[1])
        checked([first, last], layers)
        order += range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return checked(order, layers)


def checked(order: Sequence[int], layers: int) -> list[int]:
    """Layers that exist, those from the end (-1) counted from the start."""
    outside = [layer for layer in order if not -layers <= layer < layers]
    if outside or not order:
        what = f"layer {outside[0]} is not there" if outside else "no layer is left"
        raise UserError(f"{what}: the model has layers 0 to {layers - 1}")
    return [layer % layers for layer in order]


def stack(
    src: str | Path = ".",
    dst: str | Path | None = None,
    *,
    factor: int = 2,
    order: str | Sequence[int] = "stack",
    shard_size: str | int = "5GB",
    check: bool = False,
    overwrite: bool = False,
) -> Path:
    """A deeper checkpoint: `stack` (0 1 0 1), `interleave` (0 0 1 1), or any order of layers. The function changes.

    Without `dst` it is written beside the source as `<name>-x2`.
    """
    src = Path(src).resolve()
    dst = Path(dst) if dst is not None else src.with_name(f"{src.name}-x{factor}")
    if factor < 1:
        raise UsageError(f"factor {factor}: at least 1")

    def layers(n: int) -> Layers:
        ways = {"stack": stacked, "interleave": interleaved}
        if isinstance(order, str) and order in ways:
            return Layers.of(ways[order](n, factor))
        return Layers.of(parse_order(order, n) if isinstance(order, str) else checked(order, n))

    arguments = {"factor": factor, "order": order if isinstance(order, str) else list(order)}
    return transform("stack", arguments, src, dst, layers, shard_size=shard_size, check=check, overwrite=overwrite)


def insert(
    src: str | Path,
    dst: str | Path,
    *,
    layers: int | None = None,
    after: Sequence[int] | None = None,
    shard_size: str | int = "5GB",
    check: bool = False,
    overwrite: bool = False,
) -> Path:
    """Blocks that change nothing: copies whose residual writers, weights and biases, are zero. The function stays.

    So many `layers`, evenly spread, or one behind each layer of `after`.
    """
    if (layers is None) == (after is None) or (layers is not None and layers < 1):
        raise UsageError("say either how many layers to insert (at least 1) or after which ones")
    checkpoint = open(src)
    anatomy = dissect(checkpoint)
    if anatomy.family.norms == "post":
        raise UserError(
            f"{anatomy.family.name} norms behind every residual sum, so no inserted block can be the identity;"
            " `growth stack --order` copies layers instead (the function changes)"
        )

    def with_identities(n: int) -> Layers:
        behind = sorted(checked(after, n) if after is not None else evenly(n, layers))
        order, silent = [], []
        for layer in range(n):
            copies = behind.count(layer)
            silent += range(len(order) + 1, len(order) + 1 + copies)
            order += [layer] * (1 + copies)
        return Layers.of(order, silent)

    arguments = {"layers": layers, "after": None if after is None else list(after)}
    return transform(
        "insert", arguments, src, dst, with_identities, shard_size=shard_size, check=check, overwrite=overwrite
    )


def transform(
    operator: str,
    arguments: Mapping[str, Any],
    src: str | Path,
    dst: str | Path,
    layers: Callable[[int], Layers],
    *,
    shard_size: str | int,
    check: bool,
    overwrite: bool,
) -> Path:
    """Any change of depth, from directory to directory; `layers` gives the map of an axis of some size."""
    guard(Path(dst), [Path(src)], overwrite)
    checkpoint = open(src)
    if check:
        checkpoint.check_values()
    anatomy = dissect(checkpoint)
    maps = {axis: layers(anatomy.sizes[axis]) for axis in anatomy.family.depth}
    config, stream = reindex(checkpoint, anatomy, maps)
    pieces = list(stream)
    ensure_space(dst, bytes_after(pieces), f"{operator} into {dst}")
    facts = depth_facts(anatomy, maps)
    story = lineage(operator, arguments, [checkpoint], **facts)
    return write(dst, config, pieces, shard_size=shard_size, lineage=story, carry=src, overwrite=overwrite)


def depth_facts(anatomy: Anatomy, maps: Mapping[str, Layers]) -> dict[str, Any]:
    """What the lineage says of a map of depth; identity blocks, and copies in place, are all that keep the function."""
    exact = all(_keeps(layers, anatomy.sizes[axis]) for axis, layers in maps.items())
    return {
        "maps": {axis: layers.order or layers.sources for axis, layers in maps.items()},
        "new": {axis: layers.new for axis, layers in maps.items()},
        "preserves": "exact" if exact else "no",
    }


def _keeps(layers: Layers, n: int) -> bool:
    loud = [old for i, old in enumerate(layers.main) if i not in layers.silent]
    return layers.order is not None and loud == list(range(n))
