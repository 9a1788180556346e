"""Where the things of a run lie: models, corpora, the directories of stages; and who does the work. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from distill import sources, world
from distill.kinds import Stage
from distill.recipe import Recipe
from growth.errors import UserError
from growth.files import read_json

if TYPE_CHECKING:
    from distill.ranking.prepared import Ranking

MANIFEST = "stage.json"


def _train(*arguments) -> dict:
    from distill.train import train

    return train(*arguments)


def _grow(*arguments) -> dict:
    from distill.growing import grow

    return grow(*arguments)


def _refine(*arguments) -> dict:
    from distill.refining import refine

    return refine(*arguments)


def _evaluate(spec, contexts, directory) -> list:
    from distill.evaluate import evaluate

    return evaluate(spec, contexts, directory)


def _foresee(spec, context) -> None:
    from distill.evaluate import foresee

    foresee(spec, context)


def _report(out: Path) -> None:
    from distill.report import rebuild

    rebuild(out)


def _prepare(*arguments) -> None:
    from distill.corpus import prepare

    prepare(*arguments)


def _collect(*arguments) -> None:
    from distill.ranking.prepared import prepare

    prepare(*arguments)


def _check(recipe: Recipe, context: Context) -> None:
    from distill.preflight import check

    check(recipe, context)


@dataclass(frozen=True)
class Work:
    """What a run calls; tests put their own in place."""

    train: Callable = _train
    grow: Callable = _grow
    refine: Callable = _refine
    evaluate: Callable = _evaluate
    report: Callable = _report
    prepare: Callable = _prepare
    collect: Callable = _collect
    resolve: Callable = sources.resolve
    check: Callable = _check
    foresee: Callable = _foresee


@dataclass(eq=False)
class Context:
    """Where things lie, for one seed of a run."""

    recipe: Recipe
    out: Path
    seed: int
    work: Work = field(default_factory=Work)
    found: dict[str, Path] = field(default_factory=dict)  # models and corpora at hand, shared by all seeds
    accept_changes: bool = False  # whether an interrupted stage goes on though it is made from something else now

    def directory(self, stage: str) -> Path:
        fanned = self.recipe.seeds > 1 and self.recipe.stage(stage).fanned
        return self.out / (f"{stage}@{self.seed}" if fanned else stage)

    def model(self, reference: str) -> Path:
        """The checkpoint directory of a model, an earlier stage, or `stage.start`."""
        if reference in self.recipe.models:
            return self._model(reference)
        stage, _, start = reference.partition(".")
        return self._made(stage, "start" if start else "model")

    def scores(self, stage: str) -> Path:
        """What a data stage has measured of rows."""
        return self._made(stage, "scores")

    def _made(self, stage: str, what: str) -> Path:
        path = self.directory(stage) / what
        if not path.is_dir():
            raise UserError(f"{path} is not there; `--from {stage}` makes it again")
        return path

    def dtype(self, reference: str) -> str:
        """In which a model or stage that is not trained computes: its own in the recipe, or that of the run."""
        known = self.recipe.models.get(reference)
        return (known and known.dtype) or self.recipe.engine.dtype

    def metrics(self, stage: str) -> dict:
        """What a finished stage has measured."""
        return read_json(self.directory(stage) / MANIFEST)["metrics"]

    def _model(self, name: str) -> Path:
        if name not in self.found:
            self.found[name] = self.work.resolve(self.recipe.models[name], name)
        return self.found[name]

    def corpus(self, name: str) -> Path:
        """The directory of a prepared corpus; prepared on first use, on every rank at once or on one alone."""
        if name not in self.recipe.corpora:
            return self._made(name, "corpus")
        key, path = f"corpora/{name}", self.out / "corpora" / name
        if key not in self.found:
            spec = self.recipe.corpora[name]
            tokenizer = self.model(spec.tokenizer) if isinstance(spec.tokenizer, str) else None
            world.first(lambda: self.work.prepare(spec, tokenizer, path))
            self.found[key] = path
        return path

    def collection(self, name: str) -> Path:
        """The directory of a prepared collection; prepared as a corpus is."""
        key, path = f"collections/{name}", self.out / "collections" / name
        if key not in self.found:
            world.first(lambda: self.work.collect(self.recipe.collections[name], path))
            self.found[key] = path
        return path

    def ranking(self, name: str) -> Ranking:
        """A collection with the groups that come with it, or with those that a data stage has made."""
        from distill.ranking.prepared import GROUPS, Ranking

        path = self.collection(self.recipe.collection(name))
        if name not in self.recipe.collections:
            return Ranking(path, self._made(name, GROUPS))
        return Ranking(path, path / GROUPS if (path / GROUPS).is_dir() else None)


@dataclass(frozen=True)
class Task:
    """A stage for one seed, or an evaluation of all of them."""

    stage: Stage
    contexts: tuple[Context, ...]

    @property
    def directory(self) -> Path:
        return self.contexts[0].directory(self.stage.id)

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def spec(self):
        return getattr(self.stage, self.stage.kind)

    def follows(self, other: Task) -> bool:
        """Whether it comes later in the recipe, for the same seed."""
        stages = self.contexts[0].recipe.stages
        later = stages.index(self.stage) > stages.index(other.stage)
        return later and any(context in self.contexts for context in other.contexts)
