"""What cannot work where the student is a ranker: known before data is read or a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from distill import sources
from distill.evaluate import OF_RANKERS
from distill.kinds import EvaluateSpec, Stage, TrainSpec
from distill.ranking.kinds import DualKind
from distill.ranking.prepared import GROUPS, MANIFEST
from distill.specs import BM25, EngineSpec
from growth.errors import UserError
from growth.files import read_json

NEGATIVES = "a data stage {mine: {by: bm25}} makes queries with negatives of it"
BESIDE = "{from: ...} runs it beside the student"


def of_training(stage: Stage, planned, rows: int | None) -> Iterator[str]:
    """Every reason; `rows` of a micro-batch, None where that was refused already."""
    train = stage.train
    yield from _of_student(train)
    yield from _of_data(train, planned.recipe)
    yield from (f"targets.{name}: {what}" for name in train.targets for what in _of_target(name, train, planned))
    yield from _of_groups(train, planned.recipe.engine, rows)
    if any(hook.parts() for hook in train.hook_values()):
        yield "hooks.submodel: parts of language models learn alone; a ranker learns whole; `freeze` holds parts"


def _of_student(train: TrainSpec) -> Iterator[str]:
    if train.student.lowrank:
        yield "student.lowrank: of language models; train the encoder as one with it, then make that a ranker"


def _of_data(train: TrainSpec, recipe) -> Iterator[str]:
    name = train.corpus
    if (collection := recipe.collection(name)) is None:
        yield f"data: {name} is text; rankers learn from a collection with triples, or a data stage that makes groups"
    elif name == collection and not recipe.collections[name].triples:
        yield f"data: {name} has no negatives of its own; {NEGATIVES}"


def _of_target(name: str, train: TrainSpec, planned) -> Iterator[str]:
    target = train.targets[name]
    taught = [(loss, o) for loss, o in train.objectives() if o.target == name]
    for reference in target.models:
        try:
            planned.ranker(reference)
        except UserError as error:
            yield str(error)
    if target.shared:
        yield "placement: zero3 is for models of text; a ranker that teaches is whole on every rank"
    if target.combine == "mean_logprob":
        yield "combine: scores are no probabilities; of several rankers it is the mean of their scores, leave it out"
    if target.cache:
        yield from _of_cache(target.cache, train, planned.recipe)
        for loss, objective in taught:
            if objective.needs().group:
                yield f"cache: {loss} wants scores of what meets in a batch, a cache has those of lists; {BESIDE}"


def _of_cache(stage: str, train: TrainSpec, recipe) -> Iterator[str]:
    data = recipe.stage(stage).data
    if data.reads != "pairs":
        yield f"cache: stage {stage} has read text; one of {{score_pairs: ...}} keeps the scores of pairs"
    elif (read := recipe.collection(data.from_)) != (here := recipe.collection(train.corpus)):
        yield f"cache: stage {stage} has scored pairs of {read}, this one trains on {here}"


def lists(name: str, planned) -> int | None:
    """Rows of an epoch; None where they are yet to be made."""
    context = planned.context
    there = (
        context.out / "collections" / name if name in planned.recipe.collections else context.directory(name) / GROUPS
    )
    return read_json(there / MANIFEST)["groups"] if (there / MANIFEST).exists() else None


def _of_groups(train: TrainSpec, engine: EngineSpec, rows: int | None) -> Iterator[str]:
    for loss, objective in train.objectives():
        size = objective.needs().group
        if size and rows and rows % size:
            works = rows - rows % size or size
            yield (
                f"loss.{loss}.group: {size} queries see each other's passages and are never cut, and a micro-batch has "
                f"{rows}; engine.micro_batch={works} or group={_divisor(rows, size)} fits"
            )


def _divisor(rows: int, size: int) -> int:
    return max(n for n in range(1, size + 1) if rows % n == 0)


def of_text(stage: Stage, planned) -> Iterator[str]:
    """Rankers where language models are wanted."""
    train = stage.train
    named = [("student", train.student.origin)]
    named += [(f"targets.{name}", model) for name, target in train.targets.items() for model in target.models]
    for where, reference in named:
        if reference and scores_pairs(reference, planned):
            yield f"{where}: {reference} scores queries and passages, it is no language model; name its own origin"
    if planned.recipe.collection(train.corpus):
        loss = train.objectives()[0][0]
        yield f"data: {train.corpus} is of queries and passages, for rankers; {loss} reads text of `corpora`"


def of_evaluation(stage: Stage, planned) -> Iterator[str]:
    """Rankers where models of text are measured, text where rankers are, or a ranker that cannot search."""
    spec = stage.evaluate
    collection = planned.recipe.collection(spec.data) if spec.data else None
    if not spec.ranks:
        if spec.data is None:
            yield "data: name the corpus to measure on; no stage of this recipe trains on text"
        if collection:
            yield f"data: {spec.data} is of queries and documents; {', '.join(OF_RANKERS)} are measured on it"
        for label, reference in spec.rows.items():
            if scores_pairs(reference, planned):
                yield f"rows.{label}: {reference} is a ranker; {', '.join(OF_RANKERS)} measure it on a collection"
        return
    if not collection:
        yield f"data: {spec.data} is text; rankers are measured on one of `collections`"
    for label, reference in spec.rows.items():
        yield from (f"rows.{label}: {what}" for what in _of_row(reference, spec, planned))


def _of_row(reference: str, spec: EvaluateSpec, planned) -> Iterator[str]:
    if reference == BM25:
        return
    try:
        kind = planned.ranker(reference)
    except UserError as error:
        yield str(error)
        return
    if spec.retrieve and not isinstance(kind, DualKind):
        yield (
            f"retrieve: {reference} makes no vector of a document, so it cannot search all of them; a stage without "
            "`retrieve` has it order those of BM25"
        )


def scores_pairs(reference: str, planned) -> bool:
    """Whether a model or stage is a ranker, as far as its name alone says."""
    if reference in planned.recipe.models:
        return sources.scores_pairs(planned.context.model(reference))
    train = planned.recipe.stage(reference.partition(".")[0]).train
    return bool(train and train.ranks)
