"""What changes during training: parts of the student that sit a step out, parameters that are never trained.

A new hook is a `Hook` here, or in a file of its own, and a line in `HOOKS`. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from distill.hook import Hook, Part
from distill.lowrank.refactor import Refactor
from distill.schedules import Several
from distill.sparsity.values import Mask, Sparsify
from growth.errors import UserError
from growth.files import read_json
from growth.writer import LINEAGE

if TYPE_CHECKING:
    from torch import nn

    from distill.models import Facts
    from distill.objectives import Objective


class Submodel(Hook):
    """Every step trains the top of a shallower student (bert2BERT, Chen et al. 2022, arXiv 2110.07143).

    A step draws a depth, runs that many of the first blocks and updates the top `train_top` of them and what comes
    behind the blocks: final norm and head, which all depths share. The blocks below and the embeddings stay as they
    are to the bit, and so do their moments and their count of steps. A table tied to the head learns as the head.
    """

    depths: Annotated[Several[Annotated[int, Field(gt=0)]], Field(min_length=1)] = Field(
        description="numbers of blocks; each step draws one, all alike"
    )
    train_top: Annotated[int, Field(gt=0)] = Field(description="how many of the blocks that run are updated")

    @model_validator(mode="after")
    def _check_depths(self) -> Submodel:
        if list(self.depths) != sorted(set(self.depths)) or self.depths[0] < self.train_top:
            raise ValueError(f"depths must grow, from train_top={self.train_top} or more")
        return self

    def check(self, student: Facts, objectives: Iterable[Objective]) -> list[str]:
        deep = [f"depth {d}, but the student has {student.layers} blocks" for d in self.depths if d > student.layers]
        needs = [objective.needs() for objective in objectives]
        if any(need.student or not need.head for need in needs):
            return [*deep, "losses must read the head alone: a tapped layer may not run"]
        return deep

    def parts(self) -> tuple[Part, ...]:
        return tuple(Part(depth, depth - self.train_top) for depth in self.depths)


class Freeze(Hook):
    """Parameters that are never trained; gradients still pass through them."""

    train: Literal["new"] | None = Field(None, description="new: only the layers that growth.json says were added")
    layers: Several[Annotated[int, Field(ge=0)]] = Field((), description="these layers, from 0")
    embeddings: bool = Field(False, description="the tables of tokens, positions and types (a tied head with them)")

    @model_validator(mode="after")
    def _check_some(self) -> Freeze:
        if not (self.train or self.layers or self.embeddings):
            raise ValueError("one of train, layers, embeddings is needed")
        if self.train and (self.layers or self.embeddings):
            raise ValueError("train: new freezes all the rest already")
        return self

    def check(self, student: Facts, objectives: Iterable[Objective]) -> list[str]:
        return [f"no layer {n}: the student has 0 to {student.layers - 1}" for n in self.layers if n >= student.layers]

    def prepare(self, student: nn.Module, start: Path) -> None:
        found = _blocks(student)
        if self.train:
            student.requires_grad_(False)
            for n in added(start):
                found[n].requires_grad_(True)
        for n in self.layers:
            found[n].requires_grad_(False)
        for table in _tables(student) if self.embeddings else ():
            table.requires_grad_(False)


HOOKS: dict[str, type[Hook]] = {
    "submodel": Submodel, "freeze": Freeze, "refactor": Refactor, "mask": Mask, "sparsify": Sparsify,
}  # fmt: skip


# Before training


def added(start: Path) -> list[int]:
    """The layers of a checkpoint that were not in the one it was grown from."""
    if not (Path(start) / LINEAGE).is_file():
        raise UserError(f"freeze train: new: {start} has no {LINEAGE}; only what a growth made says what is new in it")
    new = read_json(Path(start) / LINEAGE)["new"]
    if not new.get("layers"):
        grown = f"; what grew is {', '.join(axis for axis in new if new[axis])}" if any(new.values()) else ""
        raise UserError(f"freeze train: new: {Path(start) / LINEAGE} tells of no new layers{grown}")
    return new["layers"]


def parts(hooks: Sequence[Hook]) -> tuple[Part, ...]:
    return next((found for hook in hooks if (found := hook.parts())), ())


def updated_in(student: nn.Module, parts: Sequence[Part]) -> dict[str, frozenset[Part]]:
    """{parameter: the parts in which it is updated}; what is outside of the blocks is not named: all of them."""
    if not parts:
        return {}
    block = {p: n for n, found in enumerate(_blocks(student)) for p in found.parameters()}
    return {
        name: frozenset(part for part in parts if part.first <= block[p] < part.depth)
        for name, p in student.named_parameters()
        if p in block
    }


# In a step


def drawn(parts: Sequence[Part], seed: int, step: int) -> Part | None:
    """What takes part in this step: a function of (seed, step)."""
    from distill.corpus import order

    return parts[int(order.raw(1, seed, order.PART, step)[0]) % len(parts)] if parts else None


@cache  # asked for every parameter, and a long run has many steps
def updates(parts: tuple[Part, ...], seed: int, steps: int, updated: frozenset[Part] | None) -> int:
    """How many of the first `steps` steps updated what is updated in these parts (None: in all)."""
    return steps if updated is None else sum(drawn(parts, seed, step) in updated for step in range(steps))


@contextmanager
def taking_part(student: nn.Module, part: Part | None) -> Iterator[None]:
    """Only the first blocks of the student run, and no gradient goes below the first that learns."""
    if part is None:
        yield
        return
    found = _blocks(student)
    held_by = next(module for module in student.modules() if set(found) <= set(module.children()))
    whole = held_by._modules
    cut = found[part.first].register_forward_pre_hook(_detached, with_kwargs=True, prepend=True)
    held_by._modules = dict(list(whole.items())[: part.depth])
    try:
        yield
    finally:
        held_by._modules = whole
        cut.remove()


def _detached(module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
    from torch import Tensor

    def free(value):
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(free(value) for value in arguments), {key: free(value) for key, value in named.items()}


def _blocks(student: nn.Module) -> list[nn.Module]:
    from distill import taps

    return taps.blocks(student.base_model)


def _tables(student: nn.Module) -> Iterator[nn.Module]:
    from torch import nn

    return (module for module in student.base_model.modules() if isinstance(module, nn.Embedding))
