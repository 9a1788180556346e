"""Names in a recipe: what must be defined, and before it is used. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from distill.refine import OPS
from distill.specs import BM25
from distill.strict_yaml import Mistake, Path
from growth.errors import did_you_mean

REFERENCES = {
    "corpora.*.tokenizer": "model",
    "stages.*.train.student.from": "source",
    "stages.*.train.student.cut.from": "source",
    "stages.*.train.student.new.like": "source",
    "stages.*.train.student.grow.from": "source",
    "stages.*.train.student.grow.ops.*.merge.with.*": "source",
    "stages.*.train.student.grow.ops.*.merge.base": "source",
    "stages.*.train.data": "data",
    "stages.*.train.data.from": "data",
    "stages.*.train.data.after": "trained",
    "stages.*.train.stop.like": "trained",
    "stages.*.train.targets.*.from": "source",
    "stages.*.train.targets.*.ensemble.*": "source",
    "stages.*.train.targets.*.cache": "scored",
    "stages.*.train.loss.*.*.target": "target",
    "stages.*.train.hooks.*.mask.from": "source",
    "stages.*.data.from": "data",
    "stages.*.data.ops.*.score.teacher": "source",
    "stages.*.data.ops.*.score.reference": "source",
    "stages.*.data.ops.*.select.by": "rows",
    "stages.*.data.ops.*.retokenize.to": "model",
    "stages.*.data.ops.*.retokenize.like": "corpus",
    "stages.*.data.ops.*.mix.with.@": "corpus",
    "stages.*.data.ops.*.label.teacher": "source",
    "stages.*.data.ops.*.cache.teacher": "source",
    "stages.*.data.ops.*.mine.by": "searcher",
    "stages.*.data.ops.*.score_pairs.teacher": "source",
    "stages.*.data.ops.*.score_pairs.ensemble.*": "source",
    "stages.*.data.ops.*.drop_false_negatives.by": "pairs",
    "stages.*.grow.from": "source",
    "stages.*.grow.ops.*.merge.with.*": "source",
    "stages.*.grow.ops.*.merge.base": "source",
    "stages.*.grow.data": "corpus",
    "stages.*.evaluate.rows.*": "searcher",
    "stages.*.evaluate.data": "data",
    "stages.*.evaluate.teacher": "source",
}
MAKE_MODELS = {"train", "grow"}  # kinds of stages whose result is a model
RESERVED = {"corpora", "collections"}  # directories of a run that no stage may have
GIVEN = {"models": "model", "corpora": "corpus", "collections": "collection"}  # keys of a recipe
SAID = {
    "model": "model",
    "source": "model or earlier stage",
    "searcher": "model or earlier stage",
    "corpus": "corpus",
    "data": "corpus or collection",
    "scored": "earlier data stage with scores",
    "rows": "earlier data stage with scores of rows",
    "pairs": "earlier data stage with scores of pairs",
    "target": "target",
    "trained": "earlier train stage",
}


SAID_READ = {"text": "the rows of a corpus", "pairs": "queries and documents"}


def references(recipe: Any) -> Iterator[tuple[Path, str, str]]:
    """(path, kind, name) of every reference in a recipe that was read, well formed or not."""
    for pattern, kind in REFERENCES.items():
        for path, name in _matching(recipe, pattern.split("."), ()):
            if isinstance(name, str):
                yield path, kind, name


def _matching(value: Any, pattern: list[str], path: Path) -> Iterator[tuple[Path, Any]]:
    if not pattern:
        yield path, value
        return
    if pattern == ["@"]:  # the keys themselves
        yield from (((*path, key), key) for key in (value if isinstance(value, dict) else ()))
        return
    parts = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for part in parts:
        if pattern[0] in ("*", part):
            yield from _matching(value[part], pattern[1:], (*path, part))


def wrong(recipe: Any) -> list[Mistake]:
    """Names that nothing has, names that come too late, and stages that share one."""
    stages = [s if isinstance(s, dict) else {} for s in _list(recipe, "stages")]
    found = [
        Mistake(path, what)
        for path, kind, name in references(recipe)
        if (what := _unknown(recipe, stages, path, kind, name))
    ]
    return [*found, *_ids(recipe, stages), *_without_data(stages), *_after(stages), *_like(recipe, stages),
            *_read(recipe, stages)]  # fmt: skip


def _without_data(stages: list[dict]) -> Iterator[Mistake]:
    trains = any("train" in stage for stage in stages)
    for i, stage in enumerate(stages):
        if isinstance(stage.get("evaluate"), dict) and not trains and stage["evaluate"].get("data") is None:
            yield Mistake(("stages", i, "evaluate"), "'data' is needed where no stage trains")


def _after(stages: list[dict]) -> Iterator[Mistake]:
    """A stream goes on only where it is the same one."""
    for i, stage in enumerate(stages):
        data = _dict(_dict(stage, "train"), "data")
        earlier = next((s for s in stages[:i] if s.get("id") == data.get("after")), None)
        other = _corpus(earlier) if earlier and "train" in earlier else None
        if other is not None and other != data.get("from"):
            what = f"stage {earlier['id']!r} trains on corpus {other!r}, not on {data.get('from')!r}"
            yield Mistake(("stages", i, "train", "data", "after"), what)
        elif earlier and _dict(earlier, "train").get("seed", 0) != _dict(stage, "train").get("seed", 0):
            what = f"stage {earlier['id']!r} has another `seed`, so another order; rows would come twice or never"
            yield Mistake(("stages", i, "train", "data", "after"), what)


def _corpus(stage: dict) -> Any:
    data = _dict(stage, "train").get("data")
    return data.get("from") if isinstance(data, dict) else data


def _like(recipe: dict, stages: list[dict]) -> Iterator[Mistake]:
    for i, stage in enumerate(stages):
        if "like" in _dict(_dict(stage, "train"), "stop") and recipe.get("equal") == "seconds":
            what = "seconds differ from run to run, so no number of steps follows; set equal: steps, tokens or flops"
            yield Mistake(("stages", i, "train", "stop", "like"), what)


def _read(recipe: dict, stages: list[dict]) -> Iterator[Mistake]:
    """An operation on text is given text, one on pairs a collection."""
    pairs = {*_dict(recipe, "collections"), *_made(stages, ("groups",))}
    for i, stage in enumerate(stages):
        name, given = _dict(stage, "data").get("from"), _known(recipe, stages, ("stages", i), "data")
        for op in _operations(stage) if name in given else ():
            if (name in pairs) != (OPS[op].reads == "pairs"):
                said = "a collection, not text" if name in pairs else "text, not a collection"
                what = f"{op} reads {SAID_READ[OPS[op].reads]}; {name!r} is {said}"
                yield Mistake(("stages", i, "data", "from"), what)


def _unknown(recipe: dict, stages: list[dict], path: Path, kind: str, name: str) -> str | None:
    known = _known(recipe, stages, path, kind)
    if name in known:
        return None
    models = kind in ("source", "searcher")
    stage = next((s for s in stages if s.get("id") == name.removesuffix(".start")), None) if models else None
    if stage is not None and not MAKE_MODELS & stage.keys():
        return f"stage {stage['id']!r} trains nothing, so it is no model"
    if stage is not None and name != stage["id"] and "train" not in stage:
        return f"stage {stage['id']!r} does not train, so it has no start; what it makes is {stage['id']!r}"
    if stage is not None:
        return f"stage {stage['id']!r} is not finished before this one; a stage uses earlier ones"
    return f"no {SAID[kind]} {name!r}{did_you_mean(name, known) or '; known: ' + (', '.join(known) or 'none')}"


def _known(recipe: dict, stages: list[dict], path: Path, kind: str) -> list[str]:
    earlier = stages[: path[1]] if path[0] == "stages" else []
    if kind in DATA:
        named = [name for key in DATA[kind].defined for name in _dict(recipe, key)]
        return [*named, *_made(earlier, DATA[kind].made, DATA[kind].reads)]
    models = list(_dict(recipe, "models"))
    if kind == "model":
        return models
    if kind == "target":
        return list(_dict(stages[path[1]].get("train"), "targets"))
    trained = [str(s.get("id")) for s in earlier if "train" in s]
    if kind == "trained":
        return trained
    made = [str(s.get("id")) for s in earlier if MAKE_MODELS & s.keys()]
    without = [BM25] if kind == "searcher" else []
    return list(dict.fromkeys([*without, *models, *made, *(f"{stage}.start" for stage in trained)]))


class Defined(NamedTuple):
    """Where names of data are given: keys of the recipe, and data stages that make and read so."""

    defined: tuple[str, ...]
    made: tuple[str, ...]
    reads: tuple[str, ...] = ("text", "pairs")


DATA = {
    "corpus": Defined(("corpora",), ("corpus",)),
    "data": Defined(("corpora", "collections"), ("corpus", "groups")),
    "scored": Defined((), ("scores",)),
    "rows": Defined((), ("scores",), ("text",)),
    "pairs": Defined((), ("scores",), ("pairs",)),
}


def _made(stages: list[dict], makes: tuple[str, ...], reads: tuple[str, ...] = ("text", "pairs")) -> list[str]:
    """Data stages that make such things of such things."""
    data = [stage for stage in stages if "data" in stage]
    return [str(stage.get("id")) for stage in data if _makes(stage) in makes and _reads(stage) in reads]


def _makes(stage: dict) -> str:
    return next((OPS[name].makes for name in _operations(stage) if OPS[name].makes != "corpus"), "corpus")


def _reads(stage: dict) -> str:
    return next((OPS[name].reads for name in _operations(stage)), "text")


def _operations(stage: dict) -> list[str]:
    ops = [name for op in _list(_dict(stage, "data"), "ops") if isinstance(op, dict) for name in op]
    return [name for name in ops if name in OPS]


def _ids(recipe: dict, stages: list[dict]) -> Iterator[Mistake]:
    yield from _twice(recipe)
    ids = [stage.get("id") for stage in stages]
    for i, name in enumerate(ids):
        if not isinstance(name, str):
            continue
        if name in ids[:i]:
            yield Mistake(("stages", i, "id"), f"two stages are called {name!r}")
        if kind := next((kind for kind in GIVEN if name in _dict(recipe, kind)), None):
            yield Mistake(("stages", i, "id"), f"{name!r} is a {GIVEN[kind]} already; a name means one thing")
        if name in RESERVED:
            yield Mistake(("stages", i, "id"), f"{name!r} is a directory of every run; choose another name")
        if name == BM25:
            yield Mistake(("stages", i, "id"), f"{name!r} is the search by words; choose another name")


def _twice(recipe: dict) -> Iterator[Mistake]:
    for name in _dict(recipe, "collections"):
        if kind := next((kind for kind in ("models", "corpora") if name in _dict(recipe, kind)), None):
            yield Mistake(("collections", name), f"{name!r} is a {GIVEN[kind]} already; a name means one thing")
    if BM25 in _dict(recipe, "models"):
        yield Mistake(("models", BM25), f"{BM25!r} is the search by words; choose another name")


def _dict(value: Any, key: str) -> dict:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _list(value: Any, key: str) -> list:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []
