"""Operators of growth as pieces of a recipe: frozen values whose fields are the keys of the growth functions. No torch.

One more operator is one class and one line in `OPERATORS`. Applied to a checkpoint directory it writes another one;
applied to a model on the meta device it gives what that would be, from which a run is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, create_model, model_validator

import growth
from distill.schedules import Several, Value
from growth import depth, width
from growth.anatomy import dissect
from growth.errors import UserError
from growth.learn import LEARNED, RATE, STEPS
from growth.ligo import STARTS
from growth.merge import HOW as WAYS_TO_MERGE
from growth.operate import PLAIN, seen
from growth.reading import kind_of
from growth.sizes import Sizes
from growth.sparsity import HOW as WHICH_STAY
from growth.sparsity import RESCALE, SCOPE
from growth.vocabulary import HOW as NEW_ROWS

Positive = Annotated[int, Field(gt=0)]
Chosen = Positive | Annotated[Several[int], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0)] | None
SIZES = {size.name: size.metadata["help"] for size in fields(Sizes)}
AFRESH = "of what is drawn; null: that of the run"


@dataclass(frozen=True)
class Given:
    """What an operator may ask for beside its source."""

    seed: int  # of the run
    model: Callable[[str], Any]  # what a reference means: a directory, or a model on the meta device
    corpus: Callable[[], Path] | None = None  # the directory of the prepared text, where the recipe names one


class Operator(Value):
    """A function of `growth` with its arguments."""

    function: ClassVar[Callable]
    reads_text: ClassVar[bool] = False  # whether it needs a corpus

    def apply(self, src: Any, dst: Path | None, given: Given, output: growth.Output = PLAIN) -> Any:
        """From directory to directory; of a model in memory (`dst` is None) another model."""
        return type(self).function(src, dst, **self.arguments(given), output=output)

    def plan(self, model: Any, given: Given) -> Any:
        """The same of a model without storage; an operator that reads values says here what comes of it."""
        return self.apply(model, None, given)

    def arguments(self, given: Given) -> dict[str, Any]:
        """Under the function's own names."""
        asked = {name: getattr(self, name) for name in type(self).model_fields}
        return {**asked, "seed": given.seed} if asked.get("seed", 0) is None else asked


def _some_of(*names: str, once: bool = False) -> Any:
    """A check that one of the optional keys is given, or exactly one."""

    def check(self):
        given = [name for name in names if getattr(self, name) is not None]
        if not given or (once and len(given) > 1):
            found = " and ".join(given) or "none"
            raise ValueError(f"{'exactly' if once else 'at least'} one of {', '.join(names)} is needed, found {found}")
        return self

    return model_validator(mode="after")(check)


def _sizes(*names: str) -> dict[str, Any]:
    """Optional keys, as `growth` describes them."""
    return {name: (Positive | None, Field(None, description=SIZES[name])) for name in names}


class Stack(Operator):
    """The whole depth, repeated."""

    function = staticmethod(growth.stack)
    factor: Positive = Field(2, description="how many times as deep")
    order: str | Several[int] = Field("stack", description="stack, interleave, or layers such as 0-23,8-31")
    how: Literal[depth.HOW] = Field("copy", description="what new layers hold")


class Insert(Operator):
    """Blocks that start as the identity."""

    function = staticmethod(growth.insert)
    layers: Positive | None = Field(None, description="how many blocks, evenly spread")
    after: Several[int] | None = Field(None, description="behind these layers instead")
    approximate: bool = Field(False, description="where norms stand behind residual sums, come near the identity")
    check = _some_of("layers", "after", once=True)


class _Widen(Operator):
    function = staticmethod(growth.widen)
    how: Literal[width.HOW] = Field("exact", description="what new channels hold")
    noise: Annotated[float, Field(ge=0)] = Field(0.01, description="between copies; the function does not see it")
    seed: Seed = Field(None, description=AFRESH)
    check = _some_of(*SIZES)


Widen = create_model(
    "Widen",
    __base__=_Widen,
    __doc__="More channels, heads, neurons or rows of the embeddings.",
    **_sizes(*SIZES),
)


class Cut(Operator):
    """A part of the model: a number keeps so many of a thing, a list names them."""

    function = staticmethod(growth.cut)
    layers: Chosen | None = Field(None, description="evenly spaced with the last one, or which")
    hidden: Chosen | None = Field(None, description="channels of the residual stream")
    heads: Chosen | None = Field(None, description="query heads")
    kv_heads: Chosen | None = Field(None, description="key-value heads")
    ffn: Chosen | None = Field(None, description="neurons of the feed-forward part")
    vocab: Chosen | None = Field(None, description="tokens, the first ones")
    check = _some_of("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")


class Upcycle(Operator):
    """A mixture of experts that computes the same."""

    function = staticmethod(growth.upcycle)
    experts: Positive = Field(8, description="copies of the feed-forward part")
    top: Positive = Field(2, description="experts for every token")
    noise: Annotated[float, Field(ge=0)] = Field(0.0, description="between experts; the function sees it")
    seed: Seed = Field(None, description=AFRESH)


class Vocabulary(Operator):
    """New tokens behind the old ones."""

    function = staticmethod(growth.vocabulary)
    size: Positive = Field(description="tokens")
    how: Literal[NEW_ROWS] = Field("mean", description="what the rows of new tokens hold")
    seed: Seed = Field(None, description=AFRESH)


