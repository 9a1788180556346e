"""What can be known before data is read or a weight is loaded: what every model will be, and what cannot work.

Everything comes from configs: those of models at hand, and those that stages will have, followed through the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill import fitting, world
from distill.recipe import EngineSpec, OptimSpec, Recipe, Stage, StudentSpec
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


def check(recipe: Recipe, context, ranks: int | None = None) -> None:
    """Refuse a recipe that cannot work, with every reason."""
    planned, ranks = Planned(recipe, context), ranks or world.size()
    _examine(recipe, context)
    wrong = [line for stage in recipe.stages for line in _of_stage(stage, planned, ranks)]
    if wrong:
        raise UsageError("\n".join(wrong))


def _examine(recipe: Recipe, context) -> None:
    from distill import loading

    for name in recipe.models:
        try:
            loading.examine(context.model(name))
        except UserError as error:
            raise UserError(f"model {name}: {error}") from error


def _of_stage(stage: Stage, planned: Planned, ranks: int) -> list[str]:
    return _of_training(stage, planned, ranks) if stage.train else _of_evaluation(stage, planned)


def _of_training(stage: Stage, planned: Planned, ranks: int) -> list[str]:
    try:
        student = planned.student_facts(stage.id)
        targets = {name: planned.facts(target.from_) for name, target in stage.train.targets.items()}
    except UserError as error:
        return [f"stages.{stage.id}.train.student: {error}"]
    losses = [
        f"stages.{stage.id}.train.loss.{i}.{name}: {what}"
        for i, (name, objective) in enumerate(stage.train.objectives())
        for what in objective.check(student, targets.get(objective.target))
    ]
    models = {"the student": student, **{f"target {name}": facts for name, facts in targets.items()}}
    rest = [*_of_batch(stage, planned, ranks), *fitting.of_training(stage, planned, models)]
    return [*losses, *(f"stages.{stage.id}.train: {what}" for what in rest)]


def _of_batch(stage: Stage, planned: Planned, ranks: int) -> Iterator[str]:
    try:
        micro_batch(planned.recipe.engine, stage.train.optim, ranks)
    except UserError as error:
        yield str(error)


def micro_batch(engine: EngineSpec, optim: OptimSpec, ranks: int) -> int:
    """Rows of one forward pass on one rank: the recipe's, or all of the step at once."""
    rows = engine.micro_batch or max(optim.batch // ranks, 1)
    if optim.batch % (rows * ranks):
        raise UserError(
            f"optim.batch={optim.batch} rows cannot be cut into micro-batches of {rows} on {ranks} ranks; "
            f"batch={math.ceil(optim.batch / (rows * ranks)) * rows * ranks} can"
        )
    return rows


def _of_evaluation(stage: Stage, planned: Planned) -> list[str]:
    text = fitting.Text(stage.evaluate.data, planned)
    wrong = (
        fitting.too_long(text, label, planned.facts(reference)) for label, reference in stage.evaluate.rows.items()
    )
    return [f"stages.{stage.id}.evaluate: {what}" for found in wrong for what in found]
