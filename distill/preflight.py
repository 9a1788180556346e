"""What can be known before data is read or a weight is loaded: what every model will be, and what cannot work.

Everything comes from configs: those of models at hand, and those that stages will have, followed through the recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.recipe import Recipe, StudentSpec
from growth import families, files
from growth.anatomy import Anatomy
from growth.cut import kept
from growth.errors import UsageError, UserError
from growth.maps import Layers
from growth.reindex import config_after


class Planned:
    """The models of a recipe by reference, as they will be."""

    def __init__(self, recipe: Recipe, context):
        self.recipe, self.context = recipe, context
        self._facts: dict[str, Any] = {}

    def config(self, reference: str) -> dict[str, Any]:
        """config.json of a model, or as a stage will write it."""
        if reference in self.recipe.models:
            return files.read_json(self.context.model(reference) / "config.json")
        return self.student_config(self.recipe.stage(reference.partition(".")[0]).train.student)

    def student_config(self, student: StudentSpec) -> dict[str, Any]:
        if student.new is not None:
            return self._new_config(student.new)
        if student.cut is not None:
            return cut_config(self.config(student.cut.from_), student.cut.layers)
        return self.config(student.from_)

    def _new_config(self, new) -> dict[str, Any]:
        if new.like is not None:
            return self.config(new.like)
        return new.config if isinstance(new.config, dict) else files.read_json(Path(new.config).expanduser())

    def facts(self, reference: str):
        return self._measure(self.config(reference))

    def student_facts(self, stage: str):
        return self._measure(self.student_config(self.recipe.stage(stage).train.student))

    def _measure(self, config: dict[str, Any]):
        """Each different config is built once, on the meta device."""
        key = files.digest(config)
        if key not in self._facts:
            from distill import models

            self._facts[key] = models.facts(config)
        return self._facts[key]


def cut_config(config: dict[str, Any], layers: int | tuple[int, ...]) -> dict[str, Any]:
    """As `growth.cut` will write it."""
    anatomy = Anatomy(families.of(config), config, "", {}, frozenset())
    keep = layers if isinstance(layers, int) else list(layers)
    return config_after(anatomy, {a: Layers.of(kept(keep, anatomy.sizes[a])) for a in anatomy.family.depth})


def check(recipe: Recipe, context) -> None:
    """Refuse a recipe that cannot work, with every reason."""
    planned = Planned(recipe, context)
    wrong = [line for stage in recipe.stages if stage.train for line in _of_stage(stage, planned)]
    if wrong:
        raise UsageError("\n".join(wrong))


def _of_stage(stage, planned: Planned) -> list[str]:
    try:
        student = planned.student_facts(stage.id)
        targets = {name: planned.facts(target.from_) for name, target in stage.train.targets.items()}
    except UserError as error:
        return [f"stages.{stage.id}.train.student: {error}"]
    return [
        f"stages.{stage.id}.train.loss.{i}.{name}: {what}"
        for i, (name, objective) in enumerate(stage.train.objectives())
        for what in objective.check(student, targets.get(objective.target))
    ]
