"""The order of a run: what is finished, what is stale, what resumes; and where everything lies. No torch.

Every stage has a directory with a stage.json that says what it was made from. A stage whose inputs are the same is not
run again; one whose inputs changed is stale, and so is all that follows it; one that was interrupted goes on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from distill import recipe as recipes
from distill import strict_yaml, watch, world
from distill.changes import changes, in_short
from distill.context import MANIFEST, Context, Task, Work
from distill.inputs import collections_of, corpora_of, inputs_of, versions
from distill.recipe import Recipe
from growth.console import say, seconds
from growth.errors import UsageError, UserError, did_you_mean
from growth.files import digest, locked, read_json, write_json, write_text

RECIPE = "recipe.yaml"
RUNNING, DONE, STALE = "running", "done", "stale"


def run(
    recipe: Recipe,
    out: Path,
    *,
    start_from: str | None = None,
    fresh: bool = False,
    accept_changes: bool = False,
    work: Work | None = None,
) -> None:
    """All stages of a recipe into `out`, leaving out what is finished and unchanged.

    With `accept_changes` an interrupted stage goes on from its snapshot though its recipe has changed since.
    """
    out, work = Path(out), work or Work()
    if start_from is not None and start_from not in (ids := [stage.id for stage in recipe.stages]):
        raise UsageError(
            f"--from {start_from}: no such stage{did_you_mean(start_from, ids)}; there are {', '.join(ids)}"
        )
    refuse_out(recipe, out)
    with world.company(), _owned(out):
        found: dict[str, Path] = {}
        seeds = range(recipe.seed, recipe.seed + recipe.seeds)
        contexts = tuple(Context(recipe, out, seed, work, found, accept_changes) for seed in seeds)
        world.first(lambda: _look(recipe, contexts[0], out))
        tasks = list(_tasks(recipe, contexts))
        world.first(lambda: _mark(tasks, start_from, fresh))
        for task in tasks:
            _foresee(task, work)
        with world.watched(recipe.engine.timeout):  # what comes from the network is here by now
            for task in tasks:
                _do(task, tasks, work)
    if any(stage.kind == "evaluate" for stage in recipe.stages):
        world.first(lambda: work.report(out))


def _tasks(recipe: Recipe, contexts: tuple[Context, ...]) -> Iterator[Task]:
    for stage in recipe.stages:
        fanned = [(context,) for context in contexts] if stage.fanned else [contexts]
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
    named += [(f"corpus {name}", source) for name, spec in recipe.corpora.items() for source in spec.sources]
    named += [
        (f"collection {name}", place)
        for name, spec in recipe.collections.items()
        for place in (spec.source, spec.triples)
        if place
    ]
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
    made = [place for place in (out, *out.parents) if not place.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            yield
    finally:
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()


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


def _foresee(task: Task, work: Work) -> None:
    """An evaluation that cannot be made is refused before hours of training."""
    _prepare(task)
    if task.stage.kind == "evaluate":
        world.first(lambda: None if is_done(task) else work.foresee(task.spec, task.contexts[0]))


def _prepare(task: Task) -> None:
    """The texts that it reads or compares with; what a data stage makes is there when that is done."""
    for name in corpora_of(task):
        task.contexts[0].corpus(name)
    for name in collections_of(task):
        task.contexts[0].collection(name)


def _lost(task: Task) -> str | None:
    """What a finished stage should have and has no more."""
    return next((name for name in task.stage.makes if not (task.directory / name).is_dir()), None)


def is_done(task: Task) -> bool:
    return (_manifest(task) or {}).get("state") == DONE


# What is done, stale, interrupted


def _mark(tasks: list[Task], start_from: str | None, fresh: bool) -> None:
    """What the user wants to be done again."""
    if fresh:
        for task in [task for task in tasks if _manifest(task)]:
            _remove(task.directory)
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
    watch.at(task.name)
    _prepare(task)
    world.first(lambda: _open(task, tasks))
    if _manifest(task)["state"] == DONE:
        return
    began = time.perf_counter()
    if task.stage.kind == "train":
        metrics = work.train(task.spec, task.contexts[0], task.directory)
    elif task.stage.kind == "data":
        metrics = work.refine(task.spec, task.contexts[0], task.directory)
    elif task.stage.kind == "grow":
        metrics = world.first(lambda: work.grow(task.spec, task.contexts[0], task.directory))
    else:
        metrics = world.first(lambda: work.evaluate(task.spec, task.contexts, task.directory))
    world.first(lambda: _close(task, metrics, time.perf_counter() - began))


def _open(task: Task, tasks: list[Task]) -> None:
    """Leave stage.json saying `done` where nothing is to be done, else `running`; what training saved is never lost."""
    manifest, inputs = _manifest(task), inputs_of(task)
    if manifest is None:
        _begin(task, inputs)
        return
    state, changed = manifest["state"], changes(manifest["inputs"], inputs)
    if state == DONE and not changed and _lost(task):
        say(f"{task.name}: its {_lost(task)} is gone; made again")
        _write(task, {**manifest, "state": RUNNING})
        return
    if state != STALE and not changed:
        kept = "finished before and unchanged, not run again" if state == DONE else "goes on where it was interrupted"
        say(f"{task.name}: {kept}")
        return
    if state == RUNNING and any(task.directory.glob("snapshots/*")):
        _accept(task, changed)
        _write(task, {**manifest, **_made_from(inputs)})
        return
    say(f"{task.name}: runs again ({manifest['why'] if state == STALE else in_short(changed)})")
    for later in [t for t in tasks if t.follows(task)]:
        _make_stale(later, f"follows {task.name}")
    _remove(task.directory)
    _begin(task, inputs)


def _accept(task: Task, changed: list[str]) -> None:
    """An interrupted stage goes on with what it was not begun with, if it can and the user says so."""
    fixed = [change for change in changed if change.startswith("student.")]
    ways = [] if fixed else ["go on all the same, which will be recorded, with --accept-changes"]
    if fixed or not task.contexts[0].accept_changes:
        ways = ["undo that", *ways, f"begin it again with --from {task.stage.id}"]
        listed = "".join(f"\n  {change}" for change in changed)
        why = f"\n{fixed[0].split()[0]} decides what it started as. " if fixed else "\n"
        raise UserError(f"{task.name} was interrupted and has changed since:{listed}{why}{', or '.join(ways)}")
    say(f"{task.name}: goes on where it was interrupted, changed since: {', '.join(changed)}")


def _remove(directory: Path) -> None:
    """In one step as far as anybody can see: a run killed half-way through leaves no half of a stage."""
    gone = directory.with_name(f".{directory.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    directory.rename(gone)
    shutil.rmtree(gone)


def _begin(task: Task, inputs: dict[str, Any]) -> None:
    if task.directory.exists() and any(task.directory.iterdir()):
        raise UserError(f"{task.directory} is not empty and has no {MANIFEST}; move it away")
    task.directory.mkdir(exist_ok=True)
    _write(task, {"state": RUNNING, **_made_from(inputs), "versions": versions()})


def _made_from(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"inputs_digest": digest(inputs), "inputs": inputs}


def _close(task: Task, metrics: Any, wall: float) -> None:
    manifest = _manifest(task)
    _write(task, {**manifest, "state": DONE, "seconds": round(wall, 2), "metrics": metrics})
    say(f"{task.name}: done in {seconds(wall)}")


def _write(task: Task, manifest: dict[str, Any]) -> None:
    write_json(task.directory / MANIFEST, manifest)
