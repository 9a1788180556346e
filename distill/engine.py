"""A module under DeepSpeed ZeRO: one step forward, and its whole training state by name.

The only file that imports deepspeed. Its private names are used in the part on "the whole training state" alone;
tests/test_engine.py fails first when a release moves them (checked with 0.19.8).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distill import changes, watch, world
from growth.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = ("master", *MOMENTS)  # what the state of one parameter consists of
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Phases = frozenset[Hashable] | None  # the kinds of steps that update a parameter; None: every step


class NonFinite(UserError):
    """A loss or a gradient that is not finite; the weights are those before the step."""


def _deepspeed():
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # asked for even by a process that runs alone
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's, not ours
    import deepspeed

    # Its shared-memory collectives compile for a minute, and a killed build leaves a lock that hangs every later start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def config(spec, optim, micro_batch: int) -> dict:
    """What DeepSpeed is told; the recipe's own `deepspeed:` block is laid over it."""
    accumulation = optim.batch // (micro_batch * world.size())
    told = {
        "train_batch_size": optim.batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip,  # absent would mean 1.0
        "zero_optimization": {"stage": spec.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if spec.precision != "fp32":
        told[spec.precision] = {"enabled": True}
    return _overlay(told, spec.deepspeed)


def _overlay(below: dict, above: dict) -> dict:
    both = {
        k: _overlay(v, above[k]) if isinstance(v, dict) and isinstance(above.get(k), dict) else above.get(k, v)
        for k, v in below.items()
    }
    return {**above, **both}


@contextmanager
def _understood() -> Iterator[None]:
    """What DeepSpeed does not understand stands in the recipe's own block."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Input should be ")
        raise UserError(f"engine.deepspeed: {key} must be {said}, found {first['input']!r}") from error


def groups(module: nn.Module, weight_decay: float, phases: Mapping[str, Phases]) -> list[dict]:
    """Trainable parameters: matrices decay, vectors (biases, norm gains) do not; apart by when they are updated."""
    found: dict[tuple, list] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            found.setdefault((phases.get(name), p.dim() > 1), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "phases": when, "sits_out": False}
        for (when, decays), params in sorted(found.items(), key=lambda item: not item[0][1])
    ]


class Adam(torch.optim.AdamW):
    """AdamW whose groups may sit a step out: then weights, moments and the count of steps stay as they are.

    So it is in torch for parameters without a gradient; ZeRO's flat partitions always have one, of zeros.
    """

    def step(self, closure=None):
        whole = self.param_groups
        self.param_groups = [group for group in whole if not group["sits_out"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = whole


def _cut(module: nn.Module, told: dict, dtype: torch.dtype) -> None:
    """Leave every rank its share of the weights alone (ZeRO 3), in this precision and as `told` says.

    They are taken, cast and cut one after the other: mapped from a file, they never stand in memory together.
    """
    for buffer in module.buffers():
        buffer.data = buffer.data.to(world.device())
    deepspeed = _deepspeed()
    deepspeed.init_distributed(dist_init_required=False, verbose=False)  # or it counts one rank, whatever there are
    deepspeed.zero.Init(module=_Taken(module, dtype), config_dict_or_path=told, dtype=dtype)


class _Taken(nn.Module):
    """A module whose weights are copied to the device when their turn comes: ranks may write on copies alone."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for p in self.module.parameters(recurse):
            p.data = p.data.to(world.device(), self.dtype, copy=True)
            yield p


class Shared:
    """A module of which every rank keeps a share: ZeRO 3 without an optimizer. All ranks must call it alike.

    Outside its forward pass its weights are empty.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        world.start()
        deepspeed, linear = _deepspeed(), nn.functional.linear
        told = {
            "train_batch_size": world.size(),  # asked for, though nothing is trained
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "steps_per_print": 10**9,
        }
        if dtype == torch.bfloat16:
            told["bf16"] = {"enabled": True}
        _cut(module, told, dtype)
        self.engine, *_ = deepspeed.initialize(model=module, config=told, dist_init_required=False)
        nn.functional.linear = linear  # what stage 3 puts there saves memory in backward alone, and rounds otherwise

    def __call__(self, *args):
        return self.engine(*args)

    def close(self) -> None:
        """The module is of no use afterwards, unless it is given other weights."""
        self.engine.empty_partition_cache()
        self.engine.destroy()


@contextmanager
def placed(module: nn.Module, stage: int) -> Iterator[Callable]:
    """What runs `module` before an engine has it: whole on this rank's device, under ZeRO 3 in shares of float32.

    From there its weights return to where they were, in a file as a rule, for the engine to take.
    """
    if stage < 3:
        yield module.to(world.device())
        return
    before = [(p, p.data, dict(vars(p))) for p in module.parameters()]
    shared = Shared(module, torch.float32)

    def kept(x: Tensor) -> Tensor | None:
        """For a backward pass through losses alone: weights stand whole for a moment, and would live on in a graph."""
        whole = {p.untyped_storage().data_ptr() for p in module.parameters()}
        return None if x.untyped_storage().data_ptr() in whole else x

    try:
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
            yield shared
    finally:
        shared.close()
        for p, data, own in before:
            vars(p).clear()  # what DeepSpeed says of it
            vars(p).update(own)
            p.data = data


class Engine:
    """`module` under ZeRO. `engine(...)` runs it; then `backward` for each micro-batch, then one `step`.

    `phases` names the parameters that only some kinds of steps update.
    """

    def __init__(self, module: nn.Module, spec, optim, micro_batch: int, phases: Mapping[str, Phases] | None = None):
        world.start()
        deepspeed, told = _deepspeed(), config(spec, optim, micro_batch)
        self.stage, self.precision, self.clip = spec.zero, spec.precision, optim.clip
        self._linear = nn.functional.linear  # stage 3 replaces it for the whole process
        self.names = [name for name, p in module.named_parameters() if p.requires_grad]
        adamw = Adam(
            groups(module, optim.weight_decay, phases or {}),
            lr=0.0, betas=tuple(optim.betas), eps=optim.eps, fused=True,
        )  # fmt: skip
        # DeepSpeed gives parameters new, rounded data; what they hold now lives on here until its master has it
        exact = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad and self._rounds}
        with _understood():
            if self.stage == 3:
                _cut(module, told, DTYPES[self.precision])
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=told, dist_init_required=False)
        self._base.state.clear()  # stage 0 in low precision has taken an empty step by now, and counted it
        self.accumulation = self.engine.gradient_accumulation_steps()
        if self._rounds:  # else the float32 masters would start from rounded weights
            self.load_state(lambda name, key: exact.pop(name) if key == "master" else None, lambda phases: 0)

    def __call__(self, *args):
        watch.part()
        return self.engine(*args)

    @property
    def device(self):
        return self.engine.device

    def backward(self, loss: Tensor) -> None:
        """`loss` is this rank's share of the global mean; DeepSpeed divides by ranks and accumulation, undone here."""
        watch.part()
        self.engine.backward(loss * (world.size() * self.accumulation))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # between micro-batches this only counts

    def step(self, lr: float, phase: Hashable = None) -> float:
        """Clip, update, zero the gradients; returns the norm before clipping. NonFinite: no weight was changed.

        In a `phase`, parameters of other phases stay as they are.
        """
        watch.part()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
            group["sits_out"] = phase is not None and group["phases"] is not None and phase not in group["phases"]
        norm = self._plain_norm() if self._is_plain else None
        skipped = self.engine.skipped_steps
        self.engine.step()
        self._forget_gradients()
        if self.engine.skipped_steps > skipped:
            raise NonFinite("a gradient is not finite; the step was not taken")
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def watched(self, step: int, entry: Mapping[str, Any]) -> None:
        """Numbers of a log entry, for the monitors that the `deepspeed:` block switches on (TensorBoard, W&B, CSV)."""
        if self.engine.monitor.enabled:
            numbers = {name: value for name, value in changes.flat(entry).items() if isinstance(value, int | float)}
            self.engine.monitor.write_events([(f"distill/{name}", value, step) for name, value in numbers.items()])

    # --- the whole training state, by name ---------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every trainable parameter, in the order of `state`."""
        return {name: tuple(p.ds_shape if self.stage == 3 else p.shape) for name, p in self._trainable()}

    def state(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """(name, full float32 tensor) of every trainable parameter for one of KEYS, on every rank, one at a time.

        Collective: all ranks must exhaust it together. Before the first step the moments are zero.
        """
        self._link()
        for name, p in self._trainable():
            yield name, self._get(p, key).cpu()

    def masters(self, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, full float32 weight) of every trainable parameter, on its device, to be read at once. Collective.

        `names`: of these alone.
        """
        for name, p in self._trainable(names):
            yield name, self._get(p, "master")

    def lend(self, work: Callable[[dict[str, Callable[[], Tensor]]], object]) -> None:
        """The first rank does `work` with what makes the float32 weight of each trainable parameter. Collective.

        All ranks gather it when it is asked for, and no other keeps it.
        """
        named, failure = dict(self._trainable()), None

        @lru_cache(maxsize=2)  # of experts that are written one by one, whose layer holds them in two tensors
        def master(name: str) -> Tensor:
            return self._get(named[world.told(name)], "master").cpu()

        if world.rank() == 0:
            try:
                work({name: partial(master, name) for name in named})
            except BaseException as error:
                failure = error
            world.told(None)
        else:
            while (name := world.told(None)) is not None:
                self._get(named[name], "master")
        world.raise_together(failure)

    def working(self, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The same of the copies that the forward pass reads, in its precision."""
        for name, p in self._trainable(names):
            with self._whole(p):
                yield name, p.detach()

    @torch.no_grad()
    def clear(self, dead: Mapping[str, Tensor]) -> None:
        """Set to zero what these masks cover: of the master, both moments and the working copy. Collective."""
        self._link()
        for name, p in self._trainable(dead):
            for key in KEYS if self._base.state else KEYS[:1]:
                self._set(p, key, self._get(p, key).masked_fill(dead[name], 0.0))

    def load_state(self, read: Callable[[str, str], Tensor | None], updates: Callable[[Phases], int]) -> None:
        """Put back what `state` gave: `read(name, key)` returns a full tensor, or None to leave the moment at zero.

        `updates` says how often parameters of these phases were updated.
        """
        for flat, phases in self._flat_masters():
            self._base.state[flat] = _adam_state(flat, updates(phases))
        self._link()
        for name, p in self._trainable():
            for key in KEYS:
                value = read(name, key)
                if value is not None:
                    self._set(p, key, value.to(self.device, torch.float32))

    def shard(self) -> Iterator[tuple[str, Tensor]]:
        """(key and number, flat float32 tensor) of what this rank alone keeps of the state; nothing is gathered.

        It means something under the same stage, number of ranks and precision alone.
        """
        kept = self._flat_masters()
        if sum(flat.numel() for flat, _ in kept) * world.size() < sum(map(prod, self.shapes().values())):
            raise UserError("a part of the optimizer is offloaded to disk, where `local: true` finds nothing to save")
        for i, (flat, _) in enumerate(kept):
            held = {"master": flat, **(self._base.state.get(flat) or _adam_state(flat, 0))}
            yield from ((f"{key}.{i}", held[key].detach()) for key in KEYS)

    def load_shard(self, read: Callable[[str], Tensor], updates: Callable[[Phases], int]) -> None:
        """Put back what `shard` gave: `read(key and number)`; `updates` as for `load_state`. Collective."""
        for i, (flat, phases) in enumerate(self._flat_masters()):
            held = {"master": flat.data, **_adam_state(flat, updates(phases))}
            for key in KEYS:
                held[key].copy_(read(f"{key}.{i}"))
            self._base.state[flat] = {key: value for key, value in held.items() if key != "master"}
        self._link()
        for name, weight in self.masters():
            self._set_low_precision(self.engine.module.get_parameter(name), weight)

    def close(self) -> None:
        """Give back what DeepSpeed took from the process; the engine is of no use afterwards."""
        self.engine.destroy()
        nn.functional.linear = self._linear

    def _trainable(self, names: Container[str] | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        named = dict(self.engine.module.named_parameters())
        return ((name, named[name]) for name in self.names if names is None or name in names)

    @property
    def _rounds(self) -> bool:
        return self.precision != "fp32"

    @property
    def _is_plain(self) -> bool:
        return self.stage == 0 and self.precision == "fp32"

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The torch optimizer below DeepSpeed's wrapper."""
        return self.engine.optimizer if self._is_plain else self.engine.optimizer.optimizer

    def _flat_masters(self) -> list[tuple[Tensor, Phases]]:
        """The tensors that the torch optimizer really updates: flat partitions under ZeRO, else one a parameter."""
        groups = self._base.param_groups
        if self.stage == 3:
            wrapper = self.engine.optimizer
            return [
                (flat, groups[wrapper.sub_group_to_group_id[i]]["phases"])
                for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat)
            ]
        return [(p, group["phases"]) for group in groups for p in group["params"]]

    def _forget_gradients(self) -> None:
        """Stage 3 writes gradients over those of the step before: where none came, the old one would count again."""
        if self.stage == 3 and (held := self.engine.optimizer.grad_partitions_flat_buffer) is not None:
            held.zero_()

    def _link(self) -> None:
        """Let stages 1 and 2 find the moments of a parameter inside the flat partition.

        DeepSpeed does it once, after the first group's first step, when the second group has no moments yet. A group
        that was never updated has none to find: they are zero.
        """
        for flat, _ in self._flat_masters() if self._base.state else ():
            if not self._base.state[flat]:
                self._base.state[flat] = _adam_state(flat, 0)
        if self.stage in (1, 2) and self._base.state:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _master(self, p: nn.Parameter) -> Tensor:
        """Stage 0: the float32 copy of one parameter."""
        if self._is_plain:
            return p
        wrapper = self.engine.optimizer
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return next(high for lows, highs in pairs for low, high in zip(lows, highs, strict=True) if low is p)

    def _get(self, p: nn.Parameter, key: str) -> Tensor:
        watch.part()
        slot = None if key == "master" else key
        if slot and not self._base.state:
            return torch.zeros(p.ds_shape if self.stage == 3 else p.shape)
        if self.stage == 3:
            return p._z3_optimizer.get_full_hp_param(p, slot)
        if self.stage:
            return p.get_full_hp_param(slot)
        master = self._master(p)
        return (self._base.state[master][slot] if slot else master).detach()

    def _set(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        slot = None if key == "master" else key
        if self.stage == 3:
            p._z3_optimizer.set_local_hp_param(self._shard(p, value), p, slot)
        elif self.stage:
            p.set_full_hp_param(value, slot)
        else:
            master = self._master(p)
            (self._base.state[master][slot] if slot else master).data.copy_(value)
        if not slot:
            self._set_low_precision(p, value)

    def _shard(self, p: nn.Parameter, value: Tensor) -> Tensor:
        """Stage 3 keeps `ceil(numel / ranks)` elements a rank, the last ones padded."""
        n = p.ds_tensor.numel()
        return nn.functional.pad(value.flatten(), (0, n * world.size() - value.numel())).narrow(0, n * world.rank(), n)

    def _set_low_precision(self, p: nn.Parameter, value: Tensor) -> None:
        """The copy that the forward pass reads: DeepSpeed's setters leave it as it was until the next step."""
        with self._whole(p, modifier_rank=0):
            if self.stage < 3 or world.rank() == 0:
                p.data.copy_(value)

    def _whole(self, p: nn.Parameter, modifier_rank: int | None = None):
        """Stage 3 keeps a shard of the working copy a rank; inside, `p` is all of it."""
        return _deepspeed().zero.GatheredParameters([p], modifier_rank, enabled=self.stage == 3)

    def _plain_norm(self) -> float:
        """Stage 0 in float32 is bare torch: nothing below us would refuse a gradient that is not finite."""
        grads = [p.grad for _, p in self._trainable() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if norm != norm or norm == float("inf"):
            self.engine.zero_grad()
            raise NonFinite("a gradient is not finite; the step was not taken")
        return norm


def _adam_state(flat: Tensor, updates: int) -> dict[str, Tensor]:
    """What AdamW keeps of a tensor, with moments of zero."""
    moments = {key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in MOMENTS}
    return {"step": torch.tensor(float(updates), device=flat.device), **moments}
