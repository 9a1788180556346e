"""Which units a smaller model keeps: the listed ones, or those of the largest weights.

The importance of a unit is the norm of all matrices that write or read it (magnitude pruning: Han et al. 2015,
arXiv 1506.02626). Heads and neurons of one layer have nothing to do with those of another, so each layer chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from growth.anatomy import Anatomy
from growth.errors import UserError
from growth.families.table import Slot
from growth.fill import FOLLOWERS
from growth.maps import Choice, Place
from growth.shapes import EMBED, Axes, Key, Selection
from growth.sizes import Sizes, by_axis, new_sizes

VOCAB, KV, QUERIES = ("vocab",), ("kv",), ("kv", "group")
AXES = {"embed": "hidden", "ffn": "ffn", "vocab": "vocab", "heads": "heads"}  # grouped heads are two axes
Chosen = int | Sequence[int]


def chosen(checkpoint: Any, anatomy: Anatomy, asked: Mapping[str, Chosen]) -> Selection:
    """The units to keep."""
    numbers = {name: what if isinstance(what, int) else len(what) for name, what in asked.items()}
    _refuse_less(numbers)
    if "kv_heads" in numbers and "kv" in anatomy.sizes:
        numbers.setdefault("heads", numbers["kv_heads"] * anatomy.sizes["group"])
    want = by_axis(anatomy, Sizes(**numbers))
    _refuse_more(anatomy, want)
    maps: dict[Key, Choice] = {}
    for axis, name in ((axis, name) for axis, name in AXES.items() if axis in want):
        what = asked.get(name, want[axis])
        if isinstance(what, list) or what != anatomy.sizes[axis]:
            maps[axis,] = _choice(checkpoint, anatomy, (axis,), what)
    if EMBED in maps:
        maps |= {(axis,): maps[EMBED] for axis in FOLLOWERS if anatomy.sizes.get(axis)}
    if "kv" in anatomy.sizes and {"heads", "kv_heads"} & asked.keys():
        maps |= _grouped(checkpoint, anatomy, asked, want)
    return Selection(anatomy.family, anatomy.sizes, maps)


def _refuse_less(numbers: Mapping[str, int]) -> None:
    none = next((name for name, n in numbers.items() if n < 1), None)
    if none:
        raise UserError(f"{numbers[none]} of {none} cannot be kept: at least 1")


def _refuse_more(anatomy: Anatomy, want: Mapping[str, int]) -> None:
    more = next((axis for axis in want if not 1 <= want[axis] <= anatomy.sizes[axis]), None)
    if more:
        raise UserError(f"{want[more]} of {more} cannot be kept: the model has {anatomy.sizes[more]}")


def _choice(checkpoint: Any, anatomy: Anatomy, key: Key, what: Chosen) -> Choice:
    axis = Axes(anatomy.family, anatomy.sizes, {key: None})
    if isinstance(what, int) and key == VOCAB:
        return Choice({(): tuple(range(what))})
    if not isinstance(what, int):
        return Choice({(): _listed(what, axis.size(key, 0), " ".join(key))})
    scores = _importance(checkpoint, anatomy, axis, key)
    return Choice({place: _largest(score, what) for place, score in scores.items()})


def _listed(units: Sequence[int], n: int, axis: str) -> tuple[int, ...]:
    wrong = next((unit for unit in units if not 0 <= unit < n), None)
    if wrong is not None:
        raise UserError(f"{axis} {wrong} is not there: the model has 0 to {n - 1}")
    if len(set(units)) < len(units):
        raise UserError(f"{axis}: one is listed twice")
    return tuple(units)


def _largest(score, n: int) -> tuple[int, ...]:
    if score.is_meta:  # only planned: any units will do
        return tuple(range(n))
    return tuple(sorted(score.topk(n).indices.tolist()))


def _importance(checkpoint: Any, anatomy: Anatomy, axis: Axes, key: Key) -> dict[Place, Any]:
    """Squared norm of every unit; of each layer for itself, unless a tensor outside of the layers has the axis too."""
    own = all(row.in_place for row in anatomy.family.rows if set(key) <= row.spec.axes() and _here(anatomy, row))
    scores: dict[Place, Any] = {}
    for slot, name in anatomy.places.items():
        for d, dim, position in _meets(slot, axis, key):
            squares = checkpoint.tensor(name).double().square()
            squares = squares.unflatten(d, [axis.size(part, squares.shape[d]) for part in dim])
            squares = squares.movedim(d + position, 0).flatten(1).sum(1)
            place = slot.at if own else ()
            scores[place] = scores.get(place, 0.0) + squares
    return scores


def _here(anatomy: Anatomy, row: Any) -> bool:
    return any(slot.row is row for slot in anatomy.places)


def _meets(slot: Slot, axis: Axes, key: Key) -> Iterator[tuple[int, list[Key], int]]:
    """The dimensions of a matrix on which the axis stands."""
    matrix = slot.part != ".bias" and len(slot.dims) == 2
    for d, dim in enumerate(slot.dims if matrix else ()):
        parts = list(axis.parts(dim))
        if key in parts:
            yield d, parts, parts.index(key)


def _grouped(
    checkpoint: Any, anatomy: Anatomy, asked: Mapping[str, Chosen], want: Mapping[str, int]
) -> dict[Key, Choice]:
    """Key-value heads with the queries that share them."""
    kv, group = anatomy.sizes["kv"], anatomy.sizes["group"]
    if isinstance(asked.get("heads"), list):
        queries = _listed(asked["heads"], kv * group, "head")
        shared = tuple(dict.fromkeys(query // group for query in queries))
        counts = {sum(query // group == one for query in queries) for one in shared}
        if len(counts) > 1 or want["kv"] != len(shared):
            raise UserError(f"the listed heads share {len(shared)} key-value heads, which must get equally many of them"
                            f" and be what --kv-heads says ({want['kv']})")  # fmt: skip
        ordered = tuple(query for one in shared for query in queries if query // group == one)
        return {KV: Choice({(): shared}), QUERIES: Choice({(): ordered})}
    shared = _choice(checkpoint, anatomy, KV, asked.get("kv_heads", want["kv"]))
    scores = _importance(checkpoint, anatomy, Axes(anatomy.family, anatomy.sizes, {QUERIES: None}), QUERIES)
    return {KV: shared, QUERIES: Choice({at: _dealt(shared.at(at), score.view(kv, group), want["group"])
                                         for at, score in scores.items()})}  # fmt: skip


def _dealt(shared: Sequence[int], score, group: int) -> tuple[int, ...]:
    """The largest query heads of every key-value head that is kept."""
    return tuple(one * score.shape[1] + query for one in shared for query in _largest(score[one], group))


def new_tokens(anatomy: Anatomy, axes: Selection) -> tuple[dict[str, Any], bool]:
    """The config after it, special tokens under their new numbers; and whether the tokenizer still fits."""
    config = anatomy.family.resized(anatomy.config, new_sizes(axes))
    if VOCAB not in axes.maps:
        return config, True
    number = {old: new for new, old in enumerate(axes.maps[VOCAB].at(()))}
    for key in [key for key in config if key.endswith("_token_id") and config[key] is not None]:
        config[key] = _renumbered(key, config[key], number)
    return config, list(number) == list(range(len(number)))


def _renumbered(key: str, ids: int | list[int], number: Mapping[int, int]) -> int | list[int]:
    if isinstance(ids, list):
        return [_renumbered(key, one, number) for one in ids]
    if type(ids) is not int or ids not in number:
        raise UserError(f"config.json needs token {ids} ({key}), which is not among the kept ones")
    return number[ids]


def facts(axes: Selection) -> dict[str, Any]:
    """What the lineage says: one list, or one for every layer."""
    return {" ".join(key): _fact(choice) for key, choice in axes.maps.items()}


def _fact(choice: Choice) -> Any:
    if () in choice.kept:
        return list(choice.at(()))
    return {".".join(str(i) for _, i in place): list(units) for place, units in choice.kept.items()}
