"""The algebra of axis maps: what each place on a new axis is made of."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Mix = tuple[tuple[int, float], ...]  # weighted old places


@dataclass(frozen=True)
class Layers:
    """A map of an axis that names carry (depth, experts): every new place is a weighted sum of old ones."""

    sources: tuple[Mix, ...]
    silent: frozenset[int] = frozenset()  # new places that start as the identity: their residual writers are zero
    random: frozenset[int] = frozenset()  # new places that start as a fresh model does

    @classmethod
    def of(cls, order: Sequence[int], silent: Iterable[int] = (), random: Iterable[int] = ()) -> Layers:
        """Plain copies: new layer i is old layer order[i]."""
        return cls(tuple(((old, 1.0),) for old in order), frozenset(silent), frozenset(random))

    def __len__(self) -> int:
        return len(self.sources)

    def then(self, later: Layers) -> Layers:
        """This map first, `later` applied to its result."""
        mixes = [_merge([(w * v, old) for new, w in mix for old, v in self.sources[new]]) for mix in later.sources]
        silent = {i for i, mix in enumerate(later.sources) if all(new in self.silent for new, _ in mix)}
        random = {i for i, mix in enumerate(later.sources) if any(new in self.random for new, _ in mix)}
        return Layers(tuple(mixes), later.silent | silent, later.random | random)

    @property
    def main(self) -> list[int]:
        """The old layer that each new one mostly is; what cannot be mixed (its kind of attention) follows it."""
        return [max(mix, key=lambda term: abs(term[1]))[0] for mix in self.sources]

    @property
    def order(self) -> list[int] | None:
        """The old layer of each new one where all are plain copies."""
        return self.main if all(len(mix) == 1 and mix[0][1] == 1.0 for mix in self.sources) else None

    @property
    def new(self) -> list[int]:
        """Places that hold nothing for the first time: a copy of what stands below already, or the identity."""
        main = self.main
        made = self.silent | self.random
        return [i for i, old in enumerate(main) if i in made or old in _loud(main, i, made)]


def _loud(main: list[int], end: int, silent: frozenset[int]) -> set[int]:
    return {main[i] for i in range(end) if i not in silent}


def _merge(terms: list[tuple[float, int]]) -> Mix:
    total: dict[int, float] = {}
    for weight, old in terms:
        total[old] = total.get(old, 0.0) + weight
    return tuple(total.items())


@dataclass(frozen=True)
class Units:
    """A map of an axis in shapes: new unit j is old unit index[j], or -1 for an extra channel.

    Who writes the axis applies `scale`; who reads it shares each old unit out over its copies, so that the sum over
    copies of read x write / scale is one. Extra channels carry `extra`: zero, the mean of all old ones, or what random
    parameters make of them.
    """

    index: tuple[int, ...]
    old: int
    scale: float | tuple[float, ...] = 1.0
    extra: str = "zero"

    def __post_init__(self) -> None:
        if set(range(self.old)) - set(self.index):
            raise ValueError("a map of units must keep every old unit")

    def __len__(self) -> int:
        return len(self.index)

    @property
    def copies(self) -> list[int]:
        """How often the old unit of each new one stands on the new axis; 0 for extra channels."""
        counts = Counter(self.index)
        return [0 if old < 0 else counts[old] for old in self.index]

    @property
    def even(self) -> bool:
        return len(set(self.copies)) == 1

    @property
    def scales(self) -> list[float]:
        return list(self.scale) if isinstance(self.scale, tuple) else [self.scale] * len(self)


Place = tuple[tuple[str, int], ...]  # where a tensor stands on the axes of its name


@dataclass(frozen=True)
class Choice:
    """Units that are kept, the same number in every place; the places of an axis choose together or each its own."""

    kept: Mapping[Place, tuple[int, ...]]  # of the place (), if it is one choice for all

    def __len__(self) -> int:
        return len(next(iter(self.kept.values())))

    def at(self, place: Place) -> tuple[int, ...]:
        return self.kept[() if () in self.kept else place]


def tiled(old: int, new: int) -> tuple[int, ...]:
    """Whole repeats: 0 1 2 0 1 2 0."""
    return tuple(j % old for j in range(new))


def sampled(old: int, new: int, seed: int) -> tuple[int, ...]:
    """FPI's choice: whole repeats, then a random sample (Chen et al. 2022, arXiv 2110.07143)."""
    return (*tiled(old, new // old * old), *random.Random(seed).sample(range(old), new % old))


def padded(old: int, new: int) -> tuple[int, ...]:
    """Whole copies, as many as fit, and extra channels."""
    whole = new // old * old
    return (*tiled(old, whole), *[-1] * (new - whole))


def kept_first(old: int, new: int) -> tuple[int, ...]:
    """All old units once, and extra channels behind them."""
    return (*range(old), *[-1] * (new - old))


def rotary(old: int, new: int, turned: int, turned_new: int) -> tuple[int, ...]:
    """Channels of a head, of which the first `turned` turn in pairs (i, i + turned / 2).

    Pair i of n turns at base^(-i/n): in a head m times as large, the pair of that speed is m i.
    """
    index = [-1] * new
    for i in range(turned // 2):
        at = i * (turned_new // turned)
        index[at], index[at + turned_new // 2] = i, i + turned // 2
    index[turned_new : turned_new + old - turned] = range(turned, old)
    return tuple(index)


def dealt(kv: Units, group: int, new_group: int) -> tuple[int, ...]:
    """Query heads follow their key-value head: those of one old group are dealt over the places of its copies.

    Repeating queries one way and keys another connects them wrongly.
    """
    seen: Counter[int] = Counter()
    heads = []
    for old in kv.index:
        for _ in range(new_group):
            heads.append(old * group + seen[old] % group)
            seen[old] += 1
    return tuple(heads)


def placed(kv: Units, group: int, new_group: int) -> tuple[int, ...]:
    """The same where new heads are no copies: old ones stay in their group, and behind them stand new ones."""
    places = [(old, g) for old in kv.index for g in range(new_group)]
    return tuple(old * group + g if old >= 0 and g < group else -1 for old, g in places)
