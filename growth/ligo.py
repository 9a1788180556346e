"""LiGO: every tensor of a bigger model as a linear function of a smaller one's (Wang et al. 2023, arXiv 2303.00980).

Depth first: a tensor of a new layer is a weighted sum of the same tensor of all old ones, with weights of its own.
Then width: an axis of n units becomes [I; B] of them. One B serves the residual stream, and each new layer has its own
for queries, keys, values and neurons, tied as in bert2BERT: who reads an axis reads what its writers write.

Three things differ from the authors' code, which knows two families. Attention grows by whole heads, so that rotary
pairs and fused projections stay what they are. A head that shares the embeddings' table goes on sharing it. And B
starts as copies of units instead of as random averages, while readers apply the transposed left inverse of [I; B]
instead of [I; B] itself: they read the old units whatever B is. So nothing is lost at the start, while after training
on neither way is clearly better (`benchmarks/LOG.md`); `random` is the published way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from growth.factors import Factors
from growth.families.table import Slot
from growth.maps import Layers, Units
from growth.noise import generator
from growth.shapes import EMBED, Key

NOISE = 0.03  # on the weights that a map starts from, as published
STARTS = ("copies", "random")
WHOLE = (EMBED, ("pool",), ("transform",))  # one map for all that is as wide as the residual stream


@dataclass(frozen=True)
class Ligo(Factors):
    """Maps whose entries are trained; `maps` and `layers` say of which copies new units and layers start."""

    layers: Mapping[str, Layers] = field(default_factory=dict)
    start: str = "copies"
    noise: float = NOISE
    seed: int = 0
    entries: dict[tuple, Any] = field(default_factory=dict)  # what is trained, by what it maps

    def prepare(self, slots: Iterable[Slot], dtype, device) -> None:
        """Every entry that the tensors in these places will need."""
        for slot in slots:
            made = {}
            if axis := self.depth(slot):
                made["depth", slot.key] = lambda slot=slot, axis=axis: self._weights(slot, axis)
            for key in {key for dim in slot.dims for key in self.parts(dim) if key in self.maps}:
                made[self._name(slot, key)] = lambda slot=slot, key=key: self._rows(slot, key)
            for name in made.keys() - self.entries.keys():
                self.entries[name] = made[name]().to(device, dtype).requires_grad_()

    def take(self, slot: Slot, sources: list[Any]):
        """The bigger model's tensor, of the same one of every old layer (of itself, outside of layers)."""
        offset = 1.0 if slot.row.is_norm and self.family.gain == "1+w" else 0.0
        gains = [source + offset for source in sources] if offset else sources
        mixed = sum(weight * gain for weight, gain in self._terms(slot, gains))
        return self.along(mixed, slot, lambda part, *at: self._mapped(part, slot, *at)) - offset

    def depth(self, slot: Slot) -> str | None:
        """The axis of depth that its name carries."""
        return next((axis for axis, _ in slot.at if axis in self.layers), None)

    def _terms(self, slot: Slot, sources: list[Any]):
        return zip(self.entries["depth", slot.key], sources, strict=True) if self.depth(slot) else [(1.0, sources[0])]

    def _mapped(self, part, slot: Slot, dim: int, d: int, key: Key):
        import torch

        return torch.tensordot(self._matrix(slot, d, key), part, dims=([1], [dim])).movedim(0, dim)

    def _matrix(self, slot: Slot, d: int, key: Key):
        """[new, old]: what this tensor does to an axis where it meets it."""
        write = self._write(slot, key)
        corrected = self.tied and key == (self._last_axis,)
        if slot.row.is_norm:
            last = corrected and slot.row.name == self.family.last_norm
            return self._read(write) * (self.root / self._embed_scale) if last else write
        if not self._reads(slot, d):
            return write * self._table_scale(slot)
        if corrected and not slot.row.body and key == EMBED:
            return write * (self._embed_scale / self.root)  # an untied head behind the corrected norm
        return self._read(write)

    def _write(self, slot: Slot, key: Key):
        """[I; B], old units standing where they are copied first."""
        import torch

        rows, units = self.entries[self._name(slot, key)], self.maps[key]
        first, rest = _first(units)
        write = rows.new_zeros(len(units), units.old)
        write[first, [units.index[j] for j in first]] = 1.0
        return write.index_copy(0, torch.tensor(rest, dtype=torch.long, device=rows.device), rows)

    def _read(self, write):
        """What was written as copies is read as what it was."""
        import torch

        return write if self.start == "random" else torch.linalg.solve(write.T @ write, write.T).T

    def _name(self, slot: Slot, key: Key) -> tuple:
        if key in WHOLE:
            return ("width", EMBED)
        return ("width", key, slot.at, self._role(slot, key))

    def _role(self, slot: Slot, key: Key) -> str:
        """Whose units these are: the output of attention reads what values write."""
        if key == ("ffn",) or self.family.fused:
            return ""
        if slot.row.is_norm:
            return "query" if "group" in key else "key"  # OLMo-2 norms both
        last = slot.row.name.rpartition(".")[2]
        return next((role for role, name in self.family.roles.items() if name.rpartition(".")[2] == last), "value")

    def _weights(self, slot: Slot, axis: str):
        """StackBERT with noise: mostly the layer that stands here in the stack."""
        import torch

        new, main = dict(slot.at)[axis], self.layers[axis].main
        weights = self.noise * torch.rand(self.sizes[axis], generator=generator(f"depth {slot.name}", self.seed))
        weights[main[new]] = 1.0
        return weights / weights.sum()

    def _rows(self, slot: Slot, key: Key):
        """B: copies of units with noise, or averages."""
        import torch

        units, draw = self.maps[key], generator(str(self._name(slot, key)), self.seed)
        _, rest = _first(units)
        rows = torch.rand(len(rest), units.old, generator=draw)
        if self.start == "copies":
            rows *= self.noise / units.old  # in sum over a row what it is for the few layers
            rows[range(len(rest)), [units.index[j] for j in rest]] = 1.0
        return rows / rows.sum(1, keepdim=True)


def _first(units: Units) -> tuple[list[int], list[int]]:
    """Where old units stand first, and all other places."""
    first = sorted({old: j for j, old in reversed(list(enumerate(units.index)))}.values())
    return first, sorted({*range(len(units))} - {*first})
