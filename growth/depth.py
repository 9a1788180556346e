"""Growth in depth: the model stacked, its layers interleaved or in any order, blocks that start as the identity."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from growth import families
from growth.anatomy import Anatomy, dissect
from growth.errors import UsageError, UserError
from growth.maps import Layers
from growth.masks import masks_of
from growth.operate import PLAIN, Output, Result, delivered, in_memory, opened, seen
from growth.reindex import followed, reindex

HOW = ("copy", "zero", "random")
MOST = 10_000  # layers; the deepest models have some hundreds
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


def refuse_many(layers: int) -> None:
    """Before a list of them is made."""
    if layers > MOST:
        raise UserError(f"{layers} layers would be made; at most {MOST} can be")


def ordered(layers: int, factor: int, order: str | Sequence[int]) -> list[int]:
    """The old layer of each new one, as users say it."""
    refuse_many(layers * factor)
    ways = {"stack": stacked, "interleave": interleaved}
    if isinstance(order, str) and order in ways:
        return ways[order](layers, factor)
    return parse_order(order, layers) if isinstance(order, str) else checked(order, layers)


def beside(src: str | Path, factor: int) -> Path:
    """Where a stacked checkpoint is written if nothing is said."""
    return Path(src).resolve().with_name(f"{Path(src).resolve().name}-x{factor}")


def stack(
    src: Any = ".",
    dst: str | Path | None = None,
    *,
    factor: int = 2,
    order: str | Sequence[int] = "stack",
    how: str = "copy",
    output: Output = PLAIN,
) -> Any:
    """A deeper checkpoint: `stack` (0 1 0 1), `interleave` (0 0 1 1), or any order of layers.

    `how` fills the new layers: `copy`, with which the function changes; `zero`, copies that add nothing yet, with which
    it stays; `random`, as a new model starts (MSG fades that in with a mask, which no checkpoint holds). These are the
    operators of the G_stack paper in depth; the fourth is `learn`.
    Without `dst` it is written beside the source as `<name>-x2`. A model in memory gives a model.
    """
    if dst is None and not in_memory(src):
        dst = beside(src, factor)
    if factor < 1:
        raise UsageError(f"factor {factor}: at least 1")
    if how not in HOW:
        raise UsageError(f"how {how!r}: one of {', '.join(HOW)}; `growth learn` trains maps")
    if how == "zero":
        _refuse_post_norm(src)

    def layers(n: int) -> Layers:
        places = ordered(n, factor, order)
        new = Layers.of(places).new
        return Layers.of(places, silent=new if how == "zero" else (), random=new if how == "random" else ())

    arguments = {"factor": factor, "order": order if isinstance(order, str) else list(order), "how": how}
    return transform("stack", arguments, src, dst, layers, output)


def insert(
    src: Any,
    dst: str | Path | None = None,
    *,
    layers: int | None = None,
    after: Sequence[int] | None = None,
    approximate: bool = False,
    output: Output = PLAIN,
) -> Any:
    """Blocks that change nothing: copies whose residual writers, weights and biases, are zero. The function stays.

    So many `layers`, evenly spread, or one behind each layer of `after`. Where a norm stands behind every residual sum
    (BERT), no block can be the identity; `approximate` allows one whose norms come near it.
    """
    if (layers is None) == (after is None) or (layers is not None and layers < 1) or after in ([], ()):
        raise UsageError("say either how many layers to insert (at least 1) or after which ones")
    if not approximate:
        _refuse_post_norm(src)

    def with_identities(n: int) -> Layers:
        refuse_many(n + (layers or 0))
        behind = sorted(checked(after, n) if after is not None else evenly(n, layers))
        order, silent = [], []
        for layer in range(n):
            copies = behind.count(layer)
            silent += range(len(order) + 1, len(order) + 1 + copies)
            order += [layer] * (1 + copies)
        return Layers.of(order, silent)

    arguments = {"layers": layers, "after": None if after is None else list(after), "approximate": approximate}
    return transform("insert", arguments, src, dst, with_identities, output)


def _refuse_post_norm(src: Any) -> None:
    family = families.of(seen(src).config)
    if family.norms == "post":
        raise UserError(
            f"{family.name} norms behind every residual sum, so no inserted block can be the identity;"
            " `growth insert --approximate` comes near, `growth stack --order` copies layers (the function changes)"
        )


def transform(
    operator: str,
    arguments: Mapping[str, Any],
    src: Any,
    dst: str | Path | None,
    layers: Callable[[int], Layers],
    output: Output,
) -> Any:
    """Any change of depth; `layers` gives the map of an axis of some size."""
    checkpoint = opened(src, dst, output)
    anatomy = dissect(checkpoint)
    maps = {axis: layers(anatomy.sizes[axis]) for axis in anatomy.family.depth}
    config, stream = reindex(checkpoint, anatomy, maps)
    masks = followed(anatomy, config, maps, masks_of(checkpoint, anatomy))
    result = Result(operator, arguments, config, stream, depth_facts(anatomy, maps), masks=masks)
    return delivered(result, dst, output, checkpoint)


def depth_facts(anatomy: Anatomy, maps: Mapping[str, Layers]) -> dict[str, Any]:
    """What the lineage says of a map of depth; identity blocks, and copies in place, are all that keep the function."""
    kept = all(_keeps(layers, anatomy.sizes[axis]) for axis, layers in maps.items())
    near = anatomy.family.norms == "post" and any(layers.silent for layers in maps.values())
    return {
        "maps": {axis: layers.order or layers.sources for axis, layers in maps.items()},
        "new": {axis: layers.new for axis, layers in maps.items()},
        "preserves": "no" if not kept else "approximate" if near else "exact",
    }


def _keeps(layers: Layers, n: int) -> bool:
    loud = [old for i, old in enumerate(layers.main) if i not in layers.silent]
    return layers.order is not None and not layers.random and loud == list(range(n))
