"""A data stage in a run: operations on a corpus, one after the other, or one on a collection. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from distill import world


def refine(spec, context, directory: Path) -> dict[str, Any]:
    """`corpus/`, `groups/` or `scores/` in the stage's directory; returns {operation: its metrics}."""
    src = context.ranking(spec.from_) if spec.reads == "pairs" else context.corpus(spec.from_)
    out = directory / spec.makes
    if spec.makes == "corpus":
        return world.first(lambda: _one_after_another(spec, src, out, context))
    ((name, op),) = spec.operations()
    if spec.makes == "groups":
        return {name: world.first(lambda: _anew(op, src, out, context))}
    return {name: op.apply(src, out, context)}


def _anew(op, src, out: Path, context) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)  # whole, but of a run that was killed before it could say so
    return op.apply(src, out, context)


def _one_after_another(spec, src: Path, out: Path, context) -> dict[str, Any]:
    """Each on what the one before it made; what lies between is removed, and `out` is there when it is whole."""
    scratch, told = out.with_name("refining"), {}
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    shutil.rmtree(out, ignore_errors=True)
    for number, (name, op) in enumerate(spec.operations(), start=1):
        made = scratch / f"{number}-{name}"
        told[name] = op.apply(src, made, context)
        if number > 1:
            shutil.rmtree(src)
        src = made
    src.rename(out)
    shutil.rmtree(scratch)
    return told
