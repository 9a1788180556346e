"""What scores a query and a passage, opened by the name that a recipe has for it. The one way to do so.

A name stands for the directory of a ranker (a stage's, or one with `ranker.json`), for a published cross-encoder (a
`...ForSequenceClassification` of one label), or for an encoder that needs no head, with `ranker:` beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from distill import layout, loading, models, sources, world
from distill.corpus import tokens
from distill.ranking import encoding, kinds, rankers
from distill.ranking.forms import too_long
from distill.ranking.joining import fitted
from distill.ranking.kinds import ABOUT, ClassifierKind, CrossKind, DualKind, RankerKind
from distill.ranking.ranker import Ranker
from growth import files
from growth.checkpoint import open as open_checkpoint
from growth.errors import UserError

TEXTS, PAIRS = 256, 256  # read at once
Pair = tuple[str, str]  # a query and a passage


@dataclass(frozen=True)
class Form:
    """What a directory is as a ranker, before a weight is read."""

    path: Path
    kind: RankerKind

    @property
    def encoder(self) -> Path:
        """A directory of transformers, with the tokenizer."""
        return sources.encoder(self.path)

    @cached_property
    def digest(self) -> str:
        """Of the weights, and of all that says how they compute."""
        return files.digest([sources.identity(self.path), kinds.written(self.kind)])


@dataclass(frozen=True, eq=False)
class Opened:
    """A ranker in eval mode, without gradients, on this rank's device; what it reads with; who it is."""

    ranker: Ranker
    tokenizer: object
    model_digest: str  # that of its form

    @cached_property
    def tokenizer_digest(self) -> str:
        return tokens.digest(self.tokenizer)

    @property
    def about(self) -> dict:
        """As the producer of scores that are kept."""
        return {
            "model_digest": self.model_digest,
            "tokenizer_digest": self.tokenizer_digest,
            "lengths": list(self.ranker.kind.lengths),
            "dtype": str(self.ranker.encoder.dtype).removeprefix("torch."),
            "activation": "none",
        }

    def queries(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{input_ids, segment_ids} [N, T] on its device, cut at its length."""
        return self._read(texts, self.ranker.kind.query_length)

    def passages(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self._read(texts, self.ranker.kind.passage_length)

    def _read(self, texts: Sequence[str], length: int) -> dict[str, Tensor]:
        batch = layout.padded(token_ids(self.tokenizer, texts, length))
        return {name: x.to(self.ranker.encoder.device) for name, x in batch.items()}

    def query_vectors(self, texts: Sequence[str]) -> Tensor:
        """Of a ranker that makes one of each text, [N, k] float32 on the CPU: scores are their dot products."""
        return self._vectors(texts, self.queries)

    def passage_vectors(self, texts: Sequence[str]) -> Tensor:
        return self._vectors(texts, self.passages)

    @torch.inference_mode()
    def _vectors(self, texts: Sequence[str], read: Callable[[Sequence[str]], dict[str, Tensor]]) -> Tensor:
        parts = (texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS))
        return torch.cat([self.ranker.vectors(encoding.texts(read(part))).float().cpu() for part in parts])

    @torch.inference_mode()
    def scores(self, pairs: Sequence[Pair]) -> Tensor:
        """[P] float32 on the CPU; every text of `PAIRS` pairs is encoded once. What else is scored changes nothing."""
        found = [self._of_some(pairs[start : start + PAIRS]) for start in range(0, len(pairs), PAIRS)]
        return torch.cat(found).float().cpu() if found else torch.zeros(0)

    def _of_some(self, pairs: Sequence[Pair]) -> Tensor:
        return self.ranker(*self.read(pairs))

    def read(self, pairs: Sequence[Pair]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """What the ranker takes: queries and passages, each text once, and the rows of pairs [P, 2]."""
        sides = [{text: i for i, text in enumerate(dict.fromkeys(side))} for side in zip(*pairs, strict=True)]
        rows = torch.tensor([[sides[0][q], sides[1][p]] for q, p in pairs], device=self.ranker.encoder.device)
        return self.queries(list(sides[0])), self.passages(list(sides[1])), rows


def token_ids(tokenizer, texts: Sequence[str], length: int) -> list[list[int]]:
    """Ids with special tokens, at most so many; a `[SEP]` that stands in a text is text."""
    return tokenizer(
        list(texts),
        truncation=True,
        max_length=length,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def opened(context, reference: str) -> Opened:
    """A model or stage of a run by its name, in the precision that it computes in."""
    return open_at(form_of(context, reference), getattr(torch, context.dtype(reference)))


def open_at(found: Form, dtype: torch.dtype = torch.float32) -> Opened:
    ranker = models.freeze(loaded(found, dtype)).to(world.device())
    return Opened(ranker, tokens.load(found.encoder), found.digest)


def form_of(context, reference: str) -> Form:
    """What a model or stage of a run is as a ranker, before a weight is read."""
    spec = context.recipe.models.get(reference)
    return form(context.model(reference), spec.ranker.kind if spec and spec.ranker else None, reference)


def loaded(found: Form, dtype: torch.dtype = torch.float32) -> Ranker:
    if sources.scores_pairs(found.path):
        return rankers.load(found.path, dtype)
    head = "classify" if isinstance(found.kind, ClassifierKind) else None
    return rankers.build(found.kind, loading.load(found.path, head, dtype))


def form(path: Path, given: RankerKind | None = None, name: str | None = None) -> Form:
    """What a directory is as a ranker, or why it is none. `given`: its `ranker:`."""
    path, name = Path(path), name or str(path)
    kind = _kind(path, given, name)
    found = Form(path, kind)
    if wrong := too_long(kind, loading.configuration(found.encoder)):
        raise UserError(f"{name}: {wrong}")
    return found


def _kind(path: Path, given: RankerKind | None, name: str) -> RankerKind:
    if sources.scores_pairs(path):
        if given:
            raise UserError(f"{name}: {path / ABOUT} says how it scores; leave `ranker` out")
        return kinds.read(files.read_json(path / ABOUT), path / ABOUT)
    config = loading.configuration(path)
    if loading.own_head(config) == "classify":
        kind = _of_classifier(path, config, given, name)
    elif isinstance(given, DualKind) and not given.dims:
        kind = given
    elif given:
        raise UserError(_untrained(name, given))
    else:
        raise UserError(
            f"{name} is an encoder that does not say how it scores; set `ranker` of the model, such as "
            "{dual_encoder: {pooling: mean, similarity: cosine}}"
        )
    return fitted(kind, tokens.load(path))


def _of_classifier(path: Path, config, given: RankerKind | None, name: str) -> ClassifierKind:
    if config.num_labels != 1:
        raise UserError(
            f"{name}: its head tells {config.num_labels} classes apart; what scores pairs has a head of one label"
        )
    if given and not isinstance(given, CrossKind):
        raise UserError(f"{name} has a head that scores pairs, so it is a cross_encoder and nothing else")
    build, there = loading.class_of(config, "classify"), open_checkpoint(path)
    wanted = loading.skeleton(build, config, {})
    own = {n for n in wanted.state_dict() if loading.inside(n, wanted) == n}  # outside its base model
    if lacking := sorted(own - there.keys()):
        raise UserError(f"{path} lacks {', '.join(lacking)}, of the head that its config.json says it has")
    lengths = given and {"query_length": given.query_length, "passage_length": given.passage_length}
    return ClassifierKind(**lengths or {})


def _untrained(name: str, given: RankerKind) -> str:
    kind = kinds.written(given)["kind"] + (" with dims" if isinstance(given, DualKind) else "")
    return (
        f"{name} is an encoder, and a {kind} scores with a layer of its own, which it lacks: train one "
        f"(`student: {{from: {name}, ranker: ...}}`) and name that stage"
    )
