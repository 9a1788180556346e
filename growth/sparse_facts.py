"""What is told of a sparse checkpoint: what its masks keep, part by part, and the FLOPs that this models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growth import families
from growth.accounting import Flops, density, matched, work_of
from growth.anatomy import dissect
from growth.bits import FILE
from growth.checkpoint import open
from growth.console import count, size
from growth.errors import UsageError
from growth.inspect import inspect
from growth.masks import read


def kept(path: str | Path) -> list[tuple[str, int, int, float]]:
    """For each kind of matrix: its name, how many there are, their weights, the share that is alive."""
    slots = {name: slot for slot, name in dissect(open(path)).places.items()}
    kinds = defaultdict(list)
    for name, mask in read(path).items():
        kinds[slots[name].row.name].append(mask)
    return [
        (kind, len(masks), sum(m.size for m in masks), sum(m.kept for m in masks) / sum(m.size for m in masks))
        for kind, masks in kinds.items()
    ]


def facts(path: str | Path, length: int) -> list[tuple[str, str]]:
    """Shares and modelled FLOPs of a sequence of so many tokens, and the dense model that costs as much."""
    if length < 1:
        raise UsageError(f"length {length}: at least one token")
    found, checkpoint = inspect(path), open(path)
    share = density(checkpoint.config, found.masks, dissect(checkpoint).prefix)
    work = work_of(checkpoint.config)
    dense, sparse = work.flops(length), work.flops(length, share)
    small = matched(checkpoint.config, length, share)
    alive, of = found.alive
    return [
        ("alive", f"{alive / of:.2%} of what has masks, {1 - (of - alive) / found.parameters:.2%} of all parameters"),
        ("masks", size((Path(path) / FILE).stat().st_size)),
        *_modelled(dense, sparse, length),
        ("executed FLOPs", f"{dense.total:.4g}: a mask alone skips nothing and saves no second"),
        ("dense model of equal FLOPs", ", ".join(_sizes(small))),
    ]


def _modelled(dense: Flops, sparse: Flops, length: int) -> Iterator[tuple[str, str]]:
    share = sparse.total / dense.total
    yield "modelled FLOPs", f"{sparse.total:.4g} of {dense.total:.4g}, {share:.3f}: a sequence of {length:,} tokens"
    for part in ("linear", "attention", "vocabulary"):
        yield f"  {part}", f"{getattr(sparse, part):.4g} of {getattr(dense, part):.4g}"


def _sizes(config: dict[str, Any]) -> Iterator[str]:
    sizes = families.of(config).sizes_of(config)
    yield from (f"{axis} {sizes[axis]}" for axis in ("layers", "embed", "heads", "kv", "group", "ffn") if axis in sizes)
    yield f"{count(work_of(config).weights)} weights in its blocks"
