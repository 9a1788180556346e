"""Whether a text and the models that read it fit: row length, vocabulary, the very same ids. Before data is read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from distill.corpus import tokens
from distill.kinds import Stage
from distill.refine.cache import teachers

BROUGHT = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


class Text:
    """What is known of a corpus before it is prepared."""

    def __init__(self, name: str, planned):
        self.name, self.planned, self.spec = name, planned, planned.recipe.text(name)

    @cached_property
    def tokenizer(self):
        """That of a model; None where it is yet to be learned."""
        named = isinstance(self.spec.tokenizer, str)
        return tokens.load(self.planned.context.model(self.spec.tokenizer)) if named else None

    @cached_property
    def vocabulary(self) -> int:
        return tokens.facts(self.tokenizer).vocabulary if self.tokenizer else self.spec.tokenizer.train.vocab

    def too_long(self, who: str, facts) -> Iterator[str]:
        if facts.positions and self.spec.length > facts.positions:
            yield (
                f"corpora.{self.name}.length: {self.spec.length} tokens, but {who} has positions for {facts.positions}"
            )

    def beyond(self, who: str, facts) -> Iterator[str]:
        """What of it a model has no place for."""
        yield from self.too_long(who, facts)
        if facts.vocab < self.vocabulary:
            yield f"corpora.{self.name}.tokenizer: {self.vocabulary} ids, but {who} knows {facts.vocab}"

    def foreign(self, reference: str) -> Iterator[str]:
        """Why its ids are not those that a model or stage has learned."""
        if origin := _origin(reference, self.planned):
            yield from _other_ids(self, origin, self.planned)


def of_training(stage: Stage, planned, models: dict) -> Iterator[str]:
    """Every reason why these {who: facts} cannot read the corpus of a training stage."""
    text = Text(stage.train.corpus, planned)
    for who, facts in models.items():
        yield from text.beyond(who, facts)
    yield from dict.fromkeys(line for reference in _learned(stage, planned) for line in text.foreign(reference))


def _learned(stage: Stage, planned) -> Iterator[str]:
    """The models whose weights are used, or what they said when it was written down."""
    for target in stage.train.targets.values():
        yield from teachers(planned.recipe, target)
    yield from [stage.origin] if stage.origin else []


def _origin(reference: str, planned) -> str | None:
    """The model of the recipe from which a stage has its ids; None: from its corpus."""
    while reference is not None and reference not in planned.recipe.models:
        reference = planned.recipe.stage(reference.partition(".")[0]).origin
    return reference


def _other_ids(text: Text, model: str, planned) -> Iterator[str]:
    """A model has learned what its own tokeniser's ids mean."""
    path = planned.context.model(model)
    if text.spec.tokenizer == model or not any((Path(path) / name).exists() for name in BROUGHT):
        return
    if text.tokenizer is None:
        yield f"corpora.{text.name}.tokenizer: a new one, but {model} has learned the ids of its own; name {model}"
    elif strange := tokens.strange(text.tokenizer, tokens.load(path)):
        yield (
            f"corpora.{text.name}.tokenizer: {text.spec.tokenizer}'s, but {model} has learned other ids: "
            f"{len(strange)} pieces differ, such as {strange[0]!r}"
        )
