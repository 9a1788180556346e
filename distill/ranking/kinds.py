"""What a ranker is, as a frozen value: the content of ranker.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from distill.schedules import Several, Value
from growth.errors import UserError, did_you_mean

VERSION = 1
ENCODER, HEAD, ABOUT = "encoder", "head.safetensors", "ranker.json"  # of a ranker's directory
Count = Annotated[int, Field(ge=1)]
Similarity = Literal["dot", "cosine"]


class Join(Value):
    """How a query and a passage become one text: tokens between them, tokens of the passage left out, two types."""

    between: Several[int] = ()
    skip: Annotated[int, Field(ge=0)] = 1  # of a passage: the [CLS] that it has where it stands alone
    typed: bool = False  # the passage has token type 1


class _Lengths(Value):
    """Tokens of a text, special ones counted, at which tokenisers cut."""

    query_length: Count = 30
    passage_length: Count = 200

    @property
    def lengths(self) -> tuple[int, int]:
        return self.query_length, self.passage_length

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the encoder is shown."""
        return max(self.lengths)


class _Joined(_Lengths):
    join: Join = Join()

    @property
    def longest(self) -> int:
        return self.query_length + len(self.join.between) + self.passage_length - self.join.skip


class CrossKind(_Joined):
    """BERT_CAT: a linear score of query and passage read as one text."""


class ClassifierKind(_Joined):
    """A cross-encoder as most are published: the classification head of transformers, of one label."""


class DualKind(_Lengths):
    """BERT_DOT: one vector for each text; `dims` of them after a linear layer, if given."""

    pooling: Literal["cls", "mean", "last"] = "cls"
    similarity: Similarity = "dot"
    dims: Count | None = None


class ColBERTKind(_Lengths):
    """One vector for each token, of `dims` (as many as the encoder has, if not given).

    `masks`: so many [MASK] (`mask_token`) stand before the last token of every query, for vectors that no word has.
    """

    similarity: Similarity = "dot"
    dims: Count | None = None
    masks: Annotated[int, Field(ge=0)] = 0
    mask_token: int | None = None

    @property
    def longest(self) -> int:
        return max(self.query_length + self.masks, self.passage_length)


class PreTTKind(_Lengths):
    """The first `apart` layers read query and passage apart, the others read them as one text."""

    apart: Count = 3

    @property
    def longest(self) -> int:
        return self.query_length + self.passage_length


class TKKind(_Lengths):
    """Kernels over the cosines of contextualised words."""

    centres: Several[float] = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)
    width: Annotated[float, Field(gt=0)] = 0.1


RankerKind = CrossKind | ClassifierKind | DualKind | ColBERTKind | PreTTKind | TKKind
KINDS: dict[str, type[RankerKind]] = {
    "cross_encoder": CrossKind,
    "dual_encoder": DualKind,
    "colbert": ColBERTKind,
    "prett": PreTTKind,
    "tk": TKKind,
}
KNOWN = KINDS | {"classifier": ClassifierKind}  # which nothing but a checkpoint with such a head can be
FOUND = ("join", "mask_token")  # from a tokenizer, never said by a recipe


def written(kind: RankerKind) -> dict[str, Any]:
    """As ranker.json has it."""
    name = next(name for name, known in KNOWN.items() if type(kind) is known)
    return {"version": VERSION, "kind": name, **kind.model_dump(mode="json")}


def read(content: Any, where: Path | str) -> RankerKind:
    """From ranker.json."""
    if not isinstance(content, Mapping) or content.get("version") != VERSION:
        raise UserError(f"{where}: a ranker of version {VERSION} is expected")
    name = content.get("kind")
    if name not in KNOWN:
        raise UserError(f"{where}: no kind {name!r}{did_you_mean(str(name), KNOWN)}; there are {', '.join(KNOWN)}")
    fields = {key: value for key, value in content.items() if key not in ("version", "kind")}
    try:
        return KNOWN[name].model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
