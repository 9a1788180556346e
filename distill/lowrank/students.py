"""A student whose matrices are factors: how it starts, how it is loaded, and how it becomes an ordinary model again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distill import loading, models
from distill.lowrank.module import SparseLowRank
from distill.lowrank.spec import LowRankSpec
from growth import factored, families, files
from growth.console import count, say
from growth.errors import UserError
from growth.factored import Factors
from growth.scope import matrices

CLOSE = 1e-5  # merged in float32, then cast to what the checkpoint stores: float32
TRAINED = ("B", "A", "values")


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


def size(name: str, layer: nn.Module, spec: LowRankSpec) -> tuple[int, int, float]:
    """(rank, number of values, scale) of one matrix."""
    out, into = shape(layer)
    rank = spec.rank or factored.rank_of(out, into, spec.compress)
    if rank > min(out, into):
        raise UserError(f"rank {rank}: {name} is {out} x {into}, and no such matrix has a rank above {min(out, into)}")
    return rank, factored.places(out, into, spec.density), (spec.alpha or rank) / rank


# The start


def begin(make: Callable[[Path], Path], start: Path, spec: LowRankSpec, seed: int, random: bool) -> Path:
    """The student before its first step, of the dense one that `make` makes: an ordinary checkpoint and its factors.

    `random`: its matrices start anew, instead of as the SVD of what they are.
    """
    scratch = start.with_name(f"{start.name}.dense")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        dense = make(scratch)
        model = models.load(dense, loading.own_head(loading.configuration(dense)))
        found = layers(model, spec.scope)
        own = {name: loading.inside(name, model) for name in found}  # the seed is that of a name without a head
        factors = {f"{name}.weight": _made(own[name], layer, spec, seed, random) for name, layer in found.items()}
        _fill(found, factors)
        _tell(found, factors)
        beside = partial(factored.write, factors=factors, made=spec.model_dump(mode="json", exclude_none=True))
        return models.save(model, start, carry=dense, story={"preserves": "no"}, beside=beside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _made(name: str, layer: nn.Module, spec: LowRankSpec, seed: int, random: bool) -> Factors:
    rank, n, scale = size(name, layer, spec)
    if not random:
        return factored.split(_turned(layer, layer.weight.detach()), rank, n, scale)
    digest = hashlib.sha256(f"{seed}:{name}:factors".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return factored.drawn(*shape(layer), rank, n, scale, generator)


def _turned(layer: nn.Module, W: Tensor) -> Tensor:
    """[out, in] from what is stored, and the other way round."""
    return W.T.contiguous() if isinstance(layer, Conv1D) else W


@torch.no_grad()
def _fill(found: Mapping[str, nn.Module], factors: Mapping[str, Factors]) -> None:
    for name, layer in found.items():
        layer.weight.copy_(_turned(layer, factors[f"{name}.weight"].merged()))


def _tell(found: Mapping[str, nn.Module], factors: Mapping[str, Factors]) -> None:
    before = sum(layer.weight.numel() for layer in found.values())
    after = sum(getattr(f, key).numel() for f in factors.values() for key in TRAINED)
    say(f"{len(found)} matrices are held as {count(after)} numbers instead of {count(before)}")


# While it trains


def load(start: Path, head: str | None) -> nn.Module:
    """The student with its factors in the place of its matrices."""
    model, factors = models.load(start, head), factored.read(start)
    held = {loading.inside(name, model): f for name, f in factors.items()}
    for name, layer in list(model.named_modules()):
        if (f := held.pop(f"{loading.inside(name, model)}.weight", None)) is not None:
            _refuse_other(start, name, _turned(layer, layer.weight.detach()), f)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, SparseLowRank(f, layer.bias))
    if held:
        raise UserError(f"{start}: {factored.STORY} names {next(iter(held))}, which the model does not have")
    return model


def _refuse_other(start: Path, name: str, W: Tensor, f: Factors) -> None:
    same = f.shape == tuple(W.shape) and torch.allclose(f.merged(), W, atol=CLOSE * float(W.abs().max()), rtol=0)
    if not same:
        raise UserError(f"{start}: the weight of {name} is not what {factored.WEIGHTS} says it is made of")


def digest(start: Path) -> str:
    """Of the factors, which their product does not tell."""
    return files.sha256(start / factored.WEIGHTS)


# Afterwards


def export(start: Path, trained: Mapping[str, Tensor], dst: Path) -> Path:
    """An ordinary checkpoint of what was trained, in float32, and its factors beside it."""
    build = loading.class_of(loading.configuration(start), None)
    rest = {loading.inside(name, build): tensor for name, tensor in trained.items()}
    factors = {name: _trained(loading.inside(name, build), f, rest) for name, f in factored.read(start).items()}
    kinds = dict(models.load(start, loading.own_head(loading.configuration(start))).named_modules())
    dense = {name: _turned(kinds[name.removesuffix(".weight")], f.merged()) for name, f in factors.items()}
    made = files.read_json(start / factored.STORY)["made"]
    beside = partial(factored.write, factors=factors, made=made)
    return models.export(start, {**rest, **dense}, dst, beside=beside)


def _trained(name: str, f: Factors, rest: dict[str, Tensor]) -> Factors:
    """What no loss reached stands as it was."""
    at = name.removesuffix("weight")
    B, A, values = (rest.pop(f"{at}{key}", getattr(f, key)) for key in TRAINED)
    return Factors(B, A, values.view(-1), f.indices, f.scale)
