"""What a family is: one table that says what every tensor of an architecture is for.

A name in a table may carry axes of its own, in braces: depth is the axis in `encoder.layer.{layers}.`, and experts
are the one in `experts.{experts}.`. `{layers>0}` leaves the first one out. Other marks on names:

    "encoder.layer.{layers}.": {...}     a group: its rows share the beginning of their name
    "pooler.?": {...}, "dense?"          may be absent, a group as a whole
    "wi_0 if gated", "wi if not gated"   present as the config says
    "predictions.bias"                   ends in .weight or .bias: the whole name of a tensor, not of a module
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from growth.axes import Dims, Spec, parse, shape
from growth.errors import UserError

IN_NAME = re.compile(r"\{(\w+)(?:>(\d+))?\}")  # {layers} or {layers>0}
Size = str | int | None | Callable[["View"], int]


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str  # with braces, without the prefix
    spec: Spec
    group: str  # "" must be there; others are whole or absent
    required: bool  # where its group is
    condition: str
    body: bool  # under the prefix of the base model, or in a head

    def parts(self, view: View) -> list[str]:
        """The tensors of a module: its weight, and its bias where there is one."""
        if self.name.endswith((".weight", ".bias")):
            return [""]
        with_bias = view.holds(self.spec.bias) if isinstance(self.spec.bias, str) else self.spec.bias
        return [".weight", ".bias"] if with_bias else [".weight"]

    @property
    def is_norm(self) -> bool:
        """A vector that is a module's weight; other vectors are biases under a name of their own."""
        spec = self.spec
        return (
            spec.consumed is None and spec.looked_up is None and not self.name.endswith((".weight", ".bias", ".bias?"))
        )

    @property
    def not_everywhere(self) -> bool:
        return ">" in self.name

    @property
    def in_place(self) -> bool:
        """Whether its name carries an axis: it belongs to a layer."""
        return bool(IN_NAME.search(self.name))

    def dims(self, part: str) -> Dims:
        return (self.spec.out,) if part == ".bias" else self.spec.dims


@dataclass(frozen=True)
class Slot:
    """A place for one tensor."""

    name: str
    row: Row
    part: str
    at: tuple[tuple[str, int], ...]  # where it stands on the axes that names carry
    dims: Dims
    shape: tuple[int | None, ...]

    @property
    def key(self) -> tuple:
        return self.row.name, self.part, self.at


