"""By how much each new unit is scaled where a tensor meets it: the rules under which a wider model is the same one.

Who reads an axis shares a unit out over its copies; norms, tied heads, attention and factors in the forward pass each
take something from the stream or add something to it, and what stands beside them makes up for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from growth.families.table import Slot
from growth.maps import Units
from growth.shapes import EMBED, HEAD, Axes, Key


@dataclass(frozen=True)
class Factors(Axes):
    """Maps to more units, and what the architecture makes of them."""

    maps: Mapping[Key, Units]
    tied: bool  # the head reads the embeddings' own table
    root: float = 1.0  # of the growth, where transformers divides by sqrt(embed) behind the last norm

    def factor(self, slot: Slot) -> float:
        """By how much the values of a tensor are scaled: its learning rate should be, too."""
        met = [(d, key) for d, dim in enumerate(slot.dims) for key in self.parts(dim) if key in self.maps]
        factors = [[factor for factor in self.factors_of(slot, d, key) if factor] for d, key in met]
        return math.prod(sum(each) / len(each) for each in factors)

    def factors_of(self, slot: Slot, d: int, key: Key) -> list[float]:
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
        own = key == EMBED and not slot.row.body and f"{slot.row.name}.weight" in self.family.tied
        return [1.0 / self.root if own else 1.0] * len(self.maps[key])

    def _norm_factors(self, slot: Slot, key: Key) -> list[float]:
        """Norms in front of a branch undo the scale of the stream, those that write to the stream keep it."""
        scales, gain = self.maps[key].scales, slot.part == ".weight"
        plain = [1.0] * len(scales)
        if self._to_stream(slot) and key == EMBED:
            return plain if gain else scales
        after = self._last_factors(key) if slot.row.name == self.family.last_norm and self.tied else plain
        return [x * self._spread(key) / a for x, a in zip(after, scales, strict=True)] if gain else after

    def _spread(self, key: Key) -> float:
        """What silent channels take from the deviation under a norm beside the stream (nearly: epsilon stays)."""
        real = sum(old >= 0 for old in self.maps[key].index)
        return 1.0 if key == EMBED or self.maps[key].extra == "random" else math.sqrt(real / len(self.maps[key]))

    def _to_stream(self, slot: Slot) -> bool:
        """Whether a norm writes to the residual stream instead of to a branch."""
        return self.family.norms == "post" or slot.row.name.endswith(self.family.closing or ("\0",))

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

    def _reads(self, slot: Slot, d: int) -> bool:
        return d == slot.row.spec.consumed and slot.part != ".bias"
