"""Parameters under the names that they have in a training model, where those are not the names on disk.

transformers renames a few tensors when it loads them, and stacks the matrices of all experts into one. The table of a
family says which (`in_memory`); here whole tensors become parts, as byte ranges, and parts whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from growth.anatomy import Anatomy
from growth.families.table import Slot
from growth.pieces import Computed, Piece, made
from growth.ranges import Entry

Place = tuple[str, int, int]  # name in memory, number of the part, of how many


def on_disk(held: Mapping[str, Entry], anatomy: Anatomy) -> dict[str, Entry]:
    """The tensors of a training model by their names on disk."""
    places = {slot.name: place(slot, anatomy) for slot in anatomy.places}
    known = {name: _part(held[whole], i, n) for name, (whole, i, n) in places.items() if whole in held}
    taken = {whole for whole, _, _ in places.values()}
    return known | {name: entry for name, entry in held.items() if name not in taken}


def _part(whole: Entry, i: int, n: int) -> Entry:
    """One of n equal parts of the bytes; of a stack [experts, rows, columns], rows of one expert."""
    if n == 1:
        return whole
    size = whole.nbytes // n
    columns = whole.shape[2:]
    rows = math.prod(whole.shape) // n // math.prod(columns)
    return replace(whole, shape=(rows, *columns), start=whole.start + i * size, end=whole.start + (i + 1) * size)


def name_in_memory(slot: Slot, anatomy: Anatomy) -> str:
    """What a training model calls a tensor, or the whole that it is a part of."""
    return place(slot, anatomy)[0]


def in_memory(stream: Iterable[tuple[str, Piece]], anatomy: Anatomy) -> Iterator[tuple[str, Piece]]:
    """The same stream by the names of a training model, parts put together."""
    slots = {slot.name: slot for slot in anatomy.places}
    waiting: dict[str, dict[int, Piece]] = {}
    for name, piece in stream:
        whole, i, n = place(slots[name], anatomy)
        parts = waiting.setdefault(whole, {})
        parts[i] = piece
        if len(parts) == n:
            del waiting[whole]
            yield whole, piece if n == 1 else _stacked([parts[i] for i in range(n)], anatomy)


def _stacked(parts: list[Piece], anatomy: Anatomy) -> Piece:
    experts, (rows, *columns) = anatomy.sizes["experts"], parts[0].shape
    shape = (experts, rows * len(parts) // experts, *columns)

    def make():
        import torch

        return torch.cat([made(part) for part in parts]).view(shape)

    return Computed(parts[0].dtype, shape, make)


def place(slot: Slot, anatomy: Anatomy) -> Place:
    """Where a tensor on disk stands in memory."""
    ways = anatomy.family.in_memory
    end = next((end for end in ways if slot.row.name.endswith(end)), None)
    if end is None:
        return slot.name, 0, 1
    start = slot.row.name.removesuffix(end)
    for axis, i in slot.at:
        start = start.replace(f"{{{axis}}}", str(i))
    whole = (anatomy.prefix if slot.row.body else "") + start + ways[end]
    together = [other for other in ways if ways[other] == ways[end]]
    expert = dict(slot.at).get("experts")
    if expert is None:
        return whole, 0, 1
    return whole, expert * len(together) + together.index(end), anatomy.sizes["experts"] * len(together)
