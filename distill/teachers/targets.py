"""Where teacher values come from, one class a choice of a recipe's `targets`; objectives never know which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from distill import loading, models, views, world
from distill.engine import Shared
from distill.heads import Mixture
from distill.objectives import scored
from distill.objectives.protocol import Needs, Objective, View
from distill.ranking.scoring import scored_pairs
from distill.schedules import Progress, Schedule
from distill.taps import Trace, trace
from distill.teachers import cached
from distill.teachers.alignment import Alignment
from distill.teachers.frozen import alignment, frozen, insist_on_pieces
from distill.teachers.retelling import own_rows


class Source(Protocol):
    """What answers for a target."""

    calls: int = 0  # forward passes done, on this rank
    models: tuple[nn.Module, ...] = ()  # what reads rows here: it decides whether documents may share one
    alignment: Alignment | None = None  # with the student's tokeniser, where rows are read in ids of its own

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        """What objectives want of these rows; no gradients are recorded."""


class Reading(nn.Module):
    """A frozen model as one module: what it hands over is made within one forward pass, whatever is called inside.

    `layers`: of the whole model, where only its first ones are loaded.
    """

    def __init__(self, model: nn.Module, layers: int | None = None):
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, batch: dict, needs: list[Needs]) -> Trace:
        found = traced(self.model, batch, needs, "target", self.layers)
        return replace(found, head=found.head.frozen()) if found.head else found


Read = Callable[[dict, list[Needs]], Trace]  # a Reading, or the engine around one


class Online(Source):
    """A frozen model; `vocabulary`: rows of its head that stand for pieces, those behind are padding."""

    def __init__(
        self,
        model: nn.Module,
        vocabulary: int | None = None,
        alignment: Alignment | None = None,
        read: Read | None = None,
    ):
        self.models, self.vocabulary, self.alignment = (model,), vocabulary, alignment
        self.read = read or Reading(model)

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        self.calls += 1
        return _trimmed(self.read(batch, needs), self.vocabulary)


class Ensemble(Source):
    """Several frozen models as one distribution; there is no one model to be tapped."""

    def __init__(
        self, models: Iterable[nn.Module], combine: str, vocabulary: int | None = None, readers: Sequence[Read] = ()
    ):
        self.models, self.combine, self.vocabulary = tuple(models), combine, vocabulary
        self.readers = readers or [Reading(model) for model in self.models]

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        self.calls += len(self.models)
        traces = [read(batch, needs) for read in self.readers]
        mixture = Mixture(tuple(one.head for one in traces), self.combine)
        return _trimmed(replace(traces[0], head=mixture), self.vocabulary)


class Average(Source):
    """A moving average of the student, as which it begins (Tarvainen & Valpola 2017, arXiv 1703.01780).

    It is kept in float32, of the engine's full-precision weights, whole on every rank; it runs in the precision of the
    run, as the student does.
    """

    def __init__(self, student: nn.Module, decay: Schedule, dtype: torch.dtype, vocabulary: int | None = None):
        model = models.freeze(copy.deepcopy(student)).to(world.device())
        self.decay, self.vocabulary, self.trained = decay, vocabulary, []
        self.averages = {name: p.detach() for name, p in model.named_parameters()}
        for p in model.parameters():  # alone: frequencies of rotary positions stay in float32, as in the student
            p.data = p.data.to(dtype)
        self.models = (model,)

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        self.calls += 1
        return _trimmed(traced(self.models[0], batch, needs, "target"), self.vocabulary)

    @torch.no_grad()
    def moved(self, engine, progress: Progress) -> None:
        """The student has made a step; collective."""
        decay, running = self.decay.at(progress), dict(self.models[0].named_parameters())
        names = [name for name in engine.names if name.startswith("student.")]
        self.trained = [name.removeprefix("student.") for name in names]
        for name, (_, weight) in zip(self.trained, engine.masters(names), strict=True):
            running[name].copy_(self.averages[name].lerp_(weight, 1 - decay))

    def state(self) -> dict[str, Tensor]:
        """Of what is trained; the rest is as it was at the start."""
        return {name: self.averages[name] for name in self.trained}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        running, self.trained = dict(self.models[0].named_parameters()), list(state)
        for name, average in state.items():
            running[name].copy_(self.averages[name].copy_(average))


def traced(model: nn.Module, batch: dict, needs: Iterable[Needs], side: str, layers: int | None = None) -> Trace:
    """What a model gives for what objectives need of this side, `student` or `target`; `layers` as in `tap`."""
    needs = list(needs)
    wanted = sorted({tap for need in needs for tap in getattr(need, side)})
    heads = {need.head for need in needs if need.head and (side == "student" or need.target_head)}
    if "rank" in heads:
        return Trace({}, {}, causal=False, scores=scored_pairs(model, batch, needs))
    if "classify" in heads:
        return trace(model, batch, wanted, classify=True, layers=layers)
    rows = scored(batch["labels"], batch["segment_ids"], causal="causal" in heads)[0] if heads else None
    return trace(model, batch, wanted, rows, layers=layers)


def _trimmed(found: Trace, vocabulary: int | None) -> Trace:
    return replace(found, head=found.head.trimmed(vocabulary)) if found.head and vocabulary else found


def opened(name: str, stage) -> Source:
    """The source of a target of a training stage, by what its recipe says."""
    spec = stage.spec.targets[name]
    if spec.cache:
        return cached.opened(spec, stage.context, stage.corpus)
    needs = [objective.needs() for objective in stage.objectives.values() if objective.target == name]
    head = next((need.head for need in needs if need.target_head), None)
    own = any(need.own_ids for need in needs)
    vocabulary = stage.corpus.facts.vocabulary if head in ("mlm", "causal") and not own else None
    if spec.ema:
        return Average(stage.student, spec.ema, getattr(torch, stage.context.recipe.engine.dtype), vocabulary)
    members = [frozen(r, head, stage.context, stage.classes, needs, spec.shared) for r in spec.models]
    readers = [_reader(model, r, spec, stage.context) for model, r in zip(members, spec.models, strict=True)]
    if own:
        aligned = alignment(spec.models[0], stage.context, stage.corpus)
        return Online(members[0], alignment=aligned, read=readers[0])
    if vocabulary:
        for member, reference in zip(members, spec.models, strict=True):
            insist_on_pieces(member, reference, stage.context, stage.corpus)
    if spec.ensemble:
        return Ensemble(members, spec.combine, vocabulary, readers)
    return Online(members[0], vocabulary, read=readers[0])


def _reader(model: nn.Module, reference: str, spec, context) -> Read:
    """Of a model, of which only the first layers may be loaded; `shared`: every rank keeps a share of its weights."""
    reading = Reading(model, loading.configuration(context.model(reference)).num_hidden_layers)
    return Shared(reading, getattr(torch, context.dtype(reference))) if spec.shared else reading


class Targets:
    """The targets of a stage by name, and what of each its objectives want."""

    def __init__(self, sources: Mapping[str, Source], objectives: Mapping[str, Objective]):
        self.sources, self.objectives = sources, objectives

    @property
    def models(self) -> list[nn.Module]:
        return [model for source in self.sources.values() for model in source.models]

    @property
    def alignments(self) -> dict[str, Alignment]:
        """Of the targets that read in ids of their own."""
        return {name: source.alignment for name, source in self.sources.items() if source.alignment}

    def _rows(self, target: str, view: View, batch: dict) -> dict:
        return own_rows(batch, target) if self.sources[target].alignment else views.of(batch, view)

    @property
    def calls(self) -> dict[str, int]:
        """Forward passes of each, so far."""
        return {name: source.calls for name, source in self.sources.items()}

    @torch.no_grad()
    def __call__(self, batch: dict, active: Iterable[str]) -> dict[tuple[str, View], Trace]:
        """What each target says of each view that an active objective asks for; no other target is run."""
        asked: dict[tuple[str, View], list[Needs]] = {}
        for view, reading in views.wanted(self.objectives, active).items():
            for name, needs in reading.items():
                if target := self.objectives[name].target:
                    asked.setdefault((target, view), []).append(needs)
        return {
            (target, view): self.sources[target].take(self._rows(target, view, batch), needs)
            for (target, view), needs in asked.items()
        }

    def moved(self, engine, progress: Progress) -> None:
        """The student has made a step."""
        for average in self._averages.values():
            average.moved(engine, progress)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a snapshot keeps: {file: what is in it}."""
        return {file: average.state() for file, average in self._averages.items()}

    def load(self, read: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Put back what `state` gave; `read` takes the name of a file."""
        for file, average in self._averages.items():
            average.load(read(file))

    @property
    def _averages(self) -> dict[str, Average]:
        return {f"average-{name}": source for name, source in self.sources.items() if isinstance(source, Average)}
