"""Reading a tensor through maps of its axes: copies are repeated where it writes and shared out where it reads."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from growth.families.table import Family, Slot
from growth.maps import Choice, Units

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


@dataclass(frozen=True)
class Widening(Axes):
    """Maps to more units, and what the architecture makes of them."""

    tied: bool  # the head reads the embeddings' own table
    root: float = 1.0  # of the growth, where transformers divides by sqrt(embed) behind the last norm
    noise: float = 0.0  # of what readers see, relative to their weights, zero in sum over copies
    seed: int = 0

    def take(self, tensor, slot: Slot):
        """The tensor on the new axes."""
        offset = self._offset(slot)
        return self.along(tensor + offset, slot, lambda part, *at: self._select(part, slot, *at)) - offset

    def back(self, tensor, slot: Slot):
        """The tensor on the old axes: what `take` was given, noise and all (it sums to zero over copies)."""
        offset = self._offset(slot)
        return self.along(tensor + offset, slot, lambda part, *at: self._fold(part, slot, *at), grown=True) - offset

    def moment(self, tensor, slot: Slot, power: int):
        """Adam's moments on the new axes.

        A unit of factor f that stands c times gets 1 / (c f) of the gradient, since the loss is the same function.
        """
        return self.along(tensor, slot, lambda part, *at: self._share(part, slot, power, *at))

    def factor(self, slot: Slot) -> float:
        """By how much the values of a tensor are scaled: its learning rate should be, too."""
        met = [(d, key) for d, dim in enumerate(slot.dims) for key in self.parts(dim) if key in self.maps]
        factors = [[factor for factor in self._factors(slot, d, key) if factor] for d, key in met]
        return math.prod(sum(each) / len(each) for each in factors)

    def _offset(self, slot: Slot) -> float:
        return 1.0 if slot.row.is_norm and self.family.gain == "1+w" else 0.0

    def fresh(self, slot: Slot):
        """Where a tensor writes units that are copies or extra channels: True along its produced dimension."""
        import torch

        dim = slot.row.spec.out
        mask = torch.zeros(1, dtype=torch.bool)
        for key in self.parts(dim):
            units = self.maps.get(key)
            new = torch.arange(len(units)) >= units.old if units else torch.zeros(self.size(key, 0), dtype=torch.bool)
            mask = (mask[:, None] | new[None]).flatten()
        at = 0 if slot.part == ".bias" else slot.row.spec.produced
        return mask.view([-1 if d == at else 1 for d in range(len(slot.dims))])

    def _select(self, tensor, slot: Slot, dim: int, d: int, key: Key):
        units = self.maps[key]
        extra = _lined([old < 0 for old in units.index], dim, tensor)
        factors = self._along(tensor, slot, dim, d, key)
        wide = tensor.index_select(dim, _index(units)) * factors
        if self.noise and self._reads(slot, d):
            return wide + self._noise(tensor, wide, dim, units, slot)
        if self.noise and key == HEAD and self._key_alone(slot):
            return wide + self._noise(tensor, wide, dim, units, slot) * extra  # queries are zero there
        return wide if min(units.index) >= 0 else wide.where(~extra, self._extra(tensor, dim, slot, d, units) * factors)

    def _fold(self, tensor, slot: Slot, dim: int, d: int, key: Key):
        """The sum over copies, by the sum of their factors."""
        units = self.maps[key]
        real = [j for j, old in enumerate(units.index) if old >= 0]
        old = _index(units)[real]
        factors = self._along(tensor, slot, dim, d, key).index_select(dim, tensor.new_tensor(real).long())
        whole = factors.new_zeros([units.old if i == dim else 1 for i in range(tensor.dim())])
        sums = tensor.new_zeros([units.old if i == dim else n for i, n in enumerate(tensor.shape)])
        sums.index_add_(dim, old, tensor.index_select(dim, tensor.new_tensor(real).long()))
        return sums / whole.index_add_(dim, old, factors)

    def _share(self, tensor, slot: Slot, power: int, dim: int, d: int, key: Key):
        units, factors = self.maps[key], self._factors(slot, d, key)
        shares = [1.0 / (c * f) ** power if c and f else 0.0 for c, f in zip(units.copies, factors, strict=True)]
        return tensor.index_select(dim, _index(units)) * _lined(shares, dim, tensor, tensor.dtype)

    def _along(self, tensor, slot: Slot, dim: int, d: int, key: Key):
        return _lined(self._factors(slot, d, key), dim, tensor, tensor.dtype)

    def _reads(self, slot: Slot, d: int) -> bool:
        return d == slot.row.spec.consumed and slot.part != ".bias"

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

    def _factors(self, slot: Slot, d: int, key: Key) -> list[float]:
        """What each new unit is multiplied by where this tensor meets it."""
        units, spec = self.maps[key], slot.row.spec
        if key == HEAD:
            return [self._head_factor(slot, d) if old >= 0 else float(slot.row.is_norm) for old in units.index]
        if slot.row.is_norm:
            return self._norm_factors(slot, key)
        if d == spec.looked_up:
            return [1.0] * len(units)
        if slot.part == ".bias" or d == spec.produced:
            scale = self._table_scale(slot)
            return [a * scale for a in units.scales]
        shares = [1.0 / c if c else 0.0 for c in units.copies]
        return [share / seen if seen else 0.0 for share, seen in zip(shares, self._seen(slot, key), strict=True)]

    def _head_factor(self, slot: Slot, d: int) -> float:
        """Attention divides by the root of the head size: queries make up for it, or a fused projection as a whole.

        Where queries and keys are normed, they keep their energy and the gains make up for it.
        """
        spread = math.sqrt(len(self.maps[HEAD]) / self.maps[HEAD].old)
        root = spread if self.family.head_scaled else 1.0
        if slot.row.is_norm:
            return math.sqrt(root) / spread
        if self.family.fused:
            return 1 / math.sqrt(root) if self._reads(slot, d) else math.sqrt(root)
        if self._head_normed:
            return spread if self._is(slot, "query") or self._is(slot, "key") else 1.0
        return root if self._is(slot, "query") else 1.0

    @property
    def _head_normed(self) -> bool:
        return any(row.is_norm and "head" in row.spec.axes() for row in self.family.rows)

    def _is(self, slot: Slot, role: str) -> bool:
        return slot.row.name.endswith(self.family.roles[role])

    def _key_alone(self, slot: Slot) -> bool:
        """Whether it makes keys, and nothing but the queries' zeros meets what stands in their new channels."""
        return self._is(slot, "key") and not self.family.fused and not self._head_normed

    def _seen(self, slot: Slot, key: Key) -> list[float]:
        """The scale at which a reader sees each unit: norms in front of it have taken that of the stream away."""
        if self.tied and not slot.row.body and key == EMBED and self._last_axis == "embed":
            return self._last_factors(key)  # an untied head behind the norm that was corrected for the tied one
        bare = self.family.norms == "post" or (self.family.norms == "branch" and slot.row.body)
        if key == EMBED and bare:
            return self.maps[key].scales  # no norm stands between the stream and its readers
        return [1.0] * len(self.maps[key])

    def _norm_factors(self, slot: Slot, key: Key) -> list[float]:
        """Norms in front of a branch undo the scale of the stream, those that write to the stream keep it."""
        scales, gain = self.maps[key].scales, slot.part == ".weight"
        plain = [1.0] * len(scales)
        if self._to_stream(slot) and key == EMBED:
            return plain if gain else scales
        after = self._last_factors(key) if slot.row.name == self.family.last_norm and self.tied else plain
        return [x * self._spread(key) / a for x, a in zip(after, scales, strict=True)] if gain else after

    def _spread(self, key: Key) -> float:
        """What extra channels take from the deviation under a norm beside the stream (approximately: epsilon stays)."""
        real = sum(old >= 0 for old in self.maps[key].index)
        return 1.0 if key == EMBED else math.sqrt(real / len(self.maps[key]))

    def _last_factors(self, key: Key) -> list[float]:
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


def _index(units: Units):
    import torch

    return torch.tensor([max(old, 0) for old in units.index])


def _lined(values: list, dim: int, tensor, dtype=None):
    """A list along one dimension of a tensor."""
    import torch

    return torch.tensor(values, dtype=dtype).view([-1 if i == dim else 1 for i in range(tensor.dim())])


def facts(widening: Widening) -> dict[str, Any]:
    """What the lineage says of maps of width."""
    return {" ".join(key): list(units.index) for key, units in widening.maps.items()}
