"""Whether a stage that classifies is given what it needs: rows of one document, and classes for what learns from them.

No torch; before data is read. Which classes a corpus has is known once it is prepared; whether it has any, before.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill.kinds import Stage


def of_training(stage: Stage, recipe) -> Iterator[str]:
    """Every reason why this training stage cannot classify."""
    objectives = [objective for _, objective in stage.train.objectives()]
    if not any(objective.needs().head == "classify" for objective in objectives):
        return
    name = stage.train.corpus
    text = recipe.text(name)
    if others := {head for o in objectives if (head := o.needs().head) not in (None, "classify")}:
        yield f"loss: a student has one head, so objective classify and {others.pop()} are two stages"
    if text.packed:
        yield f"objective classify: a row has one class, so it takes one document; {_where(name, recipe)} packed: false"
    if not text.label and any(o.needs().head == "classify" and not o.target for o in objectives):
        yield (
            f"objective classify: {name} has no classes; set `label` of the corpus, or have a teacher give them with "
            "a data stage {label: {teacher: ...}}"
        )


def _where(name: str, recipe) -> str:
    return f"corpora.{name} needs" if name in recipe.corpora else f"{name} is made from text that needs"
