"""The kinds of stages: grow, train, data, evaluate. Frozen values whose fields are the keys of a recipe. No torch."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from distill.choice import OneOf, one_of
from distill.evaluate import METRICS, OF_RANKERS, ranks
from distill.hook import Hook
from distill.hooks import HOOKS
from distill.lowrank.spec import LowRankSpec
from distill.objectives import OBJECTIVES, RANKING
from distill.operators import BARE, OPERATORS, Operator
from distill.refine import OPS, DataOp
from distill.schedules import Pair, Schedule, Several, Value
from distill.sparsity.optimizers import mixing
from distill.specs import BM25, Name, Positive, RankerSpec, Share
from growth.errors import did_you_mean

# Models


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


Op = one_of("Op", OPERATORS)


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
    beside = ("lowrank", "ranker")

    new: NewSpec | None = Field(None, description="random weights: {config: ...} or {like: ...}")
    from_: str | None = Field(None, alias="from", description="a model or stage, as it is")
    cut: CutSpec | None = Field(None, description="some layers of a model or stage")
    grow: GrowthSpec | None = Field(None, description="a model or stage through operators of growth")
    lowrank: LowRankSpec | None = Field(None, description="its matrices as low rank plus sparse while it trains")
    ranker: RankerSpec | None = Field(
        None, description="how it scores a query and a passage; null for a language model, or for that of its origin"
    )

    @model_validator(mode="after")
    def _check_alpha(self) -> StudentSpec:
        if self.new and self.lowrank and self.lowrank.rank and not self.lowrank.alpha:
            raise ValueError("lowrank: 'alpha' is needed where factors start at random (SLTrain: 8 to 32)")
        return self

    @property
    def origin(self) -> str | None:
        """Whose weights it starts with; an architecture alone is no origin."""
        made = self.cut or self.grow
        return made.from_ if made else self.from_


class TargetSpec(OneOf):
    """Where teacher values come from: exactly one of from, ensemble, cache, ema."""

    beside = ("combine", "placement")

    from_: str | None = Field(None, alias="from", description="a model or stage, frozen")
    ensemble: Annotated[Several[str], Field(min_length=2)] | None = Field(
        None, description="several models or stages, whose distributions are combined"
    )
    cache: str | None = Field(None, description="a data stage that kept a teacher's values on disk")
    ema: Schedule | None = Field(None, description="the moving average of the student with this decay; ZeRO 0 to 2")
    combine: Literal["mean_prob", "mean_logprob"] | None = Field(
        None, description="of an ensemble: mean of probabilities (the default) or of log-probabilities"
    )
    placement: Literal["replicated", "zero3"] | None = Field(
        None, description="zero3: every rank keeps a share of its weights; replicated (the default): all of them"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        ensemble = isinstance(given, dict) and given.get("ensemble") is not None
        return {"combine": "mean_prob", **given} if ensemble else given

    @model_validator(mode="after")
    def _check_combine(self) -> TargetSpec:
        if self.combine and not self.ensemble:
            raise ValueError("combine: only an ensemble has several distributions")
        return self

    @model_validator(mode="after")
    def _check_ema(self) -> TargetSpec:
        decays = [decay for _, decay in self.ema.points] if self.ema else [0.0]
        if not 0 <= min(decays) <= max(decays) <= 1 or min(decays) == 1:
            raise ValueError("ema: a decay from 0, the student itself, to below 1, which would never move")
        return self

    @model_validator(mode="after")
    def _check_placement(self) -> TargetSpec:
        if self.placement and not self.models:
            raise ValueError("placement: of from and ensemble; other values have no weights of their own to place")
        return self

    @property
    def shared(self) -> bool:
        """Whether every rank keeps a share of the weights."""
        return self.placement == "zero3"

    @property
    def models(self) -> tuple[str, ...]:
        """Those that run beside the student."""
        return self.ensemble or ((self.from_,) if self.from_ else ())


class OptimSpec(Value):
    name: Literal["adamw"] = "adamw"
    batch: Positive = Field(description="rows of one step, over all ranks")
    betas: Pair[Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0: no clipping")

    @field_validator("name", mode="before")
    @classmethod
    def _tell_why_not(cls, name: Any) -> Any:
        if isinstance(name, str) and (why := mixing(name)):
            raise ValueError(f"{name!r} is not one of adamw, and masks could not be kept with it: {why}")
        return name


class StopSpec(OneOf):
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    tokens: Positive | None = None
    like: str | None = Field(
        None, description="a train stage: as much, in the recipe's `equal`, as it and those it was made from"
    )


Loss, HookSpec = one_of("Loss", OBJECTIVES), one_of("HookSpec", HOOKS)


NO_INPUT = {"save_every", "keep", "local"}  # how a stage is kept, not what it makes

# Stages


class Continued(Value):
    """Rows that an earlier stage has not seen."""

    from_: str = Field(alias="from", description="a corpus")
    after: str = Field(description="a train stage on that corpus: the stream goes on where it stopped")


def _climbs_down(lr: Schedule) -> Schedule:
    if (lowest := min(y for _, y in lr.points)) < 0:
        raise ValueError(f"a learning rate of {lowest:g} would climb the loss; 0 or more")
    return lr


class TrainSpec(Value):
    student: StudentSpec = Field(description="exactly one of new, from, cut, grow")
    data: str | Continued = Field(
        description="a corpus, of rankers a collection with triples or a data stage that makes groups; or {from: ..., "
        "after: stage}"
    )
    negatives: Positive = Field(1, description="of rankers: how many of a query, drawn anew in every epoch")
    targets: dict[Name, TargetSpec] = Field({}, description="teachers by the names that losses use")
    loss: Annotated[Several[Loss], Field(min_length=1)] = Field(description="objectives, added up")
    optim: OptimSpec
    lr: Annotated[Schedule, AfterValidator(_climbs_down)] = Field(description="learning rate")
    stop: StopSpec = Field(description="exactly one of steps, epochs, tokens, like")
    hooks: Several[HookSpec] = Field((), description="what changes during training")
    evaluate_every: Positive | None = Field(None, description="steps between held-out losses of `ce`; null: none")
    save_every: Positive = Field(100, description="steps between snapshots")
    keep: Positive = Field(1, description="snapshots to keep")
    local: bool = Field(
        False, description="snapshots a shard a rank: faster, and read under the same zero, ranks and precision alone"
    )
    dropout: bool = Field(False, description="train the student with the dropout of its config")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="added to the recipe's: another start, another data order")

    def objectives(self) -> list[tuple[str, Value]]:
        """(name, objective) in the order of the recipe."""
        return [loss.named() for loss in self.loss]

    def hook_values(self) -> list[Hook]:
        return [hook.named()[1] for hook in self.hooks]

    @property
    def corpus(self) -> str:
        """Its name."""
        return self.data if isinstance(self.data, str) else self.data.from_

    @property
    def ranks(self) -> bool:
        """Whether its student scores queries and passages."""
        return self.objectives()[0][0] in RANKING

    @model_validator(mode="after")
    def _check_ranking(self) -> TrainSpec:
        ranking = {name: name in RANKING for name, _ in self.objectives()}
        if len(set(ranking.values())) > 1:
            of, other = (next(name for name, is_ in ranking.items() if is_ == which) for which in (True, False))
            raise ValueError(f"loss: {of} is for rankers, {other} for language models; a student is one of them")
        if self.student.ranker and not self.ranks:
            wrong = f"{next(iter(ranking))} is for language models; rankers learn by {', '.join(RANKING)}"
            raise ValueError(f"student.ranker: {wrong}")
        if self.negatives > 1 and not self.ranks:
            raise ValueError("negatives: only rows of rankers have them")
        return self

    @model_validator(mode="after")
    def _check_perturbation(self) -> TrainSpec:
        lowrank = self.student.lowrank
        if "perturbation" in dict(self.objectives()) and (not lowrank or lowrank.density or self.student.new):
            raise ValueError("loss: perturbation needs a student made from a model, with lowrank of density 0")
        return self

    @model_validator(mode="after")
    def _check_hooks(self) -> TrainSpec:
        names = [hook.named()[0] for hook in self.hooks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"hooks: {twice} stands twice")
        if "refactor" in names and not self.student.lowrank:
            raise ValueError("hooks: refactor needs a student with lowrank, whose factors it balances")
        if "refactor" in names and any(target.ema for target in self.targets.values()):
            raise ValueError("hooks: refactor turns the factors, of which an ema target is the average")
        if self.evaluate_every and not any(name == "ce" for name, _ in self.objectives()):
            raise ValueError("evaluate_every is the held-out loss of `ce`, which is not among the losses")
        return self


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


DataOperation = one_of("DataOperation", OPS)


class DataSpec(Value):
    """A corpus through operations on its rows, or a collection through one on its pairs."""

    from_: str = Field(alias="from", description="a corpus or collection, or a data stage that makes one")
    ops: Annotated[Several[DataOperation], Field(min_length=1)] = Field(
        description="operations, one after the other: {name: {argument: value}}"
    )

    def operations(self) -> list[tuple[str, DataOp]]:
        """(name, operation) in the order of the recipe."""
        return [op.named() for op in self.ops]

    @property
    def corpus(self) -> str:
        return self.from_

    @property
    def makes(self) -> Literal["corpus", "scores", "groups"]:
        return self.operations()[-1][1].makes

    @property
    def reads(self) -> Literal["text", "pairs"]:
        return self.operations()[0][1].reads

    @model_validator(mode="after")
    def _check_alone(self) -> DataSpec:
        alone = next(((name, op.makes) for name, op in self.operations() if op.makes != "corpus"), None)
        if alone and len(self.ops) > 1:
            raise ValueError(f"{alone[0]} makes {alone[1]}, not a corpus: it stands alone in its stage")
        return self


_RANKING = f"measures of them are {', '.join(OF_RANKERS)}"


class EvaluateSpec(Value):
    rows: Annotated[dict[str, str], Field(min_length=1)] = Field(description="{label: model, stage or stage.start}")
    on: Annotated[Several[Metric | Chosen], Field(min_length=1)] = Field(
        description="what is measured: names, or {name: {field: value}}"
    )
    data: str | None = Field(
        None, description="a corpus (null: the one of the first train stage), or for rankers a collection"
    )
    teacher: str | None = Field(None, description="whom agreement is with; null: the row named teacher")
    depth: Positive | None = Field(
        None, description="of rankers: documents of a query that are ordered; null: 100, or 1000 where all are searched"
    )
    retrieve: bool = Field(False, description="rankers search all documents; false: they order the best of BM25")

    @property
    def corpus(self) -> str | None:
        return self.data

    @property
    def ranks(self) -> bool:
        """Whether its rows are rankers."""
        return ranks(self.on)

    @model_validator(mode="after")
    def _check_ranking(self) -> EvaluateSpec:
        names = [name for entry in self.on for name in ([entry] if isinstance(entry, str) else entry)]
        text = [name for name in names if name not in OF_RANKERS]
        if self.ranks and text:
            other = next(name for name in names if name in OF_RANKERS)
            raise ValueError(
                f"on: {other} is measured of rankers, {text[0]} of models of text; make two stages of them"
            )
        if self.ranks and self.data is None:
            raise ValueError("data: name the collection to measure on; one that rankers were trained on tells little")
        if not self.ranks and (self.depth or self.retrieve):
            raise ValueError(f"{'depth' if self.depth else 'retrieve'}: only rankers order documents; {_RANKING}")
        if not self.ranks and BM25 in self.rows.values():
            raise ValueError(f"rows: {BM25} is a search, and no model of text; {_RANKING}")
        return self


class Stage(OneOf):
    id: Name
    train: TrainSpec | None = None
    grow: GrowSpec | None = None
    data: DataSpec | None = None
    evaluate: EvaluateSpec | None = None

    @property
    def kind(self) -> Literal["train", "grow", "data", "evaluate"]:
        return self._given()[0]

    @property
    def fanned(self) -> bool:
        """Whether it is done once for every seed."""
        return self.kind != "evaluate"

    @property
    def makes(self) -> tuple[str, ...]:
        """The directories that it leaves."""
        made = {"train": ("start", "model"), "grow": ("model",), "evaluate": ()}
        return (self.data.makes,) if self.data else made[self.kind]

    @property
    def origin(self) -> str | None:
        """The model or stage whose weights this stage starts from."""
        return self.grow.from_ if self.grow else self.train.student.origin if self.train else None
