"""What a teacher says of every next token, written down once, for students that never run it. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill.refine.operation import DataOp

BELONGS = {"k": "topk", "draws": "sampled"}  # keys that one choice of `keep` alone has
ANY = ("hidden", "likelihood")  # choices that serve losses of any temperature


class Cache(DataOp):
    """One pass of a teacher over a corpus; `targets: {t: {cache: <this stage>}}` reads it.

    Next tokens only: masked ones differ from epoch to epoch. The temperature is fixed here, since what is left out
    cannot be divided by another one afterwards; hidden states serve any.
    """

    makes: ClassVar = "scores"

    teacher: str = Field(description="a model or earlier stage, of the vocabulary of the corpus")
    keep: Literal["topk", "sampled", "hidden", "likelihood"] = Field(
        "topk",
        description="likeliest tokens and the remaining mass; unbiased draws; last hidden states, exact; likelihood of "
        "the text in tokens of its own, for `aligned`",
    )
    k: Annotated[int, Field(gt=0)] | None = Field(None, description="topk: how many tokens; 64 unless given")
    draws: Annotated[int, Field(gt=0, le=255)] | None = Field(None, description="sampled: how many; 50 unless given")
    temperature: float = Field(1.0, gt=0, description="topk, sampled: divides the teacher's logits; that of the loss")
    dtype: Literal["float16", "bfloat16", "float32"] | None = Field(
        None, description="of what is kept; null: float16 for topk, as the teacher computes for hidden"
    )
    tokens: Annotated[int, Field(gt=0)] = Field(4096, description="tokens of one forward pass of the teacher")

    @model_validator(mode="after")
    def _check(self) -> Cache:
        for key, keep in BELONGS.items():
            if getattr(self, key) is not None and self.keep != keep:
                raise ValueError(f"{key}: only keep: {keep} has it")
        if self.keep in ANY and self.temperature != 1:
            raise ValueError(f"temperature: {self.keep} serves any, it is the loss that has one")
        if self.keep in ("sampled", "likelihood") and self.dtype:
            raise ValueError(f"dtype: {self.keep} has no choice")
        if self.keep == "topk" and self.dtype == "bfloat16":
            raise ValueError("dtype: bfloat16 keeps two digits of a log-probability, float16 three in as many bytes")
        return self

    @property
    def readers(self) -> tuple[str, ...]:
        return (self.teacher,)

    def check(self, planned, text) -> Iterator[str]:
        facts = planned.facts(self.teacher)
        if not facts.causal:
            yield (
                f"teacher: {facts.family} predicts masked tokens, other ones every epoch: nothing to keep; "
                f"a target {{from: {self.teacher}}} runs it beside the student"
            )
        if self.k and self.k > text.vocabulary:
            yield f"k: {self.k} of {text.vocabulary} tokens; {text.vocabulary} keeps all of them"
        if self.keep == "likelihood":
            yield from text.told("teacher", self.teacher, facts)
        else:
            yield from text.beyond("the teacher", facts)
            yield from text.foreign(self.teacher, facts.vocab)

    def serves(self, objective) -> Iterator[str]:
        """Every reason why this objective cannot be taught from it."""
        needs = objective.needs()
        if needs.target or not needs.target_head:
            yield f"a cache keeps what the teacher predicts, nothing from inside it; {{from: {self.teacher}}} has all"
        elif needs.own_ids != (self.keep == "likelihood") or (needs.own_ids and objective.kind != "likelihood"):
            yield "`aligned` of kind likelihood and a cache of keep: likelihood are for each other and nothing else"
        elif needs.head != "causal":
            yield f"objective {needs.head}: a cache keeps next tokens; masked ones differ from epoch to epoch"
        elif self.keep == "sampled" and objective.kind != "forward_kl":
            yield f"kind {objective.kind}: of a sample forward_kl alone is unbiased; topk and hidden serve every kind"
        elif self.keep not in ANY and not _is(objective.temperature, self.temperature):
            yield (
                f"temperature: the teacher is cached at {self.temperature:g}, and what was left out cannot be divided "
                "by another one; give both the same, or keep: hidden"
            )

    def apply(self, src: Path, out: Path, context) -> dict[str, Any]:
        from distill.teachers.caching import write

        return write(self, src, out, context)


def _is(schedule, value: float) -> bool:
    return schedule.is_constant and schedule.points[0][1] == value


def behind(recipe, target) -> Cache | None:
    """The operation that keeps the values of a target `{cache: stage}`; None where that stage keeps something else."""
    ((_, op),) = recipe.stage(target.cache).data.operations()
    return op if isinstance(op, Cache) else None


def teachers(recipe, target) -> tuple[str, ...]:
    """Whose values a target hands over: models that run beside the student, or the one behind a cache."""
    op = target.cache and behind(recipe, target)
    return (op.teacher,) if op else target.models


def misfits(stage, recipe) -> Iterator[str]:
    """Every reason why the caches of a train stage cannot teach it."""
    objectives = [(name, objective) for name, objective in stage.train.objectives() if objective.target]
    for name, target in stage.train.targets.items():
        for what in _of(target, recipe, stage.train, [o for o in objectives if o[1].target == name]):
            yield f"targets.{name}.cache: {what}"


def _of(target, recipe, train, objectives: list) -> Iterator[str]:
    if not target.cache:
        return
    op, text = behind(recipe, target), recipe.stage(target.cache).data.from_
    if op is None:
        yield f"stage {target.cache} keeps numbers of rows, not what a teacher predicts; the operation `cache` does"
        return
    if text != train.corpus:
        yield f"stage {target.cache} has read {text}, this one trains on {train.corpus}"
    for name, objective in objectives:
        yield from (f"{name}: {what}" for what in op.serves(objective))
