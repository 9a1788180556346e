"""The order of a run: what is finished, what is stale, what resumes; and where everything lies. No torch.

Every stage has a directory with a stage.json that says what it was made from. A stage whose inputs are the same is not
run again; one whose inputs changed is stale, and so is all that follows it; one that was interrupted goes on.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from distill import recipe as recipes
from distill import sources, strict_yaml, world
from distill.recipe import Recipe, Stage
from distill.references import references
from growth.console import say, seconds
from growth.errors import UsageError, UserError, did_you_mean
from growth.files import digest, locked, read_json, sha256, write_json, write_text

MANIFEST, RECIPE = "stage.json", "recipe.yaml"
RUNNING, DONE, STALE = "running", "done", "stale"
NO_INPUT = {"save_every", "keep", "evaluate_every"}  # how a stage is kept and watched, not what it makes
VERSIONED = ("distill-growth", "torch", "transformers", "deepspeed", "tokenizers")


def _train(*arguments) -> dict:
    from distill.train import train

    return train(*arguments)


def _evaluate(spec, contexts, directory) -> list:
    from distill.evaluate import evaluate

    return evaluate(spec, contexts, directory)


def _report(out: Path) -> None:
    from distill.report import rebuild

    rebuild(out)


def _prepare(*arguments) -> None:
    from distill.corpus import prepare

    prepare(*arguments)


def _check(recipe: Recipe, context: Context) -> None:
    from distill.preflight import check

    check(recipe, context)


@dataclass(frozen=True)
class Work:
    """What a run calls; tests put their own in place."""

    train: Callable = _train
    evaluate: Callable = _evaluate
    report: Callable = _report
    prepare: Callable = _prepare
    resolve: Callable = sources.resolve
    check: Callable = _check


@dataclass
class Context:
    """Where things lie, for one seed of a run."""

    recipe: Recipe
    out: Path
    seed: int
    work: Work = field(default_factory=Work)
    found: dict[str, Path] = field(default_factory=dict)  # models and corpora at hand, shared by all seeds

    def directory(self, stage: str) -> Path:
        fanned = self.recipe.seeds > 1 and self.recipe.stage(stage).kind == "train"
        return self.out / (f"{stage}@{self.seed}" if fanned else stage)

    def model(self, reference: str) -> Path:
        """The checkpoint directory of a model, an earlier stage, or `stage.start`."""
        if reference in self.recipe.models:
            return self._model(reference)
        stage, _, start = reference.partition(".")
        path = self.directory(stage) / ("start" if start else "model")
        if not path.is_dir():
            raise UserError(f"{path} is not there; `--from {stage}` makes it again")
        return path

    def _model(self, name: str) -> Path:
        if name not in self.found:
            self.found[name] = self.work.resolve(self.recipe.models[name], name)
        return self.found[name]

    def corpus(self, name: str) -> Path:
        """The directory of a prepared corpus; prepared on first use, on every rank at once or on one alone."""
        key, path = f"corpora/{name}", self.out / "corpora" / name
        if key not in self.found:
            spec = self.recipe.corpora[name]
            tokenizer = self.model(spec.tokenizer) if isinstance(spec.tokenizer, str) else None
            world.first(lambda: self.work.prepare(spec, tokenizer, path))
            self.found[key] = path
        return path


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


def run(
    recipe: Recipe, out: Path, *, start_from: str | None = None, fresh: bool = False, work: Work | None = None
) -> None:
    """All stages of a recipe into `out`, leaving out what is finished and unchanged."""
    out, work = Path(out), work or Work()
    if start_from is not None and start_from not in (ids := [stage.id for stage in recipe.stages]):
        raise UsageError(
            f"--from {start_from}: no such stage{did_you_mean(start_from, ids)}; there are {', '.join(ids)}"
        )
    refuse_out(recipe, out)
    with _owned(out):
        found: dict[str, Path] = {}
        contexts = tuple(Context(recipe, out, recipe.seed + n, work, found) for n in range(recipe.seeds))
        world.first(lambda: _look(recipe, contexts[0], out))
        tasks = list(_tasks(recipe, contexts))
        world.first(lambda: _mark(tasks, start_from, fresh))
        for task in tasks:
            _do(task, tasks, work)
    if any(stage.kind == "evaluate" for stage in recipe.stages):
        world.first(lambda: work.report(out))


def _tasks(recipe: Recipe, contexts: tuple[Context, ...]) -> Iterator[Task]:
    for stage in recipe.stages:
        fanned = [(context,) for context in contexts] if stage.kind == "train" else [contexts]
        yield from (Task(stage, several) for several in fanned)


# Before the first stage


def refuse_out(recipe: Recipe, out: Path) -> None:
    """An output directory that is an input, or that holds something else, is left alone."""
    here = out.resolve()
    for what, path in _local_inputs(recipe):
        if here == path or path in here.parents or here in path.parents:
            raise UsageError(
                f"--out {out}: {what} is {path}; a run is never written over what it reads, choose another"
            )
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a directory")
    inside = sorted(path.name for path in out.iterdir() if path.name != ".lock")
    if inside and RECIPE not in inside:
        raise UsageError(f"--out {out} holds something that is not a run (first: {inside[0]}); give another directory")
    if inside and (name := _name_of(out)) != recipe.recipe:
        raise UsageError(f"--out {out} is a run of recipe {name!r}, not of {recipe.recipe!r}; give another directory")


def _local_inputs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    named = [(f"model {name}", place) for name, spec in recipe.models.items() for place in spec.from_]
    named += [(f"corpus {name}", spec.source) for name, spec in recipe.corpora.items()]
    for what, place in named:
        path = Path(place).expanduser()
        if path.exists():
            yield what, path.resolve()


def _name_of(out: Path) -> str | None:
    try:
        return strict_yaml.parse((out / RECIPE).read_bytes()).value["recipe"]
    except (strict_yaml.Unreadable, TypeError, KeyError):
        return None


@contextmanager
def _owned(out: Path) -> Iterator[None]:
    """The run directory, locked by the first rank; gone again if nothing was written into it."""
    with ExitStack() as held:
        world.first(lambda: held.enter_context(_locked(out)))
        yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            yield
    finally:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _look(recipe: Recipe, context: Context, out: Path) -> None:
    """Everything that can be known to be wrong before work begins; then the recipe as it is run."""
    for name, path in _models(recipe, context).items():
        if (here := out.resolve()) == path or path in here.parents:
            raise UsageError(f"--out {out} is inside model {name} at {path}; choose another")
    context.work.check(recipe, context)
    made = [f"{name} {version}" for name, version in versions().items()]
    made += [f"{name}: {path}" for name, path in _models(recipe, context).items()]
    write_text(out / RECIPE, "".join(f"# {line}\n" for line in made) + recipes.dump(recipe))


def _models(recipe: Recipe, context: Context) -> dict[str, Path]:
    return {name: context.model(name).resolve() for name in recipe.models}


def versions() -> dict[str, str]:
    """Of what computes, without importing it."""
    installed = {dist.name: dist.version for name in VERSIONED for dist in metadata.distributions(name=name)}
    return {"python": sys.version.split()[0], **installed}


# What is done, stale, interrupted


def _mark(tasks: list[Task], start_from: str | None, fresh: bool) -> None:
    """What the user wants to be done again."""
    if fresh:
        for directory in {task.directory for task in tasks if _manifest(task)}:
            shutil.rmtree(directory)
    if start_from is not None:
        chosen = [task for task in tasks if task.stage.id == start_from]
        for task in [t for t in tasks if t in chosen or any(t.follows(c) for c in chosen)]:
            _make_stale(task, f"--from {start_from}")


def _make_stale(task: Task, why: str) -> None:
    if (manifest := _manifest(task)) is not None:
        write_json(task.directory / MANIFEST, {**manifest, "state": STALE, "why": why})


def _manifest(task: Task) -> dict[str, Any] | None:
    path = task.directory / MANIFEST
    return read_json(path) if path.exists() else None


def _do(task: Task, tasks: list[Task], work: Work) -> None:
    task.contexts[0].corpus(task.spec.data)
    world.first(lambda: _open(task, tasks))
    if _manifest(task)["state"] == DONE:
        return
    began = time.perf_counter()
    if task.stage.kind == "train":
        metrics = work.train(task.spec, task.contexts[0], task.directory)
    else:
        metrics = world.first(lambda: work.evaluate(task.spec, task.contexts, task.directory))
    world.first(lambda: _close(task, metrics, time.perf_counter() - began))


def _open(task: Task, tasks: list[Task]) -> None:
    """Leave stage.json saying `done` where nothing is to be done, else `running`."""
    manifest, inputs = _manifest(task), inputs_of(task)
    if manifest is None:
        _begin(task, inputs)
        return
    changed = differences(manifest["inputs"], inputs)
    if manifest["state"] == RUNNING and changed:
        raise UserError(
            f"{task.name} was interrupted and its recipe has changed since ({changed}); "
            f"undo that, or begin it again with --from {task.stage.id}"
        )
    if manifest["state"] == RUNNING:
        say(f"{task.name}: goes on where it was interrupted")
    elif manifest["state"] == DONE and not changed:
        say(f"{task.name}: finished before and unchanged, not run again")
    else:
        why = manifest.get("why", changed) if manifest["state"] == STALE else changed
        say(f"{task.name}: runs again ({why})")
        for later in [t for t in tasks if t.follows(task)]:
            _make_stale(later, f"follows {task.name}")
        shutil.rmtree(task.directory)
        _begin(task, inputs)


def _begin(task: Task, inputs: dict[str, Any]) -> None:
    if task.directory.exists() and any(task.directory.iterdir()):
        raise UserError(f"{task.directory} is not empty and has no {MANIFEST}; move it away")
    task.directory.mkdir(exist_ok=True)
    _write(task, {"state": RUNNING, "inputs_digest": digest(inputs), "inputs": inputs, "versions": versions()})


def _close(task: Task, metrics: Any, wall: float) -> None:
    manifest = _manifest(task)
    _write(task, {**manifest, "state": DONE, "seconds": round(wall, 2), "metrics": metrics})
    say(f"{task.name}: done in {seconds(wall)}")


def _write(task: Task, manifest: dict[str, Any]) -> None:
    write_json(task.directory / MANIFEST, manifest)


def inputs_of(task: Task) -> dict[str, Any]:
    """{dotted key: value} of all that decides what a stage makes: its recipe, seed, models, corpora, earlier stages."""
    spec = task.spec.model_dump(mode="json", by_alias=True)
    inputs = dict(_flat({key: value for key, value in spec.items() if key not in NO_INPUT}))
    if task.stage.kind == "train":
        inputs["seed"] = task.contexts[0].seed
    for kind, name in sorted({(k, n) for _, k, n in references({"stages": [{task.stage.kind: spec}]})}):
        for context in task.contexts:
            inputs.update(_made_from(kind, name, context))
    return inputs


def _made_from(kind: str, name: str, context: Context) -> dict[str, str]:
    if kind == "corpus":
        return {f"corpora.{name}": read_json(context.corpus(name) / "manifest.json")["digest"]}
    if kind != "source":
        return {}
    if name in context.recipe.models:
        return {f"models.{name}": _identity(name, context)}
    earlier = context.directory(name.partition(".")[0])
    return {f"stages.{earlier.name}": read_json(earlier / MANIFEST)["inputs_digest"]}


def _identity(name: str, context: Context) -> str:
    """Of the weights and the config; weights that the recipe pins were compared already."""
    path = context.model(name)
    weights = context.recipe.models[name].sha256 or sources.weights_sha256(path)
    return digest([weights, sha256(path / "config.json")])


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield prefix, value
        return
    for key, below in items:
        yield from _flat(below, f"{prefix}.{key}" if prefix else str(key))


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`stop.steps 200 -> 300, lr.points.1.1 ...`; empty if there are none."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    said = [f"{key} {_brief(old, key)} -> {_brief(new, key)}" for key in keys[:3]]
    return ", ".join(said) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _brief(values: dict[str, Any], key: str) -> str:
    text = str(values.get(key, "nothing"))
    return text[:8] if len(text) == 64 else text[:40]
