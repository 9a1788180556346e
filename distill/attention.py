"""Attention that is listened to: implementations of our own, registered with transformers beside each of its own.

Under our name stands a function that hands query, key and value to the listeners of the block that is running and then
delegates to the original. A family's own eager function is delegated to as well.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from growth.errors import UserError

IN_ATTENTION = ("query", "key", "value")
PREFIX = "distill_"
IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


class Tap(NamedTuple):
    """One thing to listen to; layer 0 is the first block, -1 the last; hidden i is the output of block i."""

    role: str
    layer: int


class Seen(dict):
    """Tap as asked -> tensor; by layer as asked: `scaling`, the factor on the attention scores, and `window`.

    With a window a token sees only tokens nearer than that.
    """

    def __init__(self):
        super().__init__()
        self.scaling: dict[int, float] = {}
        self.window: dict[int, int | None] = {}


class Keep(torch.autograd.Function):
    """Identity that saves its input and reads it back in backward.

    Under activation checkpointing the read makes the recomputation run before ZeRO-3 gathers the projection's weight
    for its backward; the other way round, recomputation frees the weight that was just gathered (measured: a crash).
    """

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        _ = ctx.saved_tensors
        return gradient


@dataclass(eq=False)
class Listener:
    """What is wanted of one block, and where it goes; armed during the outer forward pass only."""

    seen: Seen
    turn: int | None = None  # which run of a block that several layers share; None: a block of one layer
    asked: dict[str, list[int]] = field(default_factory=dict)  # role -> the layer, under each name it was asked by
    armed: bool = False
    run: int = -1  # the one that goes on, of a shared block
    heard: bool = True  # of this run of the block; a second call of the interface would be cross attention

    @property
    def mine(self) -> bool:
        """Whether the layer that runs is the one listened to."""
        return self.turn in (None, self.run)

    @property
    def attends(self) -> bool:
        """Whether something inside of attention is listened to."""
        return bool(self.asked.keys() & set(IN_ATTENTION))

    def begin(self) -> None:
        self.armed, self.run = True, -1

    def next(self) -> None:
        self.run += 1

    def attention(self, values: dict[str, Tensor], scaling: float, window: int | None) -> dict[str, Tensor]:
        """What attention is to go on with: the same values, through `Keep` where they are tapped."""
        if self.heard:
            return values
        self.heard = True
        kept = {r: Keep.apply(v) if r in self.asked and torch.is_grad_enabled() else v for r, v in values.items()}
        for role in self.asked.keys() & kept.keys():
            self.record(role, kept[role])
            if self.armed:
                self.seen.scaling.update(dict.fromkeys(self.asked[role], scaling))
                self.seen.window.update(dict.fromkeys(self.asked[role], window))
        return kept

    def record(self, role: str, value: Tensor) -> None:
        if self.armed and self.mine:
            self.seen.update({Tap(role, layer): value for layer in self.asked.get(role, ())})

    def missing(self) -> list[Tap]:
        return [Tap(r, layer) for r, layers in self.asked.items() for layer in layers if Tap(r, layer) not in self.seen]


class _Stack(threading.local):
    """The listeners of the block that is running, in this thread (CUDA recomputes in a thread of its own)."""

    def __init__(self):
        self.listeners: list[Listener] = []


_running = _Stack()


def heard_by(run: Callable, block: nn.Module, listener: Listener) -> Callable:
    """What is to run now, and perhaps again in backward, when it is no longer known which layer's turn it is."""
    mine = listener.mine
    configs = {id(m.config): m.config for m in block.modules() if hasattr(m, "config")}.values()

    def heard(*args, **kwargs):
        listener.heard = not mine
        _running.listeners.append(listener)
        try:
            with _switched(configs):
                return run(*args, **kwargs)
        finally:
            _running.listeners.remove(listener)
            listener.heard = True

    return heard


@contextmanager
def _switched(configs: Iterable) -> Iterator[None]:
    """Attention through our implementation for the duration."""
    before = [(config, config._attn_implementation) for config in configs]
    for config, name in before:
        config._attn_implementation = _ours(name)
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _ours(name: str) -> str:
    if name.removeprefix(PREFIX) not in IMPLEMENTATIONS:
        raise UserError(f"attention implementation {name!r} cannot be tapped; {', '.join(IMPLEMENTATIONS)} can")
    return PREFIX + name.removeprefix(PREFIX)


def choose(model: nn.Module, name: str) -> None:
    """Have a model attend by this implementation of transformers; refused where this machine or family lacks it."""
    if name == "flex_attention" and not torch.cuda.is_available():
        raise UserError("engine.attention: flex_attention has no backward pass on a CPU; take sdpa or eager")
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"engine.attention: {type(model).__name__} cannot take {name} here: {said}") from error


def _recording(name: str) -> Callable:
    def attention(module, query, key, value, *args, **kwargs):
        values = dict(zip(IN_ATTENTION, (query, key, value), strict=True))
        scaling = kwargs.get("scaling")
        window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))  # Qwen2-MoE keeps it to itself
        for listener in _running.listeners:
            values = listener.attention(values, query.shape[-1] ** -0.5 if scaling is None else scaling, window)
        ours, module.config._attn_implementation = module.config._attn_implementation, name  # flash reads it there
        try:
            return _original(module, name)(module, *values.values(), *args, **kwargs)
        finally:
            module.config._attn_implementation = ours

    return attention


def _original(module: nn.Module, name: str) -> Callable:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward  # every family has its own


# The mask function stands under the same name: a mask made inside a block would otherwise be lost without a word.
for _name in IMPLEMENTATIONS:
    AttentionInterface.register(PREFIX + _name, _recording(_name))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
