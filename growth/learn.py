"""Growth that is learned: LiGO's maps trained for some steps, then a checkpoint made through them once.

The small weights stay what they are and the big ones are made of them anew in every step, so nothing but the maps is
trained. In memory: the big weights once, the maps, and what a forward pass keeps. The gradient of a big tensor goes on
to the maps, through a second making of that tensor, as soon as it is complete, and is dropped.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.console import bar
from growth.depth import ordered
from growth.errors import UsageError, UserError
from growth.factors import Factors
from growth.families.table import Slot
from growth.ligo import STARTS, Ligo
from growth.maps import Layers
from growth.memory import empty, stored
from growth.operate import PLAIN, Output, Result, delivered, opened, refuse_masks
from growth.pieces import Computed
from growth.ranges import torch_dtype
from growth.reindex import Stream, config_after
from growth.sizes import Sizes, new_sizes
from growth.width import planned

Batch = Mapping[str, Any]  # what the model's forward takes: input_ids, attention_mask, labels [B, T]
LEARNED = ("hidden", "heads", "kv_heads", "ffn")  # the sizes that have maps
STEPS, RATE = 100, 0.001  # published for BERT: 100 and 0.0002, at larger batches


def learn(
    src: Any,
    dst: str | Path | None = None,
    *,
    batches: Iterable[Batch],
    factor: int = 1,
    order: str | Sequence[int] = "stack",
    start: str = "copies",
    steps: int = STEPS,
    lr: float = RATE,
    seed: int = 0,
    output: Output = PLAIN,
    **sizes: int | None,
) -> Any:
    """A deeper checkpoint, a wider one, or both, through maps that are trained on `batches` for some steps (LiGO).

    `factor` and `order` are those of `stack`, sizes (hidden, heads, kv_heads, ffn) those of `widen`: they say what the
    maps start from, in width `copies` or, as published, `random` averages. The loss is that of the model's own head.
    The function changes. A model in memory gives a model.
    """
    asked = Sizes.of(sizes)
    _refuse(asked, factor, order, start, steps, lr)
    checkpoint = opened(src, dst, output)
    refuse_masks("learn", [checkpoint])  # before, not after, training
    growth = Growth.of(checkpoint, factor, order, asked, start, seed)
    losses = trained(growth, batches, steps, lr)
    arguments = {"factor": factor, "order": order if isinstance(order, str) else list(order)}
    arguments |= {**asdict(asked), "start": start, "steps": steps, "lr": lr, "seed": seed}
    maps = {axis: layers.main for axis, layers in growth.layers.items()}  # what each layer is mostly made of
    story = {"maps": maps, "new": growth.new, "preserves": "no", "losses": losses}
    return delivered(Result("learn", arguments, growth.config, growth.stream(), story), dst, output, checkpoint)


def _refuse(asked: Sizes, factor: int, order: Any, start: str, steps: int, lr: float) -> None:
    if other := next((name for name, size in asdict(asked).items() if size and name not in LEARNED), None):
        raise UsageError(f"{other} cannot be learned; `growth widen` does it, before or after")
    if not asked and factor == 1 and order == "stack":
        raise UsageError(f"nothing to learn: say how deep (factor, order) or how wide ({', '.join(LEARNED)})")
    if start not in STARTS:
        raise UsageError(f"start {start!r}: one of {', '.join(STARTS)}")
    if factor < 1 or steps < 1 or not lr > 0:
        raise UsageError(f"factor {factor}, steps {steps}, lr {lr}: at least 1, at least 1, above 0")


@dataclass(frozen=True)
class Growth:
    """A source and its way to a bigger model."""

    checkpoint: Any
    anatomy: Anatomy
    layers: Mapping[str, Layers]
    ligo: Ligo
    config: Mapping[str, Any]

    @classmethod
    def of(
        cls, checkpoint: Any, factor: int, order: str | Sequence[int], asked: Sizes, start: str, seed: int
    ) -> Growth:
        anatomy = dissect(checkpoint)
        family, sizes = anatomy.family, anatomy.sizes
        layers = {axis: Layers.of(ordered(sizes[axis], factor, order)) for axis in family.depth}
        fpi = planned(anatomy, asked, "fpi", 0.0, seed)[0] if asked else Factors(family, sizes, {}, tied=False)
        ligo = Ligo(family, sizes, fpi.maps, fpi.tied, fpi.root, layers, start, seed=seed)
        config = family.resized(config_after(anatomy, layers), new_sizes(fpi))
        return cls(checkpoint, anatomy, layers, ligo, config)

    @cached_property
    def sources(self) -> dict[Slot, list[str | None]]:
        """The stored tensors that each of the bigger model is made of; None: that layer has no such tensor."""
        names = {slot.key: name for slot, name in self.anatomy.places.items()}
        slots = self.anatomy.family.slots(self.config, self.anatomy.prefix).values()
        found = {slot: [names.get((slot.row.name, slot.part, at)) for at in self._old(slot)] for slot in slots}
        return {slot: there for slot, there in found.items() if any(there)}

    def _old(self, slot: Slot) -> list[tuple]:
        """Where on the axes of its name a tensor comes from."""
        depth = self.ligo.depth(slot)
        olds = range(self.anatomy.sizes[depth]) if depth else [0]
        return [tuple((axis, old if axis == depth else i) for axis, i in slot.at) for old in olds]

    def make(self, slot: Slot, dtype: Any, device: Any):
        """A tensor of the bigger model, as a function of the maps."""
        tensors = [name and self.checkpoint.tensor(name).to(device, dtype) for name in self.sources[slot]]
        like = next(tensor for tensor in tensors if tensor is not None)
        neutral = like.new_full(like.shape, float(slot.part == ".weight" and self.anatomy.family.gain == "w"))
        return self.ligo.take(slot, [neutral if tensor is None else tensor for tensor in tensors])

    def stream(self) -> Stream:
        """All of them, one at a time, in the types of the source."""
        for slot, names in self.sources.items():
            entry = self.checkpoint[next(filter(None, names))]
            yield slot.name, Computed(entry.dtype, self.ligo.shape(slot, entry.shape), partial(self._cast, slot, entry))

    def _cast(self, slot: Slot, entry: Any):
        import torch

        dtype, device = self.works_in
        with torch.no_grad():
            return self.make(slot, dtype, device).to("cpu", torch_dtype(entry.dtype))

    @cached_property
    def works_in(self) -> tuple[Any, str]:
        """The type and the device of everything that is computed."""
        import torch

        stored = [torch_dtype(self.checkpoint[name].dtype) for name in self.anatomy.places.values()]
        widest = max(stored, key=lambda dtype: dtype.itemsize)
        return torch.promote_types(widest, torch.float32), "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def new(self) -> dict[str, Any]:
        """What the lineage says of it."""
        units = {" ".join(key): {"from": units.old, "to": len(units)} for key, units in self.ligo.maps.items()}
        return {axis: layers.new for axis, layers in self.layers.items()} | units


class Grown:
    """The bigger model, whose weights are made of the maps, and whose gradient goes to the maps."""

    def __init__(self, growth: Growth):
        self.growth = growth
        self.model = empty(_kind(growth), growth.config, *growth.works_in)
        self.places = {slot.name: slot for slot in growth.sources if slot.name not in self.model.all_tied_weights_keys}
        self.windows = stored(self.model)
        self._refuse_missing()
        for owner, p in self.model.named_parameters():
            p.register_post_accumulate_grad_hook(partial(self._pass_on, owner))

    def _refuse_missing(self) -> None:
        if lost := self.windows.keys() - self.places.keys():
            raise UserError(f"{self.growth.checkpoint.path} lacks {min(lost)} of {type(self.model).__name__}")

    def filled(self):
        """The model with its weights as the maps are now."""
        import torch

        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, (owner, window) in self.windows.items():
                window.of(parameters[owner]).copy_(self.growth.make(self.places[name], *self.growth.works_in))
        return self.model

    def _pass_on(self, owner: str, p: Any) -> None:
        import torch

        for name in self.parts[owner]:
            with torch.enable_grad():
                tensor = self.growth.make(self.places[name], *self.growth.works_in)
            if tensor.requires_grad:
                tensor.backward(self.windows[name][1].of(p.grad))
        p.grad = None

    @cached_property
    def parts(self) -> dict[str, list[str]]:
        """The stored tensors that lie in each parameter."""
        parts = defaultdict(list)
        for name, (owner, _) in self.windows.items():
            parts[owner].append(name)
        return parts


def _kind(growth: Growth) -> type:
    import transformers

    name = next(iter(growth.config.get("architectures") or []), "AutoModel")
    if not hasattr(transformers, name) or name.startswith("Auto"):
        raise UserError(f"{growth.checkpoint.path}: config.json names no class of transformers, so there is no loss")
    return getattr(transformers, name)


def trained(growth: Growth, batches: Iterable[Batch], steps: int, lr: float) -> list[float]:
    """The maps after so many steps, and the loss of the first batch before and after."""
    import torch

    dtype, device = growth.works_in
    growth.ligo.prepare(growth.sources, dtype, device)
    grown = Grown(growth)
    optimizer = torch.optim.AdamW(growth.ligo.entries.values(), lr=lr)
    first, losses = None, []
    with bar(steps, "learning to grow") as advance:
        for batch in _so_many(batches, steps):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            first = batch if first is None else first
            loss = _loss(grown.filled(), batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            advance(1, f"loss {losses[-1]:.4f}")
    with torch.no_grad():
        return [losses[0], float(_loss(grown.filled(), first))]


def _so_many(batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
    given = 0
    for batch in itertools.islice(batches, steps):
        given += 1
        yield batch
    if given < steps:
        raise UserError(f"{steps} steps were asked for, and there are {given} batches")


def _loss(model: Any, batch: Batch):
    """That of the model's own head."""
    import torch

    seen = model(**batch)
    if "loss" in seen:
        return seen["loss"]
    if "labels" in batch and "prediction_logits" in seen:  # with a second head, which has nothing to learn from here
        return torch.nn.functional.cross_entropy(seen["prediction_logits"].flatten(0, 1), batch["labels"].flatten())
    raise UserError(f"{type(model).__name__} gives no loss for {', '.join(batch)}: a head and its labels are needed")
