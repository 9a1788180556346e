"""Where teacher values come from, one class a choice of a recipe's `targets`; objectives never know which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from distill import models, views, world
from distill.heads import Mixture
from distill.objectives import scored
from distill.objectives.protocol import Needs, Objective, View
from distill.taps import Trace, trace


class Source(Protocol):
    """What answers for a target."""

    calls: int = 0  # forward passes done, on this rank
    models: tuple[nn.Module, ...] = ()  # what reads rows here: it decides whether documents may share one

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        """What objectives want of these rows; no gradients are recorded."""

    def moved(self, engine) -> None:
        """The student has made a step."""


class Online(Source):
    """A frozen model; `vocabulary`: rows of its head that stand for pieces, those behind are padding."""

    def __init__(self, model: nn.Module, vocabulary: int | None = None):
        self.models, self.vocabulary = (model,), vocabulary

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        self.calls += 1
        return _trimmed(traced(self.models[0], batch, needs, "target"), self.vocabulary)


class Ensemble(Source):
    """Several frozen models as one distribution; there is no one model to be tapped."""

    def __init__(self, models: Iterable[nn.Module], combine: str, vocabulary: int | None = None):
        self.models, self.combine, self.vocabulary = tuple(models), combine, vocabulary

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        self.calls += len(self.models)
        traces = [traced(model, batch, needs, "target") for model in self.models]
        mixture = Mixture(tuple(one.head for one in traces), self.combine)
        return _trimmed(replace(traces[0], head=mixture), self.vocabulary)


def traced(model: nn.Module, batch: dict, needs: Iterable[Needs], side: str) -> Trace:
    """What a model gives for what objectives need of this side, `student` or `target`."""
    needs = list(needs)
    wanted = sorted({tap for need in needs for tap in getattr(need, side)})
    heads = {need.head for need in needs if need.head and (side == "student" or need.target_head)}
    rows = scored(batch["labels"], batch["segment_ids"], causal="causal" in heads)[0] if heads else None
    return trace(model, batch, wanted, rows)


def _trimmed(found: Trace, vocabulary: int | None) -> Trace:
    return replace(found, head=found.head.trimmed(vocabulary)) if found.head and vocabulary else found


def opened(name: str, stage) -> Source:
    """The source of a target of a training stage, by what its recipe says."""
    spec = stage.spec.targets[name]
    needs = [objective.needs() for objective in stage.objectives.values() if objective.target == name]
    head = next((need.head for need in needs if need.target_head), None)
    members = [_teacher(reference, head, stage.context) for reference in spec.models]
    return Ensemble(members, spec.combine) if spec.ensemble else Online(*members)


def _teacher(reference: str, head: str | None, context) -> nn.Module:
    """A frozen model in the precision of the run, with its head if an objective asks for its logits."""
    known = context.recipe.models.get(reference)
    dtype = (known and known.dtype) or {"fp32": "float32", "bf16": "bfloat16"}[context.recipe.engine.precision]
    model = models.load(context.model(reference), head, getattr(torch, dtype))
    return models.freeze(model).to(world.device())


class Targets:
    """The targets of a stage by name, and what of each its objectives want."""

    def __init__(self, sources: Mapping[str, Source], objectives: Mapping[str, Objective]):
        self.sources, self.objectives = sources, objectives

    @property
    def models(self) -> list[nn.Module]:
        return [model for source in self.sources.values() for model in source.models]

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
            (target, view): self.sources[target].take(views.of(batch, view), needs)
            for (target, view), needs in asked.items()
        }

    def moved(self, engine) -> None:
        """The student has made a step."""
        for source in self.sources.values():
            source.moved(engine)
