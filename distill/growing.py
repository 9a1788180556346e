"""Growth in a run: operators one after the other, on checkpoints or on models that are only planned. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import growth
from distill.operators import Given, Operator
from growth.errors import UsageError, UserError
from growth.files import read_json, write_json
from growth.writer import LINEAGE

Operators = Sequence[tuple[str, Operator]]
KEEPS = ("exact", "approximate", "no")  # from the best to the worst


def grow(spec, context, directory: Path) -> dict[str, Any]:
    """A growth stage: `model/` in its directory, made once. Returns its metrics."""
    model = directory / "model"
    if not model.is_dir():
        corpus = (lambda: context.corpus(spec.data)) if spec.data else None
        apply(spec.operators(), context.model(spec.from_), model, Given(context.seed, context.model, corpus))
    story = read_json(model / LINEAGE)
    return {
        "preserves": story["preserves"],
        "parameters": growth.inspect(model).parameters,
        "flops_before": sum(context.metrics(stage.id)["flops"] for stage in context.recipe.made_from(spec.from_)),
    }


def apply(ops: Operators, src: Path, dst: Path, given: Given) -> Path:
    """Each on what the one before it made; what lies between is removed, and `dst` is there when it is whole."""
    scratch = Path(dst).with_name(f"{Path(dst).name}.growing")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        made, stories = Path(src), []
        for number, (name, op) in enumerate(ops, start=1):
            source, made = made, scratch / f"{number}-{name}"
            op.apply(source, made, given, growth.Output(check=number == 1))
            stories.append(read_json(made / LINEAGE))
            if number > 1:
                shutil.rmtree(source)
        write_json(made / LINEAGE, told(stories))
        made.rename(dst)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Path(dst)


def plan(ops: Operators, model: Any, given: Given) -> Any:
    """What `apply` would make of a model on the meta device; what cannot be is refused by the operator's name."""
    stories = []
    for name, op in ops:
        try:
            model = op.plan(model, given)
        except UserError as error:
            raise type(error)(f"{name}: {error}") from error
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:  # of transformers, building it
            raise UsageError(f"{name}: no such model can be built: {' '.join(str(error).split())[:300]}") from error
        stories.append(model.growth)
    model.growth = told(stories)
    return model


def told(stories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lineage of several steps as one: from the first source, with what is new since then."""
    if len(stories) == 1:
        return stories[0]
    return {
        **stories[-1],
        "operator": "grow",
        "arguments": {"ops": [{story["operator"]: story["arguments"]} for story in stories]},
        "sources": stories[0]["sources"],
        "maps": {},
        "new": _new(stories),
        "preserves": max((story["preserves"] for story in stories), key=KEEPS.index),
        "steps": [
            {key: story[key] for key in ("operator", "arguments", "maps", "new", "preserves")} for story in stories
        ],
    }


def _new(stories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By axis: the places that hold something new since the first source, or the sizes before and after."""
    new: dict[str, Any] = {}
    for story in stories:
        new = {axis: _moved(places, story["maps"].get(axis)) for axis, places in new.items()}
        new |= {axis: _joined(new.get(axis), here) for axis, here in story["new"].items()}
    return new


def _moved(places: Any, order: Any) -> Any:
    """New places where a later map has put them; a merged one follows its largest part."""
    if not isinstance(places, list) or not isinstance(order, list):
        return places
    main = [max(old, key=lambda term: abs(term[1]))[0] if isinstance(old, list) else old for old in order]
    return [i for i, old in enumerate(main) if old in places]


def _joined(before: Any, here: Any) -> Any:
    if isinstance(before, list) and isinstance(here, list):
        return sorted({*before, *here})
    if isinstance(before, dict) and isinstance(here, dict):
        return {**here, "from": before["from"]}
    return here
