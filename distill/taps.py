"""Taps: the query, key, value and hidden states of any layer, taken while a transformers model runs.

Every family hands its attention to one interface of transformers. While a tapped block runs, the model's attention
implementation is one of ours under a name of our own, which records what it gets and delegates to the original: no
`output_attentions`, no hook per architecture, outputs equal to the bit. Values are those attention uses: after
rotary embedding and query-key norms, keys and values with as many heads as the model has of them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers.modeling_layers import GradientCheckpointingLayer

from distill import classifiers, heads, layout, loading
from distill.attention import IN_ATTENTION, Listener, Seen, Tap, heard_by
from distill.forwards import Recomputed, called, replaced
from distill.heads import Logits, Mixture
from distill.lowrank.module import deviations
from distill.objectives.crossing import Scores
from growth.errors import UserError, did_you_mean

ROLES = (*IN_ATTENTION, "input", "hidden")
EMBEDDINGS = Tap("input", 0)  # what the first block is given
OUTPUT = Tap("output", -1)  # what the base model hands on: the last hidden states, after a norm behind the blocks
DEVIATIONS = Tap("deviations", -1)  # of all factors from the matrices that they came from [n]

AS_WRITTEN = (
    "{} is compiled as a whole, and inside a tap runs as if it were not; blocks compiled one by one stay compiled, "
    "`for layer in model.encoder.layer: layer.compile()`, all but those whose attention is tapped"
)
BLOCKS = {"mpnet": "encoder.layer"}  # where they are in families whose blocks transformers does not mark as such


@dataclass(frozen=True)
class Trace:
    """What one forward pass hands to the objectives: tapped tensors, what makes the logits of the rows asked for."""

    taps: dict[Tap, Tensor]
    scaling: dict[int, float]
    causal: bool  # every token sees only those before it
    head: Logits | Mixture | None = None  # or what a cache has of it
    scores: Scores | None = None  # of a ranker
    window: dict[int, int | None] = field(default_factory=dict)  # as `scaling`, by layer; a cache has none

    @cached_property
    def logits(self) -> Tensor | None:
        """All of them [N, V]; losses in chunks take `head`."""
        return self.head and self.head.whole()


@contextmanager
def tap(model: nn.Module, taps: Iterable[tuple[str, int]], layers: int | None = None) -> Iterator[Seen]:
    """Fill the mapping handed out with the tapped tensors of each forward pass of `model` inside the block.

    query [B, Hq, T, d], key and value [B, Hkv, T, d], input, hidden and output [B, T, D]. Gradients flow through them.
    A second forward pass replaces the tensors of the first. `layers`: of the whole model, where this one is only its
    beginning; negative numbers count from there.
    """
    base, seen, asked = _base(model), Seen(), [Tap(*t) for t in taps]
    listeners = _listeners(base, [t for t in asked if t not in (OUTPUT, DEVIATIONS)], seen, layers)
    with ExitStack() as undo:
        _as_written(model, base, listeners, undo)
        for (block, _), listener in listeners.items():
            _attach(block, listener, undo)
        undo.callback(base.register_forward_pre_hook(lambda *_: _begin(seen, listeners.values())).remove)
        undo.callback(base.register_forward_hook(lambda *run: _finish(model, seen, listeners.values(), run)).remove)
        if DEVIATIONS in asked:
            undo.callback(base.register_forward_hook(lambda *_: seen.update({DEVIATIONS: deviations(base)})).remove)
        if OUTPUT in asked:
            undo.callback(base.register_forward_hook(lambda *run: seen.update({OUTPUT: run[-1][0]})).remove)
        try:
            yield seen
        finally:
            for listener in listeners.values():
                listener.armed, listener.seen = False, Seen()  # a checkpoint's graph must not hold what holds the graph


@torch.compiler.disable  # a graph around it would go past it
def trace(
    model: nn.Module,
    batch: dict[str, Tensor],
    wanted: Iterable[Tap],
    rows: Tensor | None = None,
    *,
    classify: bool = False,
    layers: int | None = None,
) -> Trace:
    """One forward pass over a batch; `rows` are the flat positions b*T+t whose logits are wanted.

    Without rows the head does not run. With rows the model's own head runs on those positions alone, whatever it is
    made of (a transform, a tied decoder), up to its last linear layer; what follows (a scale, a cap) is found out.
    `classify`: the logits wanted are those of the classes of the batch's rows. `layers` as in `tap`.
    """
    inputs, causal = layout.inputs(model, batch), loading.causal(model.config)
    with tap(model, wanted, layers) as seen:
        if classify:
            head = classifiers.logits(model, batch)
            return Trace(dict(seen), seen.scaling, causal, head, window=seen.window)
        if rows is None:
            model.base_model(**inputs)
            return Trace(dict(seen), seen.scaling, causal, window=seen.window)
        with _only(model, rows), heads.unmade(model) as kept:
            answer = model(**inputs, return_dict=True).logits
        head = heads.of(model, _chosen(model, kept, rows), answer)
    return Trace(dict(seen), seen.scaling, causal, head, window=seen.window)


@contextmanager
def _only(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """The head sees the last hidden states [B, T, D] of the given flat positions only, as one row [1, N, D]."""

    def select(module, arguments, output):
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[rows][None]  # [1, N, D]
        return output

    hook = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _chosen(model: nn.Module, kept: list[Tensor], rows: Tensor) -> Tensor:
    """Of what the last layer was given, the rows [N, D]; OPT goes past its base model, so all [B, T, D] arrive."""
    if not kept:  # MobileBERT
        raise UserError(f"{type(model).__name__} makes its logits without its output embeddings; they cannot be taken")
    given = kept[0]
    return given[0] if given.shape[:2] == (1, len(rows)) else given.flatten(0, 1)[rows]


def _begin(seen: Seen, listeners: Iterable[Listener]) -> None:
    seen.clear()
    for listener in listeners:
        listener.begin()


def _finish(model: nn.Module, seen: Seen, listeners: Iterable[Listener], run: tuple) -> None:
    """After this, whatever runs again is a recomputation."""
    for listener in listeners:
        listener.armed = False
        if missing := listener.missing():
            raise _outside(model, missing[0])
    places = run[-1][0].shape[-2]
    for (role, layer), value in seen.items():
        if role not in ("key", "value") and value.shape[-2] != places:  # those may be of a cache as well
            raise UserError(
                f"{type(model).__name__} cannot be tapped for {role}: layer {layer} has {value.shape[-2]} places where "
                f"the model's output has {places}"
            )


def _as_written(model: nn.Module, base: nn.Module, listeners: dict[tuple, Listener], undo: ExitStack) -> None:
    """What is compiled runs uncompiled if it is no block: its graph would go past what is done here.

    So do blocks whose attention is tapped. Compiled they could be, but then all of their parameters have gradients, of
    zeros where there should be none, and what is behind the attention goes backward for nothing.
    """
    compiled = [m for m in model.modules() if isinstance(m, OptimizedModule) or m._compiled_call_impl]
    around = {m: block for block in _outermost(base) for m in block.modules()} if compiled else {}
    entered = {block for (block, _), listener in listeners.items() if listener.attends}
    for module in compiled:
        if around.get(module) in {None, *entered}:
            plain = module._orig_mod.__call__ if isinstance(module, OptimizedModule) else module._call_impl
            undo.enter_context(called(module, lambda _, plain=plain: plain))
        if module not in around:
            warnings.warn(AS_WRITTEN.format(type(plain.__self__).__name__), stacklevel=4)


def _base(model: nn.Module) -> nn.Module:
    if not hasattr(model, "base_model"):
        raise UserError(f"tap takes a transformers model, not a {type(model).__name__} (a wrapper's inside, perhaps?)")
    config = model.config
    if config.is_encoder_decoder:
        raise UserError(f"{type(model).__name__} has an encoder and a decoder; load its encoder alone (T5EncoderModel)")
    if config.model_type == "gpt2" and config.reorder_and_upcast_attn and config._attn_implementation == "eager":
        raise UserError("GPT-2 with reorder_and_upcast_attn cannot be tapped: its attention is outside the interface")
    return model.base_model


def blocks(base: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a base model, first to last."""
    if shared := next((block for block, turn in layers(base) if turn is not None), None):
        raise UserError(
            f"{type(base).__name__} runs one {type(shared).__name__} in several layers, so none of them can be told "
            "apart from the others by its weights; what is tapped of a layer can"
        )
    return [block for block, _ in layers(base)]


