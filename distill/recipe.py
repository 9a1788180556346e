"""A recipe: what a run is made of, as frozen values whose fields are the keys of the YAML file. No torch.

`load` reads one strictly and reports every mistake at once; `dump` writes one with every default in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, create_model, model_serializer, model_validator

from distill import mistakes, references, strict_yaml
from distill.evaluate import METRICS
from distill.hooks import HOOKS, Hook
from distill.objectives import OBJECTIVES
from distill.operators import BARE, OPERATORS, Operator
from distill.overrides import apply
from distill.schedules import Pair, Schedule, Several, Value
from growth.errors import UsageError, did_you_mean

Name = Annotated[str, Field(pattern=mistakes.NAME)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Metric = Literal[tuple(METRICS)]


def _with_known_fields(chosen: dict[str, dict]) -> dict[str, dict]:
    ((name, fields),) = chosen.items()
    known = [field.name for field in dataclasses.fields(METRICS[name])]
    strange = next((key for key in fields if key not in known), None)
    if strange is not None:
        raise ValueError(
            f"{name} has no key {strange!r}{did_you_mean(strange, known) or '; known: ' + ', '.join(known)}"
        )
    return chosen


Chosen = Annotated[dict[Metric, dict[str, Any]], Field(min_length=1, max_length=1), AfterValidator(_with_known_fields)]


class OneOf(Value):
    """A choice: exactly one of its optional keys is given."""

    @model_validator(mode="after")
    def _check_one(self) -> OneOf:
        if len(self._given()) != 1:
            found = " and ".join(self._given()) or "none"
            raise ValueError(f"exactly one of {', '.join(self._choices())} is needed, found {found}")
        return self

    @model_serializer(mode="wrap")
    def _write_one(self, write) -> dict:
        return {key: value for key, value in write(self).items() if value is not None}

    @classmethod
    def _choices(cls) -> dict[str, str]:
        """{key in YAML: attribute}."""
        return {f.alias or name: name for name, f in cls.model_fields.items() if not f.is_required()}

    def _given(self) -> list[str]:
        return [key for key, name in self._choices().items() if getattr(self, name) is not None]


class _Named(OneOf):
    """One value by name: an objective, a hook, an operator."""

    def named(self) -> tuple[str, Value]:
        (name,) = self._given()
        return name, getattr(self, name)


def _one_of(name: str, table: dict[str, type[Value]]) -> type[_Named]:
    return create_model(name, __base__=_Named, **{key: (kind | None, None) for key, kind in table.items()})


class EngineSpec(Value):
    """How DeepSpeed runs it; nothing here changes what is computed beyond rounding."""

    zero: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage: what is sharded over ranks")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward and backward pass")
    micro_batch: Positive | None = Field(None, description="rows of one forward pass on one rank; null: all of a step")
    deepspeed: dict[str, Any] = Field({}, description="passed through to DeepSpeed's configuration")


class ModelSpec(Value):
    """Where weights come from: the first source at hand."""

    from_: Annotated[Several[str], Field(min_length=1)] = Field(
        alias="from", description="hub id, path or package:NAME/SUBPATH, or a list of them"
    )
    revision: str | None = Field(None, description="of a hub repository: branch, tag or commit")
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="to load in; null: as the run asks")
    sha256: Annotated[str, Field(pattern=mistakes.SHA256)] | None = Field(None, description="of the weights")

    @model_validator(mode="before")
    @classmethod
    def _read_short(cls, given: Any) -> Any:
        given = {"from": given} if isinstance(given, str | list | tuple) else given
        if isinstance(given, dict) and isinstance(given.get("from"), str):
            return {**given, "from": (given["from"],)}
        return given


class TrainTokenizer(Value):
    vocab: Positive = Field(description="size of the vocabulary to learn")
    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"


class NewTokenizer(Value):
    train: TrainTokenizer


class CorpusSpec(Value):
    """Text, and how it becomes rows of token ids."""

    source: str = Field(description="stdlib, stdlib-code, synthetic, a path or a Hugging Face data set id")
    tokenizer: str | NewTokenizer = Field(description="a model of the recipe, or {train: {vocab: ..., kind: ...}}")
    length: Annotated[int, Field(ge=8)] = Field(128, description="tokens in a row")
    heldout: Share = Field(0.05, description="share of the documents that training never sees")
    field: str = Field("text", description="the column that holds the text")
    split: str = Field("train", description="of a Hugging Face data set")
    revision: str | None = Field(None, description="of a Hugging Face data set")
    packed: bool = Field(True, description="several whole documents in a row")
    limit: Positive | None = Field(None, description="read only this many documents")


class NewSpec(OneOf):
    """Random weights."""

    config: str | dict[str, Any] | None = Field(None, description="path of a config.json, or its content")
    like: str | None = Field(None, description="the architecture of a model or stage")


class CutSpec(Value):
    """Some layers of a bigger model."""

    from_: str = Field(alias="from", description="a model or stage")
    layers: Positive | Annotated[Several[int], Field(min_length=1)] = Field(
        description="which layers, from 0; or how many, evenly spaced with the last one"
    )


Op = _one_of("Op", OPERATORS)


def _in_full(op: str | Op) -> Op:
    return Op(**{op: OPERATORS[op]()}) if isinstance(op, str) else op


class GrowthSpec(Value):
    """A model or stage through operators of `growth`."""

    from_: str = Field(alias="from", description="a model or stage")
    ops: Annotated[Several[Annotated[Literal[BARE] | Op, AfterValidator(_in_full)]], Field(min_length=1)] = Field(
        description="operators, one after the other: {name: {argument: value}}, or a name where none is needed"
    )

    def operators(self) -> list[tuple[str, Operator]]:
        """(name, operator) in the order of the recipe."""
        return [op.named() for op in self.ops]


class GrowSpec(GrowthSpec):
    data: str | None = Field(None, description="a corpus, for operators that read text")

    @property
    def corpus(self) -> str | None:
        return self.data

    @model_validator(mode="after")
    def _check_data(self) -> GrowSpec:
        reader = next((name for name, op in self.operators() if op.reads_text), None)
        if reader and not self.data:
            raise ValueError(f"'data' is needed: {reader} reads text")
        if self.data and not reader:
            raise ValueError("data: none of these operators reads text")
        return self


class StudentSpec(OneOf):
    new: NewSpec | None = Field(None, description="random weights: {config: ...} or {like: ...}")
    from_: str | None = Field(None, alias="from", description="a model or stage, as it is")
    cut: CutSpec | None = Field(None, description="some layers of a model or stage")
    grow: GrowthSpec | None = Field(None, description="a model or stage through operators of growth")

    @property
    def origin(self) -> str | None:
        """Whose weights it starts with; an architecture alone is no origin."""
        made = self.cut or self.grow
        return made.from_ if made else self.from_


class TargetSpec(Value):
    """Where teacher values come from."""

    from_: str = Field(alias="from", description="a model or stage, frozen")


class OptimSpec(Value):
    name: Literal["adamw"] = "adamw"
    batch: Positive = Field(description="rows of one step, over all ranks")
    betas: Pair[Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0: no clipping")


class StopSpec(OneOf):
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    tokens: Positive | None = None
    like: str | None = Field(
        None, description="a train stage: as much, in the recipe's `equal`, as it and those it was made from"
    )


Loss, HookSpec = _one_of("Loss", OBJECTIVES), _one_of("HookSpec", HOOKS)


NO_INPUT = {"save_every", "keep"}  # how a stage is kept, not what it makes


class Continued(Value):
    """Rows that an earlier stage has not seen."""

    from_: str = Field(alias="from", description="a corpus")
    after: str = Field(description="a train stage on that corpus: the stream goes on where it stopped")


class TrainSpec(Value):
    student: StudentSpec = Field(description="exactly one of new, from, cut, grow")
    data: str | Continued = Field(description="a corpus, or {from: corpus, after: stage}")
    targets: dict[Name, TargetSpec] = Field({}, description="teachers by the names that losses use")
    loss: Annotated[Several[Loss], Field(min_length=1)] = Field(description="objectives, added up")
    optim: OptimSpec
    lr: Schedule = Field(description="learning rate")
    stop: StopSpec = Field(description="exactly one of steps, epochs, tokens, like")
    hooks: Several[HookSpec] = Field((), description="what changes during training")
    evaluate_every: Positive | None = Field(None, description="steps between held-out losses of `ce`; null: none")
    save_every: Positive = Field(100, description="steps between snapshots")
    keep: Positive = Field(1, description="snapshots to keep")
    dropout: bool = Field(False, description="train the student with the dropout of its config")

    def objectives(self) -> list[tuple[str, Value]]:
        """(name, objective) in the order of the recipe."""
        return [loss.named() for loss in self.loss]

    def hook_values(self) -> list[Hook]:
        return [hook.named()[1] for hook in self.hooks]

    @property
    def corpus(self) -> str:
        """Its name."""
        return self.data if isinstance(self.data, str) else self.data.from_

    @model_validator(mode="after")
    def _check_hooks(self) -> TrainSpec:
        names = [hook.named()[0] for hook in self.hooks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"hooks: {twice} stands twice")
        if self.evaluate_every and not any(name == "ce" for name, _ in self.objectives()):
            raise ValueError("evaluate_every is the held-out loss of `ce`, which is not among the losses")
        return self


class EvaluateSpec(Value):
    rows: Annotated[dict[str, str], Field(min_length=1)] = Field(description="{label: model, stage or stage.start}")
    on: Annotated[Several[Metric | Chosen], Field(min_length=1)] = Field(
        description="what is measured: names, or {name: {field: value}}"
    )
    data: str | None = Field(None, description="a corpus; null: the one of the first train stage")
    teacher: str | None = Field(None, description="whom agreement is with; null: the row named teacher")

    @property
    def corpus(self) -> str | None:
        return self.data


class Stage(OneOf):
    id: Name
    train: TrainSpec | None = None
    grow: GrowSpec | None = None
    evaluate: EvaluateSpec | None = None

    @property
    def kind(self) -> Literal["train", "grow", "evaluate"]:
        return self._given()[0]

    @property
    def makes_a_model(self) -> bool:
        return self.kind != "evaluate"

    @property
    def origin(self) -> str | None:
        """The model or stage whose weights this stage starts from."""
        return self.grow.from_ if self.grow else self.train.student.origin if self.train else None


class Recipe(Value):
    recipe: Name = Field(description="its name, and that of the run directory")
    about: str = Field("", description="one line for `distill list` and the model card")
    seed: Annotated[int, Field(ge=0)] = 0
    seeds: Positive = Field(1, description="make every model with this many seeds, counted from `seed`")
    equal: Literal["steps", "tokens", "flops", "seconds"] = Field(
        "steps", description="what a twin without the method gets"
    )
    engine: EngineSpec = EngineSpec()
    models: dict[Name, ModelSpec] = Field({}, description="what exists before the run")
    corpora: dict[Name, CorpusSpec] = Field({}, description="text to train and evaluate on")
    stages: Annotated[Several[Stage], Field(min_length=1)]

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.id == name)

    def made_from(self, reference: str | None) -> Iterator[Stage]:
        """The train stages whose work is in these weights, the last one first; `stage.start` is without its own."""
        while reference and reference not in self.models:
            name, _, start = reference.partition(".")
            stage = self.stage(name)
            if stage.train and not start:
                yield stage
            reference = stage.origin


# Reading and writing


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe at a path, or the packaged one of that name; raises UsageError with all mistakes, one a line."""
    path, data = find(path)
    try:
        document = strict_yaml.parse(data)
    except strict_yaml.Unreadable as error:
        raise UsageError(mistakes.report([error.args[0]], {}, str(path))) from None
    apply(document, overrides, set(Recipe.model_fields))
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        document.mistakes += mistakes.of_shape(error, document, Recipe)
    document.mistakes += references.wrong(document.value)
    if document.mistakes:
        raise UsageError(mistakes.report(document.mistakes, document, str(path)))
    return _with_data(recipe)


