"""Maps of axes applied to the shapes of tensors: where an axis stands, what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from growth.families.table import Family, Slot
from growth.maps import Choice

Key = tuple[str, ...]
EMBED, HEAD = ("embed",), ("head",)


@dataclass(frozen=True)
class Axes:
    """Maps of axes in shapes; one map may be of several axes that share a dimension, as ("kv", "group")."""

    family: Family
    sizes: Mapping[str, int | None]  # of the source
    maps: Mapping[Key, Any]

    def touches(self, slot: Slot) -> bool:
        return any(key in self.maps for dim in slot.dims for key in self.parts(dim))

    def parts(self, dim: tuple[str, ...]) -> Iterator[Key]:
        """The axes of a dimension, those mapped together in one part."""
        at = 0
        while at < len(dim):
            ends = range(len(dim), at, -1)
            end = next((end for end in ends if dim[at:end] in self.maps), at + 1)
            yield dim[at:end]
            at = end

    def shape(self, slot: Slot, old: tuple[int, ...]) -> tuple[int, ...]:
        """Of the new tensor."""
        sides = []
        for n, dim in zip(old, slot.dims, strict=True):
            sides.append(math.prod(len(self.maps[k]) if k in self.maps else self.size(k, n) for k in self.parts(dim)))
        return tuple(sides)

    def size(self, key: Key, free: int) -> int:
        """Of some axes together, in the source."""
        return math.prod(free if self.sizes[axis] is None else self.sizes[axis] for axis in key)

    def along(self, tensor, slot: Slot, change: Callable[[Any, int, int, Key], Any], grown: bool = False):
        """`change(tensor, dim, d, key)` on every mapped part: `dim` is where it stands, `d` the stored dimension."""
        for d, dim in enumerate(slot.dims):
            keys = list(self.parts(dim))
            sides = [len(self.maps[k]) if grown and k in self.maps else self.size(k, tensor.shape[d]) for k in keys]
            tensor = tensor.unflatten(d, sides)
            for k, key in enumerate(keys):
                if key in self.maps:
                    tensor = change(tensor, d + k, d, key)
            tensor = tensor.flatten(d, d + len(keys) - 1)
        return tensor


@dataclass(frozen=True)
class Selection(Axes):
    """Some units of axes and no others; each layer may choose its own."""

    maps: Mapping[Key, Choice]

    def take(self, tensor, slot: Slot):
        """The tensor of what is kept."""
        import torch

        def select(part, dim: int, d: int, key: Key):
            return part.index_select(dim, torch.tensor(self.maps[key].at(slot.at)))

        return self.along(tensor, slot, select)
