"""Whether a text and the models that read it fit: row length, vocabulary, the very same ids. Before data is read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from distill.corpus import tokens
from distill.kinds import Stage

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


def of_training(stage: Stage, planned, models: dict) -> Iterator[str]:
    """Every reason why these {who: facts} cannot read the corpus of a training stage."""
    text = Text(stage.train.corpus, planned)
    for who, facts in models.items():
        yield from too_long(text, who, facts)
        if facts.vocab < text.vocabulary:
            yield f"corpora.{text.name}.tokenizer: {text.vocabulary} ids, but {who} knows {facts.vocab}"
    for name in sorted({origin for reference in _learned(stage) if (origin := _origin(reference, planned))}):
        yield from _other_ids(text, name, planned)


def too_long(text: Text, who: str, facts) -> Iterator[str]:
    if facts.positions and text.spec.length > facts.positions:
        yield f"corpora.{text.name}.length: {text.spec.length} tokens, but {who} has positions for {facts.positions}"


def _learned(stage: Stage) -> Iterator[str]:
    """The models whose weights are used."""
    yield from (reference for target in stage.train.targets.values() for reference in target.models)
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