class Merge(Operator):
    """One model of this one and others of the same shape."""

    with_: Annotated[Several[str], Field(min_length=1)] | None = Field(None, alias="with", description="the others")
    how: Literal[WAYS_TO_MERGE] = Field("linear", description="what is done with them")
    weights: Several[float] | None = Field(None, description="one for each, this one first; null: equal ones")
    base: str | None = Field(None, description="what all were trained from, for task vectors")
    lines: float | None = Field(None, description="factor of task vectors in the first layer, rising to 1 in the last")
    check = _some_of("with_", "base")

    def apply(self, src: Any, dst: Path | None, given: Given, output: growth.Output = PLAIN) -> Any:
        sources = [src, *map(given.model, self.with_ or ())]
        base = None if self.base is None else given.model(self.base)
        asked = dict(how=self.how, weights=self.weights, base=base, lines=self.lines)
        return growth.merge(sources, dst, **asked, output=output)


class _Learn(Operator):
    factor: Positive = Field(1, description="how many times as deep")
    order: str | Several[int] = Field("stack", description="stack, interleave, or layers: what the maps start from")
    start: Literal[STARTS] = Field("copies", description="of maps of width; random: as LiGO was published")
    steps: Positive = Field(STEPS, description="in which the maps are trained")
    lr: Annotated[float, Field(gt=0)] = Field(RATE, description="of the maps")
    batch: Positive = Field(16, description="rows of a step")
    seed: Seed = Field(None, description=AFRESH)

    reads_text: ClassVar[bool] = True

    @property
    def _width(self) -> dict[str, int]:
        return {name: size for name in LEARNED if (size := getattr(self, name)) is not None}

    @property
    def _depth(self) -> dict[str, Any]:
        asked = {"factor": self.factor, "order": self.order}
        return {} if asked == {"factor": 1, "order": "stack"} else asked

    @model_validator(mode="after")
    def _check_some(self) -> Operator:
        if not self._width and not self._depth:
            raise ValueError(f"at least one of factor, order, {', '.join(LEARNED)} is needed, found none")
        return self

    def apply(self, src: Any, dst: Path | None, given: Given, output: growth.Output = PLAIN) -> Any:
        asked = self.arguments(given)
        batches = _labelled(src, given.corpus(), asked.pop("batch"), asked["seed"])
        return growth.learn(src, dst, batches=batches, **asked, output=output)

    def plan(self, model: Any, given: Given) -> Any:
        """The shape that the maps start from."""
        _objective(model)
        new: dict[str, Any] = {}
        if self._depth:
            model = growth.stack(model, **self._depth)
            new |= model.growth["new"]
        if self._width:
            model = growth.widen(model, **self._width, how="fpi", seed=self.arguments(given)["seed"])
            new |= model.growth["new"]
        model.growth = {**model.growth, "operator": "learn", "new": new, "preserves": "no"}
        return model


def _objective(src: Any) -> Literal["mlm", "causal"]:
    """What its head predicts."""
    objective = {"next": "causal", "masked": "mlm"}.get(kind_of(dissect(seen(src))))
    if objective is None:
        raise UserError("its source predicts neither next nor masked tokens, so it cannot learn from plain text")
    return objective


def _labelled(src: Any, prepared: Path, rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Batches as a model of transformers takes them, a document in a row."""
    from distill import corpus

    stream = corpus.Batches(corpus.open(prepared, "train"), seed, _objective(src))
    for step in count():
        batch = corpus.unpack(stream.at(range(step * rows, (step + 1) * rows)))
        real = (batch["segment_ids"] > 0).long()
        yield {"input_ids": batch["input_ids"], "attention_mask": real, "labels": batch["labels"]}


Learn = create_model(
    "Learn",
    __base__=_Learn,
    __doc__="More depth and width through maps that are trained on text (LiGO).",
    **_sizes(*LEARNED),
)


class Sparsify(Operator):
    """Most weights of the matrices zero, with masks that say which."""

    function = staticmethod(growth.sparsify)
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="share of each matrix that is zero; null: 0.75, or what the pattern says"
    )
    how: Literal[WHICH_STAY] = Field("random", description="which weights stay")
    scope: Annotated[Several[Literal[SCOPE]], Field(min_length=1)] = Field(
        SCOPE, description="parts whose matrices are sparse"
    )
    pattern: str | None = Field(None, description="such as 2:4, two of every four along what is summed over")
    rescale: Literal[RESCALE] = Field("none", description="sqrt_density keeps the scale of outputs")
    seed: Seed = Field(None, description=AFRESH)


class Densify(Operator):
    """The same weights without masks."""

    function = staticmethod(growth.densify)


OPERATORS: dict[str, type[Operator]] = {
    "stack": Stack,
    "insert": Insert,
    "widen": Widen,
    "cut": Cut,
    "upcycle": Upcycle,
    "merge": Merge,
    "vocabulary": Vocabulary,
    "learn": Learn,
    "sparsify": Sparsify,
    "densify": Densify,
}


def _stands_alone(kind: type[Operator]) -> bool:
    try:
        return bool(kind())
    except ValidationError:
        return False


BARE = tuple(name for name, kind in OPERATORS.items() if _stands_alone(kind))  # a name says all
