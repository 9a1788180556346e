"""Whether a text and the models that read it fit: row length, vocabulary, ids, classes. Before data is read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from distill import sources
from distill.corpus import tokens
from distill.kinds import Stage
from distill.specs import NewTokenizer
from distill.teachers import vocabularies
from distill.teachers.spans import Writing
from growth.errors import UserError

BROUGHT = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


class Text:
    """What is known of a corpus before it is prepared."""

    def __init__(self, name: str, planned, spec=None):
        self.name, self.planned, self.spec = name, planned, spec or planned.recipe.text(name)

    def after(self, op) -> Text:
        """What an operation will make of it."""
        return Text(self.name, self.planned, op.plan(self.spec, self.planned.recipe))

    @cached_property
    def tokenizer(self):
        """That of a model; None where it is yet to be learned, and where a forecast has a config alone."""
        if not isinstance(self.spec.tokenizer, str):
            return None
        path = self.planned.context.model(self.spec.tokenizer)
        return tokens.load(path) if _brought(path) or sources.has_weights(path) else None

    @cached_property
    def vocabulary(self) -> int:
        if self.tokenizer:
            return tokens.facts(self.tokenizer).vocabulary
        named = isinstance(self.spec.tokenizer, str)
        return self.planned.facts(self.spec.tokenizer).vocab if named else self.spec.tokenizer.train.vocab

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

    def foreign(self, reference: str, rows: int | None = None) -> Iterator[str]:
        """Why its ids are not those that a model or stage has learned.

        With `rows`, those of its head, also why what it says of the next token is not said of the same pieces.
        """
        name, theirs = _learned(reference, self.planned)
        if theirs == self.spec.tokenizer or isinstance(theirs, NewTokenizer):
            return  # what is yet to be learned is compared when the stage begins
        if isinstance(self.spec.tokenizer, str) and not self.tokenizer:
            return
        if theirs is None:
            if rows:
                yield f"{name} brings no tokeniser, so nobody can say what its logits are of; put its files there"
        elif self.tokenizer is None:
            works = f"name {name}" + (f"; or {vocabularies.WORKS}" if rows else "")
            yield f"corpora.{self.name}.tokenizer: a new one, but {name} has learned the ids of its own; {works}"
        elif reason := self._differs(tokens.load(self.planned.context.model(theirs)), rows):
            yield f"corpora.{self.name}.tokenizer: {self.spec.tokenizer}'s, but {name} has learned other ids: {reason}"

    def told(self, place: str, reference: str, facts) -> Iterator[str]:
        """Why a model or stage cannot read its text in ids of its own; `place` is where a recipe names it."""
        yield from self.too_long(place, facts)
        who, theirs = _learned(reference, self.planned)
        if theirs is None:
            yield f"{who} brings no tokeniser to read with; put its files there"
        if isinstance(theirs, str) and theirs == self.spec.tokenizer:
            yield f"{place}: {vocabularies.same(who)}"
        elif isinstance(theirs, str):  # what is yet to be learned is compared when the stage begins
            yield from _of_two(self, place, who, tokens.load(self.planned.context.model(theirs)), facts)

    def _differs(self, tokenizer, rows: int | None) -> str:
        if rows is None:
            return vocabularies.unread(self.tokenizer, tokenizer)
        found = vocabularies.match(self.tokenizer, tokenizer, self.vocabulary, rows)
        return f"{found.reason}; {vocabularies.WORKS}" if found.reason else ""


def _learned(reference: str, planned) -> tuple[str, str | NewTokenizer | None]:
    """Whose ids a model or stage has learned: (its name, a model with that tokeniser; None: it does not bring any)."""
    recipe, name = planned.recipe, reference
    while name not in recipe.models:
        stage = recipe.stage(name.partition(".")[0])
        if stage.origin is None:
            return reference, recipe.text(stage.train.corpus).tokenizer
        name = stage.origin
    return name, name if _brought(planned.context.model(name)) else None


def _brought(path: Path) -> bool:
    return any((Path(path) / file).exists() for file in BROUGHT)


def of_training(stage: Stage, planned, student, teachers: dict) -> Iterator[str]:
    """Every reason why a student and the {target: facts of its models} cannot read the corpus of a training stage."""
    yield from dict.fromkeys(_of_training(stage, Text(stage.train.corpus, planned), student, teachers))


def _of_training(stage: Stage, text: Text, student, teachers: dict) -> Iterator[str]:
    yield from text.beyond("the student", student)
    yield from text.foreign(stage.origin) if stage.origin else ()
    for name, target in stage.train.targets.items():
        needs = [objective.needs() for _, objective in stage.train.objectives() if objective.target == name]
        fits = _told if any(need.own_ids for need in needs) else _shown
        for reference, facts in zip(target.models, teachers[name], strict=False):  # an average is the student itself
            yield from fits(text, name, reference, facts, needs)


def _shown(text: Text, name: str, reference: str, facts, needs: list) -> Iterator[str]:
    """A teacher reads the ids of the corpus."""
    yield from text.beyond(f"target {name}", facts)
    speaks = any(need.target_head and need.head != "classify" for need in needs)
    yield from text.foreign(reference, facts.vocab if speaks else None)


def _told(text: Text, name: str, reference: str, facts, needs: list) -> Iterator[str]:
    """A teacher reads the text of the corpus in ids of its own."""
    if not all(need.own_ids for need in needs):
        yield f"targets.{name}: `aligned` alone reads in the teacher's own ids; another loss needs a target of its own"
    yield from text.told(f"targets.{name}", reference, facts)


def _of_two(text: Text, place: str, who: str, tokenizer, facts) -> Iterator[str]:
    for where, side in ((f"corpora.{text.name}", text.tokenizer), (place, tokenizer)):
        try:
            side and Writing(side)
        except UserError as error:
            yield f"{where}: {error}"
    if text.tokenizer and vocabularies.match(text.tokenizer, tokenizer, text.vocabulary, facts.vocab):
        yield f"{place}: {vocabularies.same(who)}"
    if facts.vocab < (ids := tokens.facts(tokenizer).vocabulary):
        yield f"{place}: the tokeniser of {who} has {ids} ids, the model knows {facts.vocab}"


def of_classes(stage: Stage, recipe) -> Iterator[str]:
    """Every reason why this training stage cannot classify."""
    objectives = [objective for _, objective in stage.train.objectives()]
    if not any(objective.needs().head == "classify" for objective in objectives):
        return
    name = stage.train.corpus
    text = recipe.text(name)
    if others := {head for o in objectives if (head := o.needs().head) not in (None, "classify")}:
        yield f"loss: a student has one head, so objective classify and {others.pop()} are two stages"
    if text.packed:
        yield f"objective classify: a row has one class, so it takes one document; {_where(name, recipe)} packed: false"
    if not text.label and any(o.needs().head == "classify" and not o.target for o in objectives):
        yield (
            f"objective classify: {name} has no classes; set `label` of the corpus, or have a teacher give them with "
            "a data stage {label: {teacher: ...}}"
        )


def _where(name: str, recipe) -> str:
    return f"corpora.{name} needs" if name in recipe.corpora else f"{name} is made from text that needs"
