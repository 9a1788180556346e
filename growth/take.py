"""Reading a tensor through maps of its axes: copies are repeated where it writes and shared out where it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from growth.factors import Factors
from growth.families.table import Slot
from growth.maps import Units
from growth.noise import between_copies, drawn
from growth.shapes import HEAD, Key


@dataclass(frozen=True)
class Widening(Factors):
    """What happens to the values of a tensor on its way to more units, and back."""

    noise: float = 0.0  # of what readers see, relative to their weights, zero in sum over copies
    seed: int = 0
    deviation: float = 0.02  # of what is random
    told: Callable[[Slot], Any] = lambda slot: None  # what carries a mean where a mean of rows would not

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
        if units.extra == "random":
            return wide.where(~extra, self._random(wide, slot, dim))
        if self.noise and self._reads(slot, d):
            return wide + self._noise(tensor, wide, dim, slot, key)
        if self.noise and key == HEAD and self._key_alone(slot):
            return wide + self._noise(tensor, wide, dim, slot, key) * extra  # queries are zero there
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
        units, factors = self.maps[key], self.factors_of(slot, d, key)
        shares = [1.0 / (c * f) ** power if c and f else 0.0 for c, f in zip(units.copies, factors, strict=True)]
        return tensor.index_select(dim, _index(units)) * _lined(shares, dim, tensor, tensor.dtype)

    def _along(self, tensor, slot: Slot, dim: int, d: int, key: Key):
        return _lined(self.factors_of(slot, d, key), dim, tensor, tensor.dtype)

    def _extra(self, tensor, dim: int, slot: Slot, d: int, units: Units):
        """What extra channels hold: who writes the stream carries zero or the mean on, readers ignore it."""
        norm, bias = slot.row.is_norm, slot.part == ".bias"
        if norm and self.family.norm == "layer" and units.extra == "zero":
            return 0.0  # the mean is taken from a zero as well, which no gain is to let through
        if norm and not (bias and self._to_stream(slot)):
            return 0.0 if bias else 1.0  # a neutral gain
        if units.extra != "mean" or not (bias or slot.row.spec.produced == d):
            return 0.0
        told = self.told(slot)
        return tensor.mean(dim, keepdim=True) if told is None else told.to(tensor.dtype)

    def _random(self, wide, slot: Slot, dim: int):
        """As a new model starts: norms without effect, no biases, all else normal."""
        if slot.row.is_norm or slot.part == ".bias":
            return wide.new_tensor(float(slot.row.is_norm and slot.part == ".weight"))
        return drawn(wide.shape, f"{slot.name} {dim}", self.seed, wide.dtype) * self.deviation

    def _noise(self, tensor, wide, dim: int, slot: Slot, key: Key):
        noise = drawn(wide.shape, f"{slot.name} {dim}", self.seed, wide.dtype)
        return between_copies(noise, dim, self.maps[key], self._empty(key)) * self.noise * tensor.float().std()

    def _empty(self, key: Key) -> list[bool]:
        """Which extra channels nothing comes from: a post norm fills them, and values that are not new do."""
        units = self.maps[key]
        if key == ("kv", "group"):
            shared = self.maps["kv",].index
            return [shared[query * len(shared) // len(units)] < 0 for query in range(len(units))]
        return [self.family.norms != "post" or units.extra == "zero"] * len(units)


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