def layers(base: nn.Module) -> list[tuple[nn.Module, int | None]]:
    """The block of each layer; of blocks that several layers share, with the number of its run."""
    if base.config.model_type == "albert":
        return _shared(base)
    named = BLOCKS.get(base.config.model_type)
    found = list(base.get_submodule(named)) if named else [b for child in base.children() for b in _outermost(child)]
    if len(found) != base.config.num_hidden_layers:
        raise UserError(
            f"{type(base).__name__} cannot be tapped: {len(found)} blocks were found for its "
            f"{base.config.num_hidden_layers} layers"
        )
    return [(block, None) for block in found]


def _shared(base: nn.Module) -> list[tuple[nn.Module, int]]:
    """ALBERT: the layers of a group are runs of one block."""
    config, groups = base.config, base.encoder.albert_layer_groups
    if config.inner_group_num > 1:
        raise UserError(
            f"{type(base).__name__} cannot be tapped: with inner_group_num {config.inner_group_num} a layer has "
            "several attentions"
        )
    in_group = config.num_hidden_layers / config.num_hidden_groups
    numbers = [int(i / in_group) for i in range(config.num_hidden_layers)]  # as transformers has it
    return [(groups[n], numbers[:i].count(n)) for i, n in enumerate(numbers)]


def _outermost(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, GradientCheckpointingLayer):
        return [module]
    return [b for child in module.children() for b in _outermost(child)]


