"""A student whose matrices are factors: how it starts, how it is loaded, and how it becomes an ordinary model again."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distill import loading, models
from distill.lowrank.module import SparseLowRank
from distill.lowrank.spec import LowRankSpec
from growth import bits, factored, families, files
from growth.console import count, say
from growth.errors import UserError
from growth.factored import Factors
from growth.scope import matrices

CLOSE = 1e-5  # merged in float32, then cast to what the checkpoint stores: float32
TRAINED = ("B", "A", "values")
ORIGIN = "origin.safetensors"  # of a start: {weight: its matrix before it became factors}


# Which matrices


def layers(model: nn.Module, scope: Collection[str]) -> dict[str, nn.Module]:
    """{name: linear layer in scope}, in the order of the model. Experts that are one tensor are not among them."""
    config = model.config.to_dict()
    family = families.of(config)
    wanted = {name.removesuffix(".weight") for name in matrices(family, config, scope)}
    found = {
        name: module
        for name, module in model.named_modules()
        if loading.inside(name, model) in wanted and isinstance(module, nn.Linear | Conv1D)
    }
    if not found:
        raise UserError(f"scope {', '.join(scope)}: no matrix of this {family.name} is one alone (experts are stacked)")
    _refuse_shared(model, found)
    return found


def _refuse_shared(model: nn.Module, found: Mapping[str, nn.Module]) -> None:
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    for layer in found.values():
        if len(shared := names[layer.weight]) > 1:
            raise UserError(f"{' and '.join(shared)} are one tensor, of which one half cannot become factors")


def shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


@dataclass(frozen=True)
class Size:
    """Of one matrix: its own, its rank, how many values stand beside, and what scales B A."""

    out: int
    into: int
    rank: int
    values: int
    scale: float

    @property
    def numbers(self) -> int:
        """What is trained."""
        return self.rank * (self.out + self.into) + self.values


def size(name: str, layer: nn.Module, spec: LowRankSpec) -> Size:
    """Refused where no matrix of this shape has this rank."""
    out, into = shape(layer)
    rank = spec.rank or factored.rank_of(out, into, spec.compress)
    if rank > min(out, into):
        raise UserError(f"rank {rank}: {name} is {out} x {into}, and no such matrix has a rank above {min(out, into)}")
    return Size(out, into, rank, factored.places(out, into, spec.density), (spec.alpha or rank) / rank)


# The start


def factors_of(model: nn.Module, spec: LowRankSpec, seed: int, random: bool) -> dict[str, Factors]:
    """{weight: its factors}; `random`: they start anew, instead of as the SVD of what it is."""
    return {
        f"{name}.weight": _made(loading.inside(name, model), layer, spec, seed, random)  # a head changes no seed
        for name, layer in layers(model, spec.scope).items()
    }


def begin(
    make: Callable[[Path], Path], start: Path, spec: LowRankSpec, seed: int, random: bool, origin: bool = False
) -> Path:
    """The student before its first step, of the dense one that `make` makes: an ordinary checkpoint and its factors.

    `origin`: and the matrices that they came from, for a loss that compares.
    """
    scratch = start.with_name(f"{start.name}.dense")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        dense = make(scratch)
        if (dense / bits.FILE).exists():
            raise UserError("lowrank: the student has masks, which factors would not keep; `densify` it first")
        model = models.load(dense, loading.own_head(loading.configuration(dense)))
        factors = factors_of(model, spec, seed, random)
        whole = _whole(model, factors) if origin else {}
        _fill(model, factors)
        beside = partial(_write, factors, whole, spec.model_dump(mode="json", exclude_none=True))
        models.save(model, start, carry=dense, story={"preserves": "no"}, beside=beside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    n = told(start)
    say(f"{n['matrices']} matrices are held as {count(n['held'])} numbers instead of {count(n['whole'])}")
    return start


def told(start: Path) -> dict[str, int]:
    """How many matrices are factors, the numbers that they are held as, and those that they have when whole."""
    weights = files.read_json(start / factored.STORY)["weights"].values()
    held = (w["rank"] * sum(w["shape"]) + w["values"] for w in weights)
    return {"matrices": len(weights), "held": sum(held), "whole": sum(math.prod(w["shape"]) for w in weights)}


def _made(name: str, layer: nn.Module, spec: LowRankSpec, seed: int, random: bool) -> Factors:
    s = size(name, layer, spec)
    if not random:
        return factored.split(_turned(layer, layer.weight.detach()), s.rank, s.values, s.scale)
    digest = hashlib.sha256(f"{seed}:{name}:factors".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return factored.drawn(s.out, s.into, s.rank, s.values, s.scale, generator)


def _turned(layer: nn.Module, W: Tensor) -> Tensor:
    """[out, in] from what is stored, and the other way round."""
    return W.T.contiguous() if isinstance(layer, Conv1D) else W


def _whole(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    return {name: _turned(layer, layer.weight.detach()).clone() for name, layer in layers.items()}


def _write(factors: Mapping[str, Factors], whole: dict[str, Tensor], made: Mapping[str, Any], directory: Path) -> None:
    factored.write(directory, factors, made)
    if whole:
        save_file(whole, directory / ORIGIN)


@torch.no_grad()
def _fill(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    for name, f in factors.items():
        model.get_parameter(name).copy_(_merged(model, name, f))


def _merged(model: nn.Module, name: str, f: Factors) -> Tensor:
    return _turned(model.get_submodule(name.removesuffix(".weight")), f.merged())


# While it trains


def load(start: Path, head: str | None) -> nn.Module:
    """The student with its factors in the place of its matrices."""
    model, factors = models.load(start, head), factored.read(start)
    origin = load_file(start / ORIGIN) if (start / ORIGIN).is_file() else {}
    layers = {f"{loading.inside(name, model)}.weight": (name, module) for name, module in model.named_modules()}
    for weight, f in factors.items():
        name, layer = layers.get(loading.inside(weight, model), (None, None))
        if not isinstance(layer, nn.Linear | Conv1D):
            raise UserError(f"{start}: {factored.STORY} names {weight}, which the model does not have")
        _refuse_other(start, weight, _turned(layer, layer.weight.detach()), f)
        hold(model, name, f, origin.get(weight))
    return model


def hold(model: nn.Module, name: str, f: Factors, origin: Tensor | None = None) -> None:
    """Put factors in the place of a linear layer; its bias stays."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, SparseLowRank(f, model.get_submodule(name).bias, origin))


