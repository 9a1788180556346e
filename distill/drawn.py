"""Models of random weights, each module's drawn from (seed, its name): no order, depth or head changes a layer.

Whole in memory, or tensor by tensor on the way to a file, of any size and to the same bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import TORCH_INIT_FUNCTIONS, no_init_weights

from distill import loading
from growth.memory import pieces
from growth.pieces import Computed

Initialise = Callable[[nn.Module], None]  # of transformers: it sets a module's own weights, or some below it


def fresh(config, head: str | None, seed: int) -> nn.Module:
    """All of it."""
    with loading.quiet(), no_init_weights():
        model = loading.class_of(config, head)(config)
    names = _names(model)
    with loading.seeded(seed), _each(model, lambda initialise, module: _draw(initialise, module, names, seed)):
        model.initialize_weights()
    model.tie_weights()
    return model.eval()


def planned(config, head: str | None) -> nn.Module:
    """The same without storage."""
    with no_init_weights():
        return loading.skeleton(loading.class_of(config, head), config, {})


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: loading.inside(name, model) for name, module in model.named_modules()}


@contextmanager
def _each(model: nn.Module, how: Callable[[Initialise, nn.Module], None]) -> Iterator[None]:
    """While the model sets its weights, do it `how` for each module."""
    parts = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    for part in parts:
        part._init_weights = partial(how, part._init_weights)
    try:
        yield
    finally:
        for part in parts:
            del part._init_weights


@contextmanager
def _touching() -> Iterator[None]:
    """Whatever sets a tensor counts as a change of it: some of torch's functions leave one without storage alone."""
    before = dict(TORCH_INIT_FUNCTIONS)
    TORCH_INIT_FUNCTIONS.update(dict.fromkeys(before, lambda tensor, *given, **named: tensor.detach().zero_()))
    try:
        yield
    finally:
        TORCH_INIT_FUNCTIONS.update(before)


def _draw(initialise: Initialise, module: nn.Module, names: dict[nn.Module, str], seed: int) -> None:
    digest = hashlib.sha256(f"{seed}:{names[module]}".encode()).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:7], "little"))
    initialise(module)


class Step(NamedTuple):
    """One module's turn, and the parameters that it writes to."""

    initialise: Initialise
    module: nn.Module
    written: set[nn.Parameter]


class Drawn:
    """The tensors of a model without storage, made one after the other.

    A rehearsal on nothing shows which module writes to which parameters, some to those of modules below them. What is
    written together is made together: a layer's matrix and bias, as a rule.
    """

    def __init__(self, model: nn.Module, seed: int):
        self.model, self.seed, self.names = model, seed, _names(model)
        self.owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                self.owners.setdefault(p, []).append((module, name))
        self.steps: list[Step] = []
        with _each(model, self._rehearse), _touching():
            model.initialize_weights()
        model.tie_weights()
        self.together = self._together()
        self._made: dict[nn.Parameter, Tensor] = {}

    @property
    def whole(self) -> bool:
        """Whether every tensor of the model can be made: it is a parameter that some module writes to."""
        kept = {id(tensor) for tensor in self.model.state_dict(keep_vars=True).values()}
        return kept <= {id(p) for p in self.together}

    def pieces(self) -> Iterator[tuple[str, Computed]]:
        """As they are called in a checkpoint, to be made when their turn comes."""
        return pieces(self.model, self.tensor)

    def tensor(self, p: nn.Parameter) -> Tensor:
        if p not in self._made:
            self._made = {}  # before the next ones are there
            self._made = self._make(self.together[p])
        return self._made[p]

    def _rehearse(self, initialise: Initialise, module: nn.Module) -> None:
        before = {p: p._version for p in module.parameters()}
        initialise(module)
        self.steps.append(Step(initialise, module, {p for p, version in before.items() if p._version > version}))

    def _together(self) -> dict[nn.Parameter, set[nn.Parameter]]:
        found: dict[nn.Parameter, set[nn.Parameter]] = {}
        for step in self.steps:
            joined = step.written.union(*(found.get(p, ()) for p in step.written))
            found.update(dict.fromkeys(joined, joined))
        return found

    @torch.no_grad()
    def _make(self, parameters: set[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        made = {p: nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False) for p in parameters}
        self._put(made)
        with loading.seeded(self.seed):
            for step in self.steps:
                if step.written & parameters:
                    _draw(step.initialise, step.module, self.names, self.seed)
        self._put({p: p for p in parameters})
        return made

    def _put(self, made: dict[nn.Parameter, nn.Parameter]) -> None:
        for p, tensor in made.items():
            for module, name in self.owners[p]:
                setattr(module, name, tensor)