def _with_data(recipe: Recipe) -> Recipe:
    """An evaluation without a corpus takes that of the first training stage."""
    first = next((stage.train.corpus for stage in recipe.stages if stage.train), None)
    return recipe.model_copy(update={"stages": tuple(_filled(stage, first) for stage in recipe.stages)})


def _filled(stage: Stage, data: str | None) -> Stage:
    if stage.evaluate is None or stage.evaluate.data is not None:
        return stage
    return stage.model_copy(update={"evaluate": stage.evaluate.model_copy(update={"data": data})})


def dump(recipe: Recipe) -> str:
    """YAML with every default written out; `load` reads it back to an equal recipe."""
    return strict_yaml.dump(recipe.model_dump(mode="json", by_alias=True))


def find(name: str | Path) -> tuple[Path, bytes]:
    """The file and its bytes."""
    path = Path(name)
    if not path.is_file() and path.name == str(name) and str(name) in packaged():
        return Path(f"{name}.yaml"), packaged()[str(name)].read_bytes()
    if not path.is_file():
        known = f"; packaged recipes are {', '.join(packaged())}{did_you_mean(path.stem, packaged())}"
        what = "is not a file" if path.exists() else "no such file"
        raise UsageError(f"{name}: {what}{known}")
    with open(path, "rb") as file:
        return path, file.read(strict_yaml.LARGEST + 1)


def packaged() -> dict[str, Any]:
    """The recipes that come with the package, by name."""
    files = resources.files("recipes").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=str) if file.name.endswith(".yaml")}


def schema() -> dict:
    """JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(by_alias=True)}