def _refuse_other(start: Path, name: str, W: Tensor, f: Factors) -> None:
    same = f.shape == tuple(W.shape) and torch.allclose(f.merged(), W, atol=CLOSE * float(W.abs().max()), rtol=0)
    if not same:
        raise UserError(f"{start}: {name} is not what {factored.WEIGHTS} says it is made of")


def digest(start: Path) -> str:
    """Of the factors, which their product does not tell."""
    return files.sha256(start / factored.WEIGHTS)


# Afterwards


def export(start: Path, trained: Mapping[str, models.Make], dst: Path) -> Path:
    """An ordinary checkpoint of what was trained, in float32, and its factors beside it."""
    build = loading.class_of(loading.configuration(start), None)
    rest = {loading.inside(name, build): make for name, make in trained.items()}
    factors = {name: _trained(loading.inside(name, build), f, rest) for name, f in factored.read(start).items()}
    model = models.load(start, loading.own_head(loading.configuration(start)))
    dense = {name: partial(_merged, model, name, f) for name, f in factors.items()}
    made = files.read_json(start / factored.STORY)["made"]
    beside = partial(factored.write, factors=factors, made=made)
    return models.export(start, {**rest, **dense}, dst, beside=beside)


def _trained(name: str, f: Factors, rest: dict[str, models.Make]) -> Factors:
    """What no loss reached stands as it was."""
    at = name.removesuffix("weight")
    B, A, values = (rest.pop(f"{at}{key}", lambda key=key: getattr(f, key))() for key in TRAINED)
    return Factors(B, A, values.view(-1), f.indices, f.scale)
