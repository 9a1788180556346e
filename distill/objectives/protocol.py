"""What the loop asks of an objective. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from distill.schedules import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from distill.models import Facts
    from distill.taps import Tap, Trace

Head = Literal["mlm", "causal", "classify", "rank"]
View = Literal["masked", "plain"]


class Needs(NamedTuple):
    """What an objective reads: taps of the student and of its target, which head gives the student's logits,
    whether the target's are wanted as well, which view of the row both sides have, and whether the target reads the
    same text in ids of its own. Of rankers, how many queries see each other's passages (None: each its own list)."""

    student: frozenset[Tap] = frozenset()
    target: frozenset[Tap] = frozenset()
    head: Head | None = None
    target_head: bool = False
    view: View = "masked"
    own_ids: bool = False
    group: int | None = None


def classifies(student: Facts) -> list[str]:
    """What is wrong with a student that is to say which class a row is of."""
    known = "classify" in student.kinds
    return [] if known else [f"objective classify: transformers has no classification head for {student.family}"]


class Objective(Protocol):
    """A frozen value whose fields are recipe keys; its terms are sums, which the loop divides by global counts."""

    weight: Schedule
    target: str | None

    def needs(self) -> Needs: ...

    def check(self, student: Facts, target: Facts | None) -> list[str]:
        """Every reason why this cannot work, before weights are loaded."""

    def count(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{term: what its sum is divided by}, from the batch alone: float64 scalars."""

    def terms(self, student: Trace, target: Trace | None, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{term: sum over the batch}."""
