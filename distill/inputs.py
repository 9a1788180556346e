"""What a stage was made from, key by key. No torch."""

from __future__ import annotations

import sys
from functools import cache
from importlib import metadata
from typing import Any

from distill import sources
from distill.changes import flat
from distill.context import MANIFEST, Context, Task
from distill.kinds import NO_INPUT
from distill.references import BM25, references
from growth.files import digest, read_json

DATA = ("corpus", "data")  # kinds of references
MADE = ("source", "searcher", "trained", "scored", "rows", "pairs")
VERSIONED = ("distill-growth", "torch", "transformers", "deepspeed", "tokenizers")


def inputs_of(task: Task) -> dict[str, Any]:
    """{dotted key: value} of all that decides what a stage makes: its recipe, seed, models, corpora, earlier stages."""
    spec = task.spec.model_dump(mode="json", by_alias=True)
    inputs = flat({key: value for key, value in spec.items() if key not in NO_INPUT})
    if task.stage.fanned:
        inputs["seed"] = inputs.get("seed", 0) + task.contexts[0].seed
    if task.stage.kind == "train" and task.spec.stop.like:
        inputs["equal"] = task.contexts[0].recipe.equal
    for kind, name in names_of(task):
        for context in task.contexts:
            inputs.update(_made_from(kind, name, context))
    return inputs


def corpora_of(task: Task) -> list[str]:
    """Those of the recipe that a stage names."""
    return [name for kind, name in names_of(task) if kind in DATA and name in task.contexts[0].recipe.corpora]


def collections_of(task: Task) -> list[str]:
    """Those of the recipe that a stage reads, however many stages have been through them."""
    recipe = task.contexts[0].recipe
    return list(dict.fromkeys(c for kind, name in names_of(task) if kind in DATA and (c := recipe.collection(name))))


def names_of(task: Task) -> list[tuple[str, str]]:
    """(kind of reference, name) of all that a stage names."""
    spec = task.spec.model_dump(mode="json", by_alias=True)
    return sorted({(kind, name) for _, kind, name in references({"stages": [{task.stage.kind: spec}]})})


def _made_from(kind: str, name: str, context: Context) -> dict[str, str]:
    if kind in DATA and context.recipe.collection(name):
        return {f"collections.{name}": context.ranking(name).digest}
    if kind in DATA:
        return {f"corpora.{name}": read_json(context.corpus(name) / "manifest.json")["digest"]}
    if kind not in MADE or name == BM25:
        return {}
    if name in context.recipe.models:
        return {f"models.{name}": _identity(name, context)}
    earlier = context.directory(name.partition(".")[0])
    return {f"stages.{earlier.name}": read_json(earlier / MANIFEST)["inputs_digest"]}


def _identity(name: str, context: Context) -> str:
    """Of the weights and the config; weights that the recipe pins were compared already."""
    spec = context.recipe.models[name]
    found = sources.identity(context.model(name), spec.sha256)
    return digest([found, spec.ranker.model_dump(mode="json")]) if spec.ranker else found


@cache
def versions() -> dict[str, str]:
    """Of what computes, without importing it."""
    installed = {dist.name: dist.version for name in VERSIONED for dist in metadata.distributions(name=name)}
    return {"python": sys.version.split()[0], **installed}
