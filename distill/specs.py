"""What a run is given: the engine, models and text. Frozen values whose fields are the keys of a recipe. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from distill import mistakes
from distill.choice import one_of
from distill.ranking.kinds import FOUND, KINDS, RankerKind
from distill.schedules import Several, Value

Name = Annotated[str, Field(pattern=mistakes.NAME)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
BM25 = "bm25"  # what finds documents without a model
DOCSTRINGS = "docstrings"  # the collection that is always at hand


DECIDED = {  # keys of DeepSpeed's that are ours to fill in, and what says how
    "train_batch_size": "optim.batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "optim.batch and engine.micro_batch",
    "gradient_clipping": "optim.clip",
    "zero_optimization.stage": "engine.zero",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
}


class EngineSpec(Value):
    """How DeepSpeed runs it; nothing here changes what is computed beyond rounding."""

    zero: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage: what is sharded over ranks")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward and backward pass")
    micro_batch: Positive | None = Field(None, description="rows of one forward pass on one rank; null: all of a step")
    checkpointing: bool = Field(
        False, description="activation checkpointing of the student: less memory for one more of its forward passes"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = Field(
        None, description="how student and teachers attend, flash with padded rows; null: as transformers chooses"
    )
    timeout: Annotated[float, Field(ge=5)] | None = Field(
        45, description="seconds that others wait for a rank that hangs, on one machine; null: as long as it takes"
    )
    deepspeed: dict[str, Any] = Field({}, description="passed through to DeepSpeed's configuration")

    @field_validator("deepspeed")
    @classmethod
    def _check_undecided(cls, block: dict[str, Any]) -> dict[str, Any]:
        for key, ours in DECIDED.items():
            outer, _, inner = key.partition(".")
            if outer in block and (not inner or not isinstance(block[outer], dict) or inner in block[outer]):
                raise ValueError(f"{key} is what {ours} says")
        return block

    @property
    def dtype(self) -> str:
        """Of forward passes, as torch calls it."""
        return {"fp32": "float32", "bf16": "bfloat16"}[self.precision]


class RankerSpec(one_of("Kind", KINDS)):
    """How an encoder scores a query and a passage."""

    @property
    def kind(self) -> RankerKind:
        return self.named()[1]

    @model_validator(mode="after")
    def _check_found(self) -> RankerSpec:
        name, kind = self.named()
        found = next((key for key in FOUND if key in type(kind).model_fields and getattr(kind, key) !=
                      type(kind).model_fields[key].default), None)  # fmt: skip
        if found:
            raise ValueError(f"{name}.{found}: leave it out, it is found from the tokenizer")
        return self


class ModelSpec(Value):
    """Where weights come from: the first source at hand."""

    from_: Annotated[Several[str], Field(min_length=1)] = Field(
        alias="from", description="hub id, path or package:NAME/SUBPATH, or a list of them"
    )
    revision: str | None = Field(None, description="of a hub repository: branch, tag or commit")
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="to load in; null: as the run asks")
    sha256: Annotated[str, Field(pattern=mistakes.SHA256)] | None = Field(None, description="of the weights")
    ranker: RankerSpec | None = Field(
        None, description="how a plain encoder scores pairs; null for one that says so itself, or that never does"
    )

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


class PartSpec(Value):
    """One of several sources."""

    source: str = Field(description="stdlib, stdlib-code, synthetic, noise, a path or a Hugging Face data set id")
    limit: Positive | None = Field(None, description="read only this many documents")

    @model_validator(mode="before")
    @classmethod
    def _read_short(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, str) else given


class CorpusSpec(Value):
    """Text, and how it becomes rows of token ids."""

    source: str | Annotated[dict[Name, PartSpec], Field(min_length=1)] = Field(
        description="stdlib, stdlib-code, synthetic, noise, a path or a Hugging Face data set id; or {part: source}, "
        "several of them, which share no row"
    )
    tokenizer: str | NewTokenizer = Field(description="a model of the recipe, or {train: {vocab: ..., kind: ...}}")
    length: Annotated[int, Field(ge=8)] = Field(128, description="tokens in a row")
    heldout: Share = Field(0.05, description="share of the documents that training never sees")
    field: str = Field("text", description="the column that holds the text")
    split: str = Field("train", description="of a Hugging Face data set")
    revision: str | None = Field(None, description="of a Hugging Face data set")
    packed: bool = Field(True, description="several whole documents in a row")
    limit: Positive | None = Field(None, description="read only this many documents")
    parts: Annotated[Several[str], Field(min_length=1)] | None = Field(
        None, description="read only these parts of the source"
    )
    label: str | None = Field(None, description="what says a document's class: `part`, or a column; packed: false")

    @model_validator(mode="after")
    def _check_label(self) -> CorpusSpec:
        if self.label and self.packed:
            raise ValueError("label: a row has one class, so it takes one document; set packed: false")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else tuple(part.source for part in self.source.values())

    @model_validator(mode="after")
    def _check_limit(self) -> CorpusSpec:
        if self.limit and not isinstance(self.source, str):
            raise ValueError("limit: with several sources each has its own, `part: {source: ..., limit: ...}`")
        return self


class CollectionSpec(Value):
    """Queries, documents and what answers what: what rankers are trained and measured on."""

    source: str | None = Field(
        None, description="docstrings, or a directory in BEIR's layout; null: the texts of the triples"
    )
    split: str | None = Field(None, description="train or test of the docstrings, the judgements of BEIR's layout")
    ask: Literal["judged", "titles", "openings"] = Field(
        "judged", description="what asks: queries with judgements, each title for its text, or how a text begins"
    )
    triples: str | None = Field(
        None, description="a file of queries with a positive and negatives: ids of the source, or texts without one"
    )

    @model_validator(mode="after")
    def _check(self) -> CollectionSpec:
        if self.source is None and self.triples is None:
            raise ValueError("source or triples is needed: where the texts are")
        if self.ask != "judged":
            self._check_asked()
        if self.split and self.source is None:
            raise ValueError("split: texts of triples have no parts")
        if self.source == DOCSTRINGS and self.split not in (None, "train", "test"):
            raise ValueError("split: the docstrings have train and test")
        return self

    def _check_asked(self) -> None:
        if self.source in (None, DOCSTRINGS):
            raise ValueError(f"ask: {self.ask} are those of a directory in BEIR's layout")
        if self.split or self.triples:
            key = "split" if self.split else "triples"
            raise ValueError(f"{key}: with ask: {self.ask} the documents themselves ask, nobody else does")
