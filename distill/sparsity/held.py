"""How masks are held in memory: a byte a weight, or a bit that is unpacked whenever it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

from torch import Tensor

from growth.bits import packed, unpacked


class Bits(MutableMapping[str, Tensor]):
    """A dict of bools that holds bits: an eighth of the memory; what it hands out is a copy."""

    def __init__(self):
        self._held: dict[str, tuple[Tensor, tuple[int, ...]]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return unpacked(*self._held[name])

    def __setitem__(self, name: str, bools: Tensor) -> None:
        self._held[name] = packed(bools.cpu()).to(bools.device), tuple(bools.shape)

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


HOLD: dict[str, type[MutableMapping[str, Tensor]]] = {"bools": dict, "bits": Bits}