@dataclass(frozen=True)
class Family:
    """An architecture as data; every operator works on it through this table alone."""

    name: str
    model_type: str
    sizes: Mapping[str, Size]  # axis -> config key, number, function of the config, or None (free)
    body: Mapping[str, Any]
    norm: str  # layer | rms
    norms: str  # pre: x + f(norm(x))   post: norm(x + f(x))   branch: x + norm(f(x))   sandwich: x + norm(f(norm(x)))
    prefixes: tuple[str, ...]  # of the base model inside a checkpoint with a head; "" is always allowed
    roles: Mapping[str, str]  # query, key, value: the modules that make them
    heads: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)  # tensor -> the tensor whose storage it shares
    ties: str = "tie_word_embeddings"  # config key: whether it does where only one of them is stored; "": always
    closing: tuple[str, ...] = ()  # norms that write to the residual stream, by the end of their row's name
    last_norm: str = ""  # the norm in front of the tied head, whose gain makes up for what happens to the table
    activated: tuple[str, str, str] | None = None  # a row, the norm it reads, the config key of what stands behind it
    embed_scale: bool = False  # the embeddings are multiplied by sqrt(embed)
    head_scale: str = ""  # config key: the tied head's input is divided by sqrt(embed)
    head_scaled: bool = True  # attention divides by sqrt(head)
    rotary: Callable[[View], int] | None = None  # how many channels of a head turn with their position
    renormalised: str = ""  # config key: whether the chosen experts' weights are made to sum to one; "": always
    epsilon: str = ""  # config key of an RMS norm's
    multiples: tuple[
        tuple[str, str], ...
    ] = ()  # config keys of which transformers wants the first to divide by the second
    gain: str = "w"  # what a norm multiplies by: its weight, or "1+w"
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of config keys, where a config.json may leave them out
    follows: Mapping[str, Callable[[Mapping[str, int]], int]] = field(default_factory=dict)  # keys made of several axes
    per_layer: tuple[str, ...] = ()  # config keys that hold one value per layer
    by_index: tuple[str, ...] = ()  # config keys that make a layer depend on its number
    buffers: tuple[str, ...] = ()  # stored by old versions, recomputed by new ones: dropped
    renamed: Mapping[str, str] = field(default_factory=dict)  # ends of old tensor names -> of today's
    in_memory: Mapping[str, str] = field(default_factory=dict)  # ends of rows -> of parameters of a loaded model
    depth: tuple[str, ...] = ("layers",)

    @cached_property
    def rows(self) -> list[Row]:
        heads = [row for head in self.heads.values() for row in _rows(head, next(iter(head)), body=False)]
        return [*_rows(self.body, "", body=True), *heads]

    @cached_property
    def in_names(self) -> set[str]:
        """The axes that names carry: depth, experts."""
        return {axis for row in self.rows for axis, _ in IN_NAME.findall(row.name)}

    @property
    def fused(self) -> bool:
        """Whether one matrix makes queries and keys."""
        return self.roles["query"] == self.roles["key"]

    def view(self, config: Mapping[str, Any]) -> View:
        return View(config, self)

    def sizes_of(self, config: Mapping[str, Any]) -> dict[str, int | None]:
        view = self.view(config)
        return {axis: view.size(axis, size) for axis, size in self.sizes.items()}

    def slots(self, config: Mapping[str, Any], prefix: str = "") -> dict[str, Slot]:
        """Every tensor that a checkpoint of this config may hold, by name."""
        view, sizes = self.view(config), self.sizes_of(config)
        rows = [row for row in self.rows if view.holds(row.condition)]
        return {slot.name: slot for row in rows for slot in _slots(row, prefix if row.body else "", view, sizes)}

    def buffer_names(self, config: Mapping[str, Any], prefix: str) -> set[str]:
        sizes = self.sizes_of(config)
        return {prefix + name for buffer in self.buffers for name, _ in _expand(buffer, sizes)}

    def resized(self, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """The config with other sizes; an error where this architecture cannot have them."""
        own = {key: sizes[axis] for axis, key in self.sizes.items() if isinstance(key, str) and axis in sizes}
        after = self.sizes_of(config) | dict(sizes)
        new = dict(config) | own | {key: follow(after) for key, follow in self.follows.items()}
        got = self.sizes_of(new)  # what the config leaves to a formula is written out where the formula fails
        off = [axis for axis, key in self.sizes.items() if isinstance(key, str) and got[axis] != after[axis]]
        stated = {self.sizes[axis]: after[axis] for axis in off}
        new, got = new | stated, self.sizes_of(new | stated)
        wrong = [f"{axis} {got[axis]} for {size}" for axis, size in after.items() if got[axis] != size]
        if wrong:
            raise UserError(f"{self.name} cannot have these sizes together: its config would give {', '.join(wrong)}")
        for whole, part in self.multiples:
            if new[whole] % new[part]:
                up = -(-new[whole] // new[part]) * new[part]
                raise UserError(f"{whole} {new[whole]} must be a multiple of {part} {new[part]}, such as {up}")
        return new

    def writers(self) -> list[Row]:
        """What adds to the residual stream at the end of each branch: zero makes a block the identity."""
        inside = [row for row in self.rows if any("{" + axis in row.name for axis in self.depth)]
        if self.norms in ("branch", "sandwich"):
            return [row for row in inside if row.name.endswith(self.closing)]
        return [row for row in inside if row.spec.out == ("embed",) and row.spec.read]


class View:
    """A config.json read with the family's defaults: `view.hidden_size` is a value or a named error."""

    def __init__(self, config: Mapping[str, Any], family: Family):
        self._config, self._family = config, family

    def __getattr__(self, key: str) -> Any:
        value = self._config.get(key)
        if value is None:
            if key not in self._family.defaults:
                raise UserError(f"config.json has no {key!r}, which {self._family.name} needs")
            value = self._family.defaults[key]
        return value(self) if callable(value) else value

    def holds(self, condition: str) -> bool:
        if condition.startswith("not "):
            return not self.holds(condition.removeprefix("not "))
        return not condition or bool(getattr(self, condition))

    def size(self, axis: str, size: Size) -> int | None:
        try:
            value = getattr(self, size) if isinstance(size, str) else size(self) if callable(size) else size
        except (TypeError, ZeroDivisionError) as error:
            raise UserError(f"config.json: {axis} cannot be told from its sizes ({error})") from None
        if value is not None and (type(value) is not int or value < 0):
            raise UserError(f"config.json gives {axis} = {value!r}; a whole number is expected")
        return value


def _rows(table: Mapping[str, Any], group: str, body: bool, start: str = "") -> Iterator[Row]:
    for written, value in table.items():
        name, _, condition = written.partition(" if ")
        optional = name.endswith("?")
        name = start + name.removesuffix("?")
        if isinstance(value, Mapping):
            yield from _rows(value, name if optional else group, body, name)
        else:
            yield Row(name, parse(value), group, not optional, condition, body)


def _slots(row: Row, prefix: str, view: View, sizes: Mapping[str, int | None]) -> Iterator[Slot]:
    for (name, at), part in itertools.product(list(_expand(row.name, sizes)), row.parts(view)):
        dims = row.dims(part)
        yield Slot(f"{prefix}{name}{part}", row, part, at, dims, shape(dims, sizes))


def _expand(name: str, sizes: Mapping[str, int | None]) -> Iterator[tuple[str, tuple[tuple[str, int], ...]]]:
    """`h.{layers}.` -> (`h.0.`, (("layers", 0),)), (`h.1.`, (("layers", 1),)) ..."""
    axes = [(axis, int(above) + 1 if above else 0) for axis, above in IN_NAME.findall(name)]
    holes = IN_NAME.sub("{}", name)
    for place in itertools.product(*(range(first, sizes[axis]) for axis, first in axes)):
        yield holes.format(*place), tuple(zip((axis for axis, _ in axes), place, strict=True))
