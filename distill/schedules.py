"""Numbers that change while a run goes on: learning rate, loss weights, temperature, masking rate. No torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer, model_validator

T = TypeVar("T")
Unit = Literal["steps", "tokens", "fraction", "flops"]
Shape = Literal["linear", "cosine", "geometric", "hold"]

Several = Annotated[tuple[T, ...], Field(strict=False)]
"""A list in YAML and in Python calls, a tuple once read."""

Pair = Annotated[tuple[T, T], Field(strict=False)]


class Value(BaseModel):
    """A frozen piece of a recipe: its fields are the keys, nothing else is taken, text is never read as a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


V = TypeVar("V", bound=Value)


@dataclass(frozen=True)
class Progress:
    """Where a run is: `step` of `steps` (None when nobody knows the end), tokens and FLOPs spent so far."""

    step: int
    steps: int | None = None
    tokens: int = 0
    flops: float = 0.0

    def measured_in(self, unit: Unit) -> float:
        if unit == "fraction":
            return self._fraction()
        return {"steps": self.step, "tokens": self.tokens, "flops": self.flops}[unit]

    def _fraction(self) -> float:
        if self.steps is None:
            raise ValueError("a schedule in fractions needs a run whose number of steps is known")
        return self.step / self.steps if self.steps else 1.0


class Schedule(Value):
    """A number, or points joined by segments; constant before the first point and after the last.

    `Schedule.constant(1.0)` and the recipe's bare `1.0` are the same. A segment ends in its right point, except
    `hold`, which jumps there.
    """

    unit: Unit = Field("steps", description="what the x of the points counts")
    points: Several[Pair[float]] = Field(description="[[x, y], ...] with growing x")
    shape: Shape | Several[Shape] = Field("linear", description="how points are joined: one for all, or one a segment")

    @classmethod
    def constant(cls, value: float) -> Schedule:
        return cls(points=((0.0, float(value)),))

    def at(self, progress: Progress) -> float:
        """The value there."""
        if self.is_constant:
            return self.points[0][1]
        x = progress.measured_in(self.unit)
        right = bisect_right(self.points, x, key=lambda point: point[0])
        if right == 0:
            return self.points[0][1]
        if right == len(self.points):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[right - 1 : right + 1]
        return _between(y0, y1, (x - x0) / (x1 - x0), self.shapes[right - 1])

    @property
    def value(self) -> float:
        """Of a number, or of a schedule that `fixed` has made one."""
        if not self.is_constant:
            raise ValueError("a schedule has a value only at some progress")
        return self.points[0][1]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """One for every segment."""
        return (self.shape,) * (len(self.points) - 1) if isinstance(self.shape, str) else self.shape

    @property
    def is_constant(self) -> bool:
        return len(self.points) == 1

    @model_validator(mode="before")
    @classmethod
    def _read_number(cls, given: Any) -> Any:
        if isinstance(given, int | float) and not isinstance(given, bool):
            return {"points": ((0.0, given),)}
        if isinstance(given, dict | Schedule):
            return given
        raise ValueError("expected a number or {unit: ..., points: [[x, y], ...], shape: ...}")

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if wrong := _mistake(self):
            raise ValueError(wrong)
        return self

    @model_serializer(mode="wrap")
    def _write_number(self, write) -> Any:
        return self.points[0][1] if self == Schedule.constant(self.points[0][1]) else write(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, core, handler) -> dict:
        return {"anyOf": [{"type": "number"}, handler(core)]}


def _above_zero(schedule: Schedule) -> Schedule:
    if min(y for _, y in schedule.points) <= 0:
        raise ValueError("must be greater than 0 all the time")
    return schedule


Temperature = Annotated[Schedule, AfterValidator(_above_zero)]


def fixed(value: V, progress: Progress) -> V:
    """The same value with every schedule in it as the number that it is there."""
    now = {name: Schedule.constant(field.at(progress)) for name, field in value if isinstance(field, Schedule)}
    return value.model_copy(update=now)


def _between(y0: float, y1: float, t: float, shape: Shape) -> float:
    if shape == "hold":
        return y0
    if shape == "geometric":
        return y0 * (y1 / y0) ** t
    if shape == "cosine":
        t = (1 - math.cos(math.pi * t)) / 2
    return y0 * (1 - t) + y1 * t


def _mistake(schedule: Schedule) -> str | None:
    xs = [x for x, _ in schedule.points]
    if not xs:
        return "points: at least one [x, y] is needed"
    if any(a >= b for a, b in pairwise(xs)):
        return f"points: x must grow from point to point, found {_list(xs)}"
    if xs[0] < 0 or (schedule.unit == "fraction" and xs[-1] > 1):
        return f"points: x in {schedule.unit} must be {'from 0 to 1' if schedule.unit == 'fraction' else '0 or more'}"
    if len(schedule.shapes) != len(xs) - 1:
        return f"shape: {len(xs)} points have {len(xs) - 1} segments, {len(schedule.shapes)} shapes are listed"
    ends = zip(schedule.shapes, pairwise(schedule.points), strict=True)
    if any(shape == "geometric" and min(a[1], b[1]) <= 0 for shape, (a, b) in ends):
        return "shape: geometric needs values above 0 at both ends; linear and cosine reach 0"
    return None


def _list(numbers: list[float]) -> str:
    return ", ".join(f"{x:g}" for x in numbers)
