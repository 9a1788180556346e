"""What can be known before data is read or a weight is loaded: what every model will be, and what cannot work.

Everything comes from configs: those of models at hand, and those that stages will have, followed through the recipe.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import growth
from distill import fitting, growing, sources, world
from distill.cost import Cost, cost_of
from distill.kinds import CutSpec, OptimSpec, Stage, StudentSpec, TrainSpec
from distill.lowrank.spec import LowRankSpec
from distill.operators import Cut, Given
from distill.ranking import costs, fits
from distill.ranking.kinds import ClassifierKind, RankerKind
from distill.recipe import Recipe
from distill.refine import cache
from distill.sparsity.fits import is_sparse, misfits
from distill.specs import EngineSpec
from distill.teachers import depth
from growth import files
from growth.anatomy import dissect
from growth.errors import UsageError, UserError
from growth.masks import masks_of

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


class Said(Exception):
    """What is wrong was said of an earlier stage."""


class Planned:
    """The models of a recipe by reference, as they will be."""

    def __init__(self, recipe: Recipe, context):
        self.recipe, self.context = recipe, context
        self._facts: dict[str, Any] = {}
        self._grown: dict[tuple, Any] = {}

    def config(self, reference: str) -> dict[str, Any]:
        """config.json of a model, or as a stage will write it."""
        if reference in self.recipe.models:
            return files.read_json(sources.encoder(self.context.model(reference)) / "config.json")
        stage = self.recipe.stage(reference.partition(".")[0])
        return self.grown(stage.grow).config.to_dict() if stage.grow else self._with_head(stage.train)

    def _with_head(self, train) -> dict[str, Any]:
        """The config of a trained student names the class that was trained."""
        from distill import loading

        config = self.student_config(train.student)
        read = loading.configuration(config)
        if train.ranks:
            head = "classify" if isinstance(self.learner(train), ClassifierKind) else None
            return {**config, "architectures": [loading.class_of(read, head).__name__]}
        head = next((need.head for _, o in train.objectives() if (need := o.needs()).head), None)
        kept = loading.own_head(read) if train.student.origin else None
        return {**config, "architectures": [loading.class_of(read, head or kept).__name__]}

    def student_config(self, student: StudentSpec) -> dict[str, Any]:
        if student.new is not None:
            return self._new_config(student.new)
        made = student.grow or student.cut
        return self.grown(made).config.to_dict() if made else self.config(student.from_)

    def grown(self, spec):
        """What operators will make, as a model on the meta device with its lineage in `growth`."""
        ops = [("cut", Cut(layers=spec.layers))] if isinstance(spec, CutSpec) else spec.operators()
        key = (spec.from_, *ops)
        if key not in self._grown:
            self._grown[key] = None
            self._grown[key] = growing.plan(ops, self._skeleton(spec.from_), Given(self.context.seed, self._skeleton))
        if self._grown[key] is None:
            raise Said(f"{spec.from_} cannot grow so")
        return self._grown[key]

    def _skeleton(self, reference: str):
        """A model without storage, of the class that it has or will have; of one at hand the table must know all."""
        from distill import loading

        if checkpoint := self._checkpoint(reference):
            dissect(checkpoint)
        config = loading.configuration(self.config(reference))
        model = loading.skeleton(loading.architecture(config) or loading.class_of(config, None), config, {})
        model.masks = self._masks(reference, model)
        return model

    def _checkpoint(self, reference: str):
        """A model whose weights are at hand; a forecast may have its config alone."""
        at_hand = reference in self.recipe.models and sources.has_weights(self.context.model(reference))
        return growth.open(sources.encoder(self.context.model(reference))) if at_hand else None

    def _masks(self, reference: str, model) -> dict[str, Any]:
        """Of a model at hand, or as operators will make them; of one trained sparse, that there will be some."""
        if checkpoint := self._checkpoint(reference):
            return masks_of(checkpoint)
        if reference in self.recipe.models:
            return {}
        if grown := self.recipe.stage(reference.partition(".")[0]).grow:
            return self.grown(grown).masks
        return growth.sparsify(model, sparsity=0).masks if is_sparse(reference, self) else {}

    def _new_config(self, new) -> dict[str, Any]:
        if new.like is not None:
            return self.config(new.like)
        return new.config if isinstance(new.config, dict) else files.read_json(Path(new.config).expanduser())

    def facts(self, reference: str):
        return self._measure(self.config(reference))

    def student_facts(self, stage: str):
        train = self.recipe.stage(stage).train
        config = self._with_head(train) if train.ranks else self.student_config(train.student)
        return self._measure(config, train.student.lowrank)

    def ranker(self, reference: str) -> RankerKind:
        """How a model or stage scores a query and a passage; refused if it does not."""
        if reference in self.recipe.models:
            from distill.ranking.opening import form_of

            return form_of(self.context, reference).kind
        train = self.recipe.stage(reference.partition(".")[0]).train
        if not (train and train.ranks):
            raise UserError(f"stage {reference} makes no ranker; a train stage with `ranker` of its student does")
        return self.learner(train)

    def learner(self, train: TrainSpec) -> RankerKind:
        """The same of the student of a stage; refused if its encoder cannot score so."""
        from distill.ranking import forms

        student = train.student
        kept = student.origin and not student.ranker
        kind = self.ranker(student.origin) if kept else forms.of_student(student, self._brought(student))
        forms.refuse(kind, self.student_config(student))
        return kind

    def _brought(self, student: StudentSpec) -> Path | None:
        """The directory whose tokenizer a student will have."""
        reference = student.origin or (student.new and student.new.like)
        while reference and reference not in self.recipe.models:
            stage = self.recipe.stage(reference.partition(".")[0])
            reference = stage.origin or (stage.train and stage.train.student.new and stage.train.student.new.like)
        return reference and sources.encoder(self.context.model(reference))

    def cost(self, stage: Stage) -> Cost:
        """What a step of a train stage costs."""
        if stage.train.ranks:
            return self._cost_of_ranker(stage)
        length = self.recipe.text(stage.train.corpus).length
        rows = self.recipe.engine.micro_batch or max(stage.train.optim.batch // world.size(), 1)
        runs = stage.train.optim.batch // rows
        return cost_of(stage.train, self.student_facts(stage.id), self.running(stage), length, runs)

    def _cost_of_ranker(self, stage: Stage) -> Cost:
        student = self.student_facts(stage.id), self.learner(stage.train)
        teachers = {
            name: (student,) if target.ema else tuple((self.facts(m), self.ranker(m)) for m in target.models)
            for name, target in stage.train.targets.items()
        }
        return costs.cost_of(stage.train, student, teachers)

    def running(self, stage: Stage) -> dict[str, tuple]:
        """{target: facts of the models that run for it}, each as deep as it is read."""
        objectives = [objective for _, objective in stage.train.objectives()]
        deep = {
            name: tuple(self._measure(depth.loaded(self.config(m), name, objectives)) for m in target.models)
            for name, target in stage.train.targets.items()
        }
        return self.teachers(stage) | {name: facts for name, facts in deep.items() if facts}

    def teachers(self, stage: Stage) -> dict[str, tuple]:
        """The same of the whole models."""
        return {
            name: (self.student_facts(stage.id),) if target.ema else tuple(map(self.facts, target.models))
            for name, target in stage.train.targets.items()
        }

    def said(self, stage: Stage) -> dict[str, tuple]:
        """{target: facts of the models whose values it hands over}, some of which may have run earlier."""
        kept = {name: cache.teachers(self.recipe, target) for name, target in stage.train.targets.items()}
        return self.teachers(stage) | {name: tuple(map(self.facts, models)) for name, models in kept.items() if models}

    def _measure(self, config: dict[str, Any], lowrank: LowRankSpec | None = None):
        """Each different config is built once, on the meta device."""
        key = files.digest(config), lowrank
        if key not in self._facts:
            from distill.lowrank import counting

            self._facts[key] = counting.facts(config, lowrank)
        return self._facts[key]


def check(recipe: Recipe, context, ranks: int | None = None) -> None:
    """Refuse a recipe that cannot work, with every reason."""
    planned, ranks = Planned(recipe, context), ranks or world.size()
    _examine(recipe, context)
    wrong = list(_of_monitors(recipe.engine))
    wrong += [line for stage in recipe.stages for line in _of_stage(stage, planned, ranks)]
    if wrong:
        raise UsageError("\n".join(wrong))


def _of_monitors(engine: EngineSpec) -> Iterator[str]:
    """What DeepSpeed would fail to import when training begins."""
    for name, package in MONITORS.items():
        if engine.deepspeed.get(name, {}).get("enabled") and importlib.util.find_spec(package) is None:
            yield f"engine.deepspeed.{name}: pip install {package}, or take csv_monitor, which needs nothing"


def _examine(recipe: Recipe, context) -> None:
    from distill import loading

    for name in recipe.models:
        path = context.model(name)
        look = loading.examine if sources.has_weights(path) else loading.configuration
        try:
            look(sources.encoder(path))
        except UserError as error:
            raise UserError(f"model {name}: {error}") from error


def _of_stage(stage: Stage, planned: Planned, ranks: int) -> list[str]:
    try:
        if stage.grow:
            return _of_growth(stage, planned)
        if stage.data:
            return list(_of_data(stage, planned))
        return _of_training(stage, planned, ranks) if stage.train else _of_evaluation(stage, planned)
    except Said:
        return []


def _of_growth(stage: Stage, planned: Planned) -> list[str]:
    """Sizes that cannot be, on configs alone."""
    if fits.scores_pairs(stage.grow.from_, planned):
        inside = "grow its encoder where it learns: `student: {grow: {from: ..., ops: ...}, ranker: ...}`"
        return [f"stages.{stage.id}.grow.from: {stage.grow.from_} scores queries and passages; {inside}"]
    try:
        planned.facts(stage.id)
    except UserError as error:
        return [f"stages.{stage.id}.grow: {error}"]
    return []


def _of_data(stage: Stage, planned: Planned) -> Iterator[str]:
    text = fitting.Text(stage.data.from_, planned) if stage.data.reads == "text" else None
    for name, op in stage.data.operations():
        yield from (f"stages.{stage.id}.data.{name}: {what}" for what in op.check(planned, text))
        text = text and text.after(op)


def _of_training(stage: Stage, planned: Planned, ranks: int) -> list[str]:
    if stage.train.ranks:
        return [f"stages.{stage.id}.train.{what}" for what in _of_ranker(stage, planned, ranks)]
    if wrong := list(fits.of_text(stage, planned)):
        return [f"stages.{stage.id}.train.{what}" for what in wrong]
    try:
        student = planned.student_facts(stage.id)
        teachers, said = planned.teachers(stage), planned.said(stage)
    except UserError as error:
        return [f"stages.{stage.id}.train.student: {error}"]
    losses = [
        f"stages.{stage.id}.train.loss.{i}.{name}: {what}"
        for i, (name, objective) in enumerate(stage.train.objectives())
        for facts in (said[objective.target] if objective.target else (None,))
        for what in objective.check(student, facts)
    ]
    own = [*_of_batch(stage, planned, ranks), *_of_hooks(stage, student, planned), *_of_curve(stage, planned)]
    own += [*_of_average(stage, planned), *_of_ensembles(stage)]
    rest = [*own, *fitting.of_training(stage, planned, student, teachers), *cache.misfits(stage, planned.recipe)]
    rest += fitting.of_classes(stage, planned.recipe)
    return [*losses, *(f"stages.{stage.id}.train: {what}" for what in rest)]


def _of_ranker(stage: Stage, planned: Planned, ranks: int) -> Iterator[str]:
    try:
        student = planned.student_facts(stage.id)
    except UserError as error:
        yield f"student: {error}"
        return
    wrong = list(_of_batch(stage, planned, ranks))
    rows = None if wrong else micro_batch(planned.recipe.engine, stage.train.optim, ranks)
    yield from [*wrong, *_of_hooks(stage, student, planned), *_of_average(stage, planned)]
    yield from fits.of_training(stage, planned, rows)


def _of_batch(stage: Stage, planned: Planned, ranks: int) -> Iterator[str]:
    try:
        micro_batch(planned.recipe.engine, stage.train.optim, ranks)
    except UserError as error:
        yield str(error)


def _of_hooks(stage: Stage, student, planned: Planned) -> Iterator[str]:
    objectives = [objective for _, objective in stage.train.objectives()]
    for name, hook in (hook.named() for hook in stage.train.hooks):
        yield from (f"hooks.{name}: {what}" for what in hook.check(student, objectives))
    yield from misfits(stage, planned)


def _of_curve(stage: Stage, planned: Planned) -> Iterator[str]:
    name = stage.train.corpus
    if stage.train.evaluate_every and not planned.recipe.text(name).heldout:
        yield f"evaluate_every: nothing of corpora.{name} is held out; set its `heldout`"


def _of_average(stage: Stage, planned: Planned) -> Iterator[str]:
    averaged = [name for name, target in stage.train.targets.items() if target.ema]
    if averaged and planned.recipe.engine.zero == 3:
        yield f"targets.{averaged[0]}.ema: on ZeRO 3 no rank has all of the student to average; engine.zero 0, 1 or 2"


def _of_ensembles(stage: Stage) -> Iterator[str]:
    for name, objective in stage.train.objectives():
        needs, target = objective.needs(), objective.target and stage.train.targets[objective.target]
        if target and target.ensemble and (needs.target or needs.own_ids):
            yield (
                f"targets.{objective.target}.ensemble: several teachers have only a distribution of the student's ids "
                f"together, and {name} needs more; give each of them a target and a loss of its own"
            )


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
    wrong = list(fits.of_evaluation(stage, planned))
    if not wrong and not stage.evaluate.ranks:
        text = fitting.Text(stage.evaluate.data, planned)
        rows = stage.evaluate.rows.items()
        wrong = [what for label, reference in rows for what in text.too_long(label, planned.facts(reference))]
    return [f"stages.{stage.id}.evaluate: {what}" for what in wrong]
