"""Which layers of a model an objective reads, as recipes say it. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill.schedules import Several

Layer = int | Literal["last"]
Layers = Layer | Annotated[Several[Layer], Field(min_length=1)]


def number(layer: Layer) -> int:
    return -1 if layer == "last" else layer


def mistakes(key: str, layer: Layer, facts) -> list[str]:
    if isinstance(layer, str) or -facts.layers <= layer < facts.layers:
        return []
    return [f"{key}={layer}: the {facts.family} has {facts.layers} layers, 0 to {facts.layers - 1}"]


# Several layers of a student, each with one of its teacher


def listed(layers) -> tuple:
    return layers if isinstance(layers, tuple) else (layers,)


def paired(student, teacher) -> list[tuple]:
    """(of the student, of the teacher)."""
    return list(zip(listed(student), listed(teacher), strict=True))


def beyond(pairs: list[tuple], student, target) -> list[str]:
    """What is wrong with layers of the student and those of its teacher."""
    wrong = [
        what
        for own, its in pairs
        for what in (*mistakes("student_layer", own, student), *mistakes("teacher_layer", its, target))
    ]
    named = [own if isinstance(own, str) else own % student.layers for own, _ in pairs]
    if not wrong and (twice := next((own for own in named if named.count(own) > 1), None)) is not None:
        wrong.append(f"student_layer: of {student.layers} layers, layer {twice} is listed twice under two numbers")
    return wrong


def named(layer) -> str:
    """In logs."""
    return layer if isinstance(layer, str) else f"layer_{layer}"


def unpaired(student, teacher) -> str | None:
    """What is wrong with two lists of which each one's n-th belongs to the other's."""
    ours, theirs = listed(student), listed(teacher)
    if len(ours) != len(theirs):
        return f"student_layer lists {len(ours)}, teacher_layer {len(theirs)}; each layer of one has one of the other"
    if len(set(ours)) < len(ours):
        return "student_layer: each layer at most once; a second teacher's layer for it is a loss of its own"
    return None
