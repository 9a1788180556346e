"""`distill list`: every name that a recipe can use, with a line on each. No torch."""

from __future__ import annotations

import inspect

from distill import strict_yaml
from distill.evaluate import METRICS
from distill.hooks import HOOKS
from distill.objectives import OBJECTIVES
from distill.operators import OPERATORS
from distill.recipe import packaged
from distill.refine import OPS
from growth.console import table

COLLECTIONS = {
    "docstrings": "of this Python installation: a summary line asks for the body below it",
    "PATH": "a directory in BEIR's layout: corpus.jsonl, queries.jsonl, qrels.tsv or qrels/SPLIT.tsv",
}
SOURCES = {
    "stdlib": "English prose of this Python installation: docstrings, comments, topics",
    "stdlib-code": "the source code of this Python installation",
    "synthetic": "a seeded grammar of known entropy",
    "PATH": "txt, md, jsonl or parquet, also gz and zst: a file or a directory",
    "USER/NAME": "a data set of the Hugging Face hub",
}


def show() -> None:
    """A table for every kind of thing."""
    table(["recipe", "about"], [(name, _about(file)) for name, file in packaged().items()])
    table(["objective", "about"], [(name, _first_line(kind)) for name, kind in OBJECTIVES.items()])
    table(["operator", "about"], [(name, _first_line(kind)) for name, kind in OPERATORS.items()])
    table(["data operation", "about"], [(name, _first_line(kind)) for name, kind in OPS.items()])
    table(["hook", "about"], [(name, _first_line(kind)) for name, kind in HOOKS.items()])
    table(["metric", "about"], [(name, _first_line(type(metric))) for name, metric in METRICS.items()])
    table(["source", "about"], list(SOURCES.items()))
    table(["collection", "about"], list(COLLECTIONS.items()))


def _about(file) -> str:
    """Of a recipe, without checking it."""
    return str((strict_yaml.parse(file.read_bytes()).value or {}).get("about", ""))


def _first_line(thing: type) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]
