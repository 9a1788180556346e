"""Where the scores of a ranker's teacher come from: rankers that run beside it, or what was kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distill import world
from distill.corpus import tokens
from distill.objectives.crossing import Scores
from distill.objectives.protocol import Needs
from distill.ranking.batches import Lists
from distill.ranking.opening import form_of, opened
from distill.ranking.ranker import Ranker
from distill.ranking.stores import BLOCK, KIND, SCORE
from distill.scores import Reader, pair_keys
from distill.taps import Trace
from distill.teachers.targets import Average, Source, traced
from growth import console
from growth.errors import UserError

RUN = "run the teacher beside the student with {from: ...}"


class Online(Source):
    """Frozen rankers, each with the ids of its own tokenizer; of several, the mean of their scores."""

    def __init__(self, members: Sequence[tuple[str, Ranker]]):
        self.members, self.models = tuple(members), tuple(ranker for _, ranker in members)

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        self.calls += len(self.members)
        found = [traced(ranker, {**batch, **batch["own"].get(name, {})}, needs, "target").scores
                 for name, ranker in self.members]  # fmt: skip
        listed = torch.stack([one.listed for one in found]).mean(0)
        crossed = {n: torch.stack([one.crossed[n] for one in found]).mean(0) for n in found[0].crossed}
        return Trace({}, {}, causal=False, scores=Scores(listed, crossed))


class Kept(Source):
    """Scores by the content of pairs: no model runs."""

    def __init__(self, reader: Reader, device: torch.device):
        self.reader, self.device = reader, device

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        if any(need.group for need in needs):
            raise UserError(f"{self.reader.path} has the scores of lists, not of what meets in a batch; {RUN}")
        return Trace({}, {}, causal=False, scores=Scores(self._of(batch["keys"]), {}))

    def _of(self, keys: Tensor) -> Tensor:
        return self.reader.tensors(keys.cpu().numpy(), [SCORE])[SCORE].to(self.device)


def source(name: str, subject) -> Source:
    """Of a target of a training stage, by what its recipe says."""
    spec, context = subject.spec.targets[name], subject.context
    if spec.cache:
        return _kept(name, spec.cache, subject)
    if spec.ema:
        return Average(subject.student, spec.ema, getattr(torch, context.recipe.engine.dtype))
    return Online([(reference, opened(context, reference).ranker) for reference in spec.models])


def _kept(name: str, stage: str, subject) -> Kept:
    path = subject.context.scores(stage)
    world.first(lambda: _judge(Reader(path), f"targets.{name}.cache", stage, subject))  # reads every byte, once
    return Kept(Reader(path, verify=False), world.device())


def _judge(reader: Reader, where: str, stage: str, subject) -> None:
    if reader.about.kind != KIND or SCORE not in reader.about.columns:
        raise UserError(f"{where}: {reader.path} holds {reader.about.kind}, not scores of queries and passages")
    if wrong := [f"its {what} is {there}, the run's {here}" for what, there, here in _identities(reader, stage, subject)
                 if there != here]:  # fmt: skip
        raise UserError(f"{where}: {reader.path} holds other scores: {'; '.join(wrong)}; score again")
    insist_on_all(reader, subject.corpus, f"{where}: {stage}")


def _identities(reader: Reader, stage: str, subject) -> Iterator[tuple[str, str, str]]:
    """(what, in the store, in the run) of each teacher; of imported scores nobody knows whose they are."""
    ((_, op),) = subject.context.recipe.stage(stage).data.operations()
    for reference, there in zip(op.readers, reader.about.producers, strict=False):
        form = form_of(subject.context, reference)
        yield f"teacher {reference}", there["model_digest"][:12], form.digest[:12]
        yield f"tokenizer of {reference}", there["tokenizer_digest"][:12], tokens.digest(tokens.load(form.encoder))[:12]
        yield f"lengths of {reference}", str(list(there["lengths"])), str(list(form.kind.lengths))


def insist_on_all(reader: Reader, lists: Lists, where: str) -> None:
    """A pair without a score is said now, not when its row comes."""
    codes, collection = lists.groups.codes()[0], lists.collection
    missing = 0
    with console.bar(len(codes), "looking up scores") as advance:
        for block in np.split(codes, range(BLOCK, len(codes), BLOCK)):
            keys = pair_keys(collection.pair(*pair) for pair in lists.groups.named(block))
            missing += int(reader.missing(keys).sum())
            advance(len(block))
    if missing:
        raise UserError(
            f"{where} lacks the scores of {missing} of {len(codes)} pairs; score the very groups that are trained on "
            "(a data stage {score_pairs: ...} from the same name)"
        )
