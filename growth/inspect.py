"""What a checkpoint is, read from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.bits import Mask
from growth.families.table import Slot
from growth.files import read_json
from growth.masks import masks_of
from growth.operate import seen
from growth.undo import lineage_of
from growth.writer import LINEAGE


@dataclass(frozen=True)
class Summary:
    """The figures of `growth inspect`."""

    path: Path | str
    family: str
    architectures: list[str]
    sizes: dict[str, int]
    parts: dict[str, int]  # parameters of embeddings, attention, ffn, norms, heads
    dtypes: dict[str, int]  # tensors of each type
    tied: dict[str, str]
    buffers: list[str]
    files: int
    nbytes: int
    masks: dict[str, Mask]  # by tensor; the weights that they call dead are counted among the parameters
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def history(self) -> list[dict[str, Any]]:
        """How it came to be, the last step first, as far as the sources are still there."""
        return list(_history(self.lineage))

    @property
    def alive(self) -> tuple[int, int]:
        """Of the weights that have masks: how many are alive, and how many there are."""
        return sum(mask.kept for mask in self.masks.values()), sum(mask.size for mask in self.masks.values())

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())


def inspect(path: Any) -> Summary:
    """Family, sizes, parameters per part, tied tensors and lineage of a checkpoint, or of a model."""
    checkpoint = seen(path)
    anatomy = dissect(checkpoint)
    return Summary(
        path=checkpoint.path,
        family=anatomy.family.name,
        architectures=checkpoint.config.get("architectures") or [],
        sizes={axis: size for axis, size in anatomy.sizes.items() if size is not None},
        parts=_parts(anatomy, checkpoint),
        dtypes=dict(Counter(checkpoint[name].dtype for name in anatomy.places.values())),
        tied=anatomy.tied,
        buffers=sorted(anatomy.buffers),
        files=len(checkpoint.files),
        nbytes=checkpoint.nbytes,
        masks=masks_of(checkpoint, anatomy),
        lineage=lineage_of(checkpoint),
    )


def _history(story: dict[str, Any]) -> Iterator[dict[str, Any]]:
    told: set[str] = set()
    while story:
        yield story
        source = story["sources"][0]["path"]
        there = source not in told and (Path(source) / LINEAGE).is_file()
        told.add(source)
        story = read_json(Path(source) / LINEAGE) if there else {}


def _parts(anatomy: Anatomy, checkpoint) -> dict[str, int]:
    parts = Counter(dict.fromkeys(("embeddings", "attention", "ffn", "norms", "heads"), 0))
    for slot, name in anatomy.places.items():
        parts[part(slot)] += math.prod(checkpoint[name].shape)
    return {name: count for name, count in parts.items() if count}


def part(slot: Slot) -> str:
    """What a tensor belongs to, told by the axes of its row."""
    spec = slot.row.spec
    if not slot.row.body:
        return "heads"
    if spec.looked_up is not None:
        return "embeddings"
    if spec.consumed is None:
        return "norms"
    return "attention" if {"head", "heads", "kv"} & spec.axes() else "heads" if "pool" in spec.axes() else "ffn"
