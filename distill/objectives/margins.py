"""Margins of student and teacher side by side: whether they can agree at all, and the factor that makes them."""

from __future__ import annotations

from torch import Tensor

from distill.objectives.score_lists import alike
from growth.errors import UserError


def margin_scale(student: Tensor, teacher: Tensor) -> float:
    """`scale: auto`: the factor that brings the student's margins to the spread of the teacher's, from some of both."""
    alike(student=student, teacher=teacher)
    spreads = [float(x.double().std()) if x.numel() > 1 else 0.0 for x in (student.detach(), teacher)]
    if not (0 < spreads[0] < float("inf") and 0 < spreads[1] < float("inf")):
        raise UserError(
            "scale: auto needs margins that differ; "
            f"their standard deviations are {spreads[0]:g} (student) and {spreads[1]:g} (teacher)"
        )
    return spreads[1] / spreads[0]


def scale_mismatch(student: Tensor, teacher: Tensor, bound: float | None = None) -> str | None:
    """What is wrong where the student's margins cannot be, or by far are not, as wide as the teacher's.

    `bound`: the widest margin that the student can make (2 for cosines), None if there is no such thing.
    """
    spread, taught, widest = float(student.double().std()), float(teacher.double().std()), float(teacher.abs().max())
    if bound is not None and widest > bound:
        beyond = 100 * float((teacher.abs() > bound).double().mean())
        return (
            f"the student's similarity is a cosine, so its margins end at {bound:g}; the teacher's go to {widest:.3g}, "
            f"{beyond:.0f} % are beyond: scale: auto would be {margin_scale(student, teacher):.3g}; dot has no such end"
        )
    if bound is None and widest <= 1 and spread > 10 * taught:
        return (
            f"the teacher's margins are within 1 (standard deviation {taught:.2g}) and the student's are not "
            f"({spread:.2g}): were its scores put through a sigmoid? Take them before it, or set scale: auto"
        )
    return None
