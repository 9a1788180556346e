"""Hooks that keep masks: as they are, or changing. Frozen values whose fields are the keys of a recipe. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.hook import Hook
from distill.schedules import Pair, Progress, Schedule, Several
from growth.gradual import DENSE, EVERY, PRUNED, Gradual
from growth.scope import AXES

Positive = Annotated[int, Field(gt=0)]
SCOPE = tuple(AXES)
RIGL = Schedule(unit="fraction", points=[(0, 0.3), (0.75, 0.0)], shape="cosine")  # the paper's, 3 of 10 at first


class _Keeps(Hook):
    check_every: Positive = Field(100, description="steps between two looks at whether what is dead is zero")
    hold: Literal["bools", "bits"] = Field(
        "bools", description="masks in memory: a byte a weight, or a bit that every step unpacks"
    )


class Mask(_Keeps):
    """What masks call dead stays exactly zero (SPDF, Thangarasa et al. 2023, arXiv 2303.10464)."""

    from_: str | None = Field(None, alias="from", description="a sparse model or stage; null: the student's own masks")
    execute: Literal["dense", "2:4"] = Field(
        "dense", description="2:4: forward products skip the zeros of masks with this pattern, on a GPU in 16 bits"
    )

    @property
    def skips(self) -> bool:
        """Whether forward products leave out what is dead."""
        return self.execute != "dense"


class Sparsify(_Keeps):
    """Masks that change: ever fewer weights, the largest of all, or as many in other places.

    magnitude: of all weights in scope together the largest stay, and what has died stays dead (Jin et al. 2025, arXiv
    2501.12486). set, rigl: of each matrix the smallest weights die and as many come to life at zero, drawn (Mocanu et
    al. 2018, arXiv 1707.04780) or where the gradient is largest (Evci et al. 2020, arXiv 1911.11134).
    """

    how: Literal["magnitude", "set", "rigl"] = Field("magnitude", description="which weights live")
    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="at the end; the density falls geometrically between the two shares of `compute`"
    )
    compute: Pair[Annotated[float, Field(ge=0, le=1)]] = Field(
        (DENSE, PRUNED), description="shares of the compute of matrices between which weights die"
    )
    density: Schedule | None = Field(None, description="instead of `sparsity`: the density written out")
    drop: Schedule = Field(
        RIGL, description="of set and rigl: the share of live weights that moves, in steps or fraction"
    )
    every: Positive = Field(EVERY, description="steps between two changes")
    scope: Annotated[Several[Literal[SCOPE]], Field(min_length=1)] = Field(
        SCOPE, description="of magnitude from a dense start: parts whose matrices become sparse"
    )

    @model_validator(mode="after")
    def _check_amount(self) -> Sparsify:
        given = [key for key in ("sparsity", "density") if getattr(self, key) is not None]
        if self.how == "magnitude" and len(given) != 1:
            raise ValueError(f"exactly one of sparsity, density is needed, found {' and '.join(given) or 'none'}")
        if self.how != "magnitude" and given:
            raise ValueError(f"{given[0]}: {self.how} moves weights and keeps their number, which the start decides")
        if self.density and not all(0 < share <= 1 for _, share in self.density.points):
            raise ValueError("density: a share above 0, at which nothing is left, and at most 1, which is dense")
        return self

    @model_validator(mode="after")
    def _check_drop(self) -> Sparsify:
        if not all(0 <= share < 1 for _, share in self.drop.points):
            raise ValueError("drop: a share from 0, at which nothing moves, to below 1")
        if not self.drop.is_constant and self.drop.unit not in ("steps", "fraction"):
            raise ValueError(f"drop: in steps or fraction, not in {self.drop.unit}")
        return self

    def falls(self, progress: Progress) -> float | None:
        """The density from here on, where weights die; a prune comes before the step that it is due at."""
        if self.how != "magnitude":
            return None
        if self.density is None:
            plan = Gradual(self.sparsity, progress.steps, self.every, *self.compute)
            return plan.density(progress.step) if progress.step in plan.prunes else None
        due = progress.step % self.every == 0 or progress.step == progress.steps
        return self.density.at(progress) if due else None

    def moves(self, progress: Progress) -> float:
        """The share of live weights that moves after so many steps; none behind the last one, which nothing follows."""
        due = self.how != "magnitude" and 0 < progress.step < progress.steps and progress.step % self.every == 0
        return self.drop.at(progress) if due else 0.0
