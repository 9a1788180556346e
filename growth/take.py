"""Reading a tensor through maps of its axes: copies are repeated where it writes and shared out where it reads."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from growth.families.table import Family, Slot
from growth.maps import Units

EMBED = ("embed",)


@dataclass(frozen=True)
class Widening:
    """Maps of axes, and what the architecture makes of them.

    A map may be of several axes that share a dimension, as ("kv", "group") for query heads.
    """

    family: Family
    sizes: Mapping[str, int | None]  # of the source
    maps: Mapping[tuple[str, ...], Units]
    tied: bool  # the head reads the embeddings' own table
    root: float = 1.0  # of the growth, where transformers divides by sqrt(embed) behind the last norm
    noise: float = 0.0  # of what readers see, relative to their weights, zero in sum over copies
    seed: int = 0

    def touches(self, slot: Slot) -> bool:
        return any(key in self.maps for dim in slot.dims for key in self.parts(dim))

    def parts(self, dim: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        """The axes of a dimension, those mapped together in one part."""
        at = 0
        while at < len(dim):
            ends = range(len(dim), at, -1)
            end = next((end for end in ends if dim[at:end] in self.maps), at + 1)
            yield dim[at:end]
            at = end

    def shape(self, slot: Slot, old: tuple[int, ...]) -> tuple[int, ...]:
        """Of the widened tensor."""
        sides = []
        for n, dim in zip(old, slot.dims, strict=True):
            sides.append(math.prod(len(self.maps[k]) if k in self.maps else self._size(k, n) for k in self.parts(dim)))
        return tuple(sides)

    def _size(self, key: tuple[str, ...], free: int) -> int:
        return math.prod(free if self.sizes[axis] is None else self.sizes[axis] for axis in key)

    def take(self, tensor, slot: Slot):
        """The tensor on the new axes."""
        offset = 1.0 if slot.row.is_norm and self.family.gain == "1+w" else 0.0
        wide = tensor + offset
        for d, dim in enumerate(slot.dims):
            keys = list(self.parts(dim))
            wide = wide.unflatten(d, [self._size(key, wide.shape[d]) for key in keys])
            for k, key in enumerate(keys):
                if key in self.maps:
                    wide = self._select(wide, d + k, slot, d, key)
            wide = wide.flatten(d, d + len(keys) - 1)
        return wide - offset

    def fresh(self, slot: Slot):
        """Where a tensor writes units that are copies or extra channels: True along its produced dimension."""
        import torch

        dim = slot.row.spec.out
        mask = torch.zeros(1, dtype=torch.bool)
        for key in self.parts(dim):
            units = self.maps.get(key)
            new = torch.arange(len(units)) >= units.old if units else torch.zeros(self._size(key, 0), dtype=torch.bool)
            mask = (mask[:, None] | new[None]).flatten()
        at = 0 if slot.part == ".bias" else slot.row.spec.produced
        return mask.view([-1 if d == at else 1 for d in range(len(slot.dims))])

    def _select(self, tensor, dim: int, slot: Slot, d: int, key: tuple[str, ...]):
        import torch

        units = self.maps[key]
        index = torch.tensor([max(old, 0) for old in units.index])
        extra = torch.tensor([old < 0 for old in units.index])
        reads = d == slot.row.spec.consumed and slot.part != ".bias"
        along = [-1 if i == dim else 1 for i in range(tensor.dim())]
        factors = torch.tensor(self._factors(slot, d, key), dtype=tensor.dtype).view(along)
        wide = tensor.index_select(dim, index) * factors
        if reads and self.noise:
            wide = wide + self._noise(tensor, wide, dim, units, slot)
        elif extra.any():
            wide = torch.where(extra.view(along), self._extra(tensor, dim, slot, d, units) * factors, wide)
        return wide

    def _extra(self, tensor, dim: int, slot: Slot, d: int, units: Units):
        """What extra channels hold: who writes the stream carries zero or the mean on, readers ignore it."""
        norm, bias = slot.row.is_norm, slot.part == ".bias"
        if norm and not (bias and self._to_stream(slot)):
            return 0.0 if bias else 1.0  # a neutral gain
        writes = bias or slot.row.spec.produced == d
        return tensor.mean(dim, keepdim=True) if writes and units.extra == "mean" else 0.0

    def _to_stream(self, slot: Slot) -> bool:
        """Whether a norm writes to the residual stream instead of to a branch."""
        return self.family.norms == "post" or slot.row.name.endswith(self.family.closing or ("\0",))

    def _factors(self, slot: Slot, d: int, key: tuple[str, ...]) -> list[float]:
        """What each new unit is multiplied by where this tensor meets it."""
        units, spec = self.maps[key], slot.row.spec
        if slot.row.is_norm:
            return self._norm_factors(slot, key)
        if d == spec.looked_up:
            return [1.0] * len(units)
        if slot.part == ".bias" or d == spec.produced:
            scale = self._table_scale(slot)
            return [a * scale for a in units.scales]
        shares = [1.0 / c if c else 0.0 for c in units.copies]
        return [share / seen if seen else 0.0 for share, seen in zip(shares, self._seen(slot, key), strict=True)]

    def _seen(self, slot: Slot, key: tuple[str, ...]) -> list[float]:
        """The scale at which a reader sees each unit: norms in front of it have taken that of the stream away."""
        if self.tied and not slot.row.body and key == EMBED and self._last_axis == "embed":
            return self._last_factors(key)  # an untied head behind the norm that was corrected for the tied one
        bare = self.family.norms == "post" or (self.family.norms == "branch" and slot.row.body)
        if key == EMBED and bare:
            return self.maps[key].scales  # no norm stands between the stream and its readers
        return [1.0] * len(self.maps[key])

    def _norm_factors(self, slot: Slot, key: tuple[str, ...]) -> list[float]:
        """Norms in front of a branch undo the scale of the stream, those that write to the stream keep it."""
        scales, gain = self.maps[key].scales, slot.part == ".weight"
        plain = [1.0] * len(scales)
        if self._to_stream(slot) and key == EMBED:
            return plain if gain else scales
        after = self._last_factors(key) if slot.row.name == self.family.last_norm and self.tied else plain
        return [x * self._spread(key) / a for x, a in zip(after, scales, strict=True)] if gain else after

    def _spread(self, key: tuple[str, ...]) -> float:
        """What extra channels take from the deviation under a norm beside the stream (approximately: epsilon stays)."""
        real = sum(old >= 0 for old in self.maps[key].index)
        return 1.0 if key == EMBED else math.sqrt(real / len(self.maps[key]))

    def _last_factors(self, key: tuple[str, ...]) -> list[float]:
        """What the last norm gives to each unit, so that the tied head, which cannot share out, sums to the same."""
        units, stream = self.maps[key], self.maps[EMBED]
        pairs = zip(units.copies, stream.scales, strict=True)
        return [self.root / (c * a * self._embed_scale) if c else 0.0 for c, a in pairs]

    @property
    def _last_axis(self) -> str:
        return next(row.spec.out[0] for row in self.family.rows if row.name == self.family.last_norm)

    def _table_scale(self, slot: Slot) -> float:
        """Gemma multiplies its embeddings by the root of their width."""
        return self._embed_scale if slot.row.name == self.family.rows[0].name else 1.0

    @property
    def _embed_scale(self) -> float:
        if not self.family.embed_scale or EMBED not in self.maps:
            return 1.0
        return math.sqrt(self.maps[EMBED].old / len(self.maps[EMBED]))

    def _noise(self, tensor, wide, dim: int, units: Units, slot: Slot):
        """Readers of copies are told apart at no cost: what is added sums to zero over the copies of each unit."""
        import torch

        key = hashlib.sha256(f"{self.seed} {slot.name} {dim}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        noise = torch.randn(wide.shape, generator=draw, dtype=wide.dtype).movedim(dim, 0)
        old = torch.tensor(units.index)
        copies = torch.tensor(units.copies, dtype=wide.dtype).view([-1] + [1] * (wide.dim() - 1))
        real = old >= 0  # norms leave nothing of extra channels, so what reads them is free
        if self.family.norms == "post":  # here what the norm writes is read, a bias included
            noise[~real] = 0
        sums = noise.new_zeros([units.old, *noise.shape[1:]]).index_add_(0, old[real], noise[real])
        noise[real] -= sums[old[real]] / copies[real]
        return noise.movedim(0, dim) * self.noise * tensor.float().std()


def facts(widening: Widening) -> dict[str, Any]:
    """What the lineage says of maps of width."""
    return {" ".join(key): list(units.index) for key, units in widening.maps.items()}
