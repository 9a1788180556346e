"""The algebra of axis maps: what each place on a new axis is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Mix = tuple[tuple[int, float], ...]  # weighted old places


@dataclass(frozen=True)
class Layers:
    """A map of an axis that names carry (depth, experts): every new place is a weighted sum of old ones."""

    sources: tuple[Mix, ...]
    silent: frozenset[int] = frozenset()  # new places that start as the identity: their residual writers are zero

    @classmethod
    def of(cls, order: Sequence[int], silent: Iterable[int] = ()) -> Layers:
        """Plain copies: new layer i is old layer order[i]."""
        return cls(tuple(((old, 1.0),) for old in order), frozenset(silent))

    def __len__(self) -> int:
        return len(self.sources)

    def then(self, later: Layers) -> Layers:
        """This map first, `later` applied to its result."""
        mixes = [_merge([(w * v, old) for new, w in mix for old, v in self.sources[new]]) for mix in later.sources]
        return Layers(tuple(mixes), later.silent | {i for i, mix in enumerate(later.sources) if self._silences(mix)})

    def _silences(self, mix: Mix) -> bool:
        return all(new in self.silent for new, _ in mix)

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
        return [i for i, old in enumerate(main) if i in self.silent or old in _loud(main, i, self.silent)]


def _loud(main: list[int], end: int, silent: frozenset[int]) -> set[int]:
    return {main[i] for i in range(end) if i not in silent}


def _merge(terms: list[tuple[float, int]]) -> Mix:
    total: dict[int, float] = {}
    for weight, old in terms:
        total[old] = total.get(old, 0.0) + weight
    return tuple(total.items())