def interfaced(base: nn.Module) -> bool:
    """Whether attention passes through the attention interface of transformers: its family's file then imports it."""
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(base).__module__])


def _outside(model: nn.Module, tap: Tap) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be tapped for {tap.role}: the attention of layer {tap.layer} does not pass "
        "through the attention interface of transformers; hidden states and logits can be had"
    )


def _listeners(base: nn.Module, taps: list[Tap], seen: Seen, whole: int | None) -> dict[tuple, Listener]:
    found, listeners = layers(base) if taps else [], {}
    whole = whole or len(found)
    for role, layer in taps:
        if role not in ROLES:
            raise UserError(f"no tap {role!r}{did_you_mean(role, ROLES)}; there are {', '.join(ROLES)}")
        if not -whole <= layer < whole or layer % whole >= len(found):
            raise UserError(f"no layer {layer}: {type(base).__name__} has the layers 0 to {len(found) - 1}")
        if role in IN_ATTENTION and not interfaced(base):
            raise _outside(base, Tap(role, layer))
        place = found[layer % whole]
        listener = listeners.setdefault(place, Listener(seen, place[1]))
        listener.asked.setdefault(role, []).append(layer)
    return listeners


def _attach(block: nn.Module, listener: Listener, undo: ExitStack) -> None:
    if listener.attends:
        replace = _replaying if _recomputed(block) else _listening
        replace(block, listener, undo)
    undo.enter_context(called(block, partial(_passing, listener=listener)))


def _passing(run: Callable, listener: Listener) -> Callable:
    """Listen to what goes into a block and what comes out."""

    def passes(*arguments, **named):
        listener.next()
        if "input" in listener.asked:
            listener.record("input", _given(arguments, named))
        output = run(*arguments, **named)
        listener.record("hidden", _first(output))
        return output

    return passes


def _recomputed(block: nn.Module) -> bool:
    checkpointing = isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing
    return checkpointing and block.training


def _given(arguments: tuple, named: dict) -> Tensor:
    return arguments[0] if arguments else named["hidden_states"]


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _listening(block: nn.Module, listener: Listener, undo: ExitStack) -> None:
    """Listen whenever the block runs, and when it runs again."""
    before, around = block.forward, partial(heard_by, block=block, listener=listener)
    again = before.within(around) if isinstance(before, Recomputed) else None
    undo.enter_context(replaced(block, again or (lambda *given, **named: around(before)(*given, **named))))


def _replaying(block: nn.Module, listener: Listener, undo: ExitStack) -> None:
    """Listen to what the checkpoint runs, now and again in backward, when the tap may long be over."""
    checkpoint = block._gradient_checkpointing_func
    if getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False:
        raise UserError(
            "re-entrant activation checkpointing cuts the gradient of tapped tensors; switch it on with "
            'activation_checkpointing_enable({"use_reentrant": False})'
        )
    block._gradient_checkpointing_func = lambda run, *inputs: checkpoint(heard_by(run, block, listener), *inputs)
    undo.callback(setattr, block, "_gradient_checkpointing_func", checkpoint)
