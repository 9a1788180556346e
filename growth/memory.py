"""A transformers model in memory as a checkpoint: the same mapping, so that every operator works on both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from growth.checkpoint import refuse_not_finite
from growth.files import digest
from growth.pieces import Computed, Piece, made
from growth.ranges import dtype_name


class Memory(Mapping[str, Computed]):
    """`memory[name]` is a tensor to come, `memory.tensor(name)` is the tensor, under the name that it has on disk."""

    path = origin = "the model in memory"
    files: tuple = ()

    def __init__(self, model):
        self.model = model
        self.config: dict[str, Any] = {**model.config.to_dict(), "architectures": [type(model).__name__]}

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        """As `save_pretrained` would write them: tied ones once, experts one by one."""
        from transformers.core_model_loading import revert_weight_conversion

        tensors = revert_weight_conversion(self.model, self.model.state_dict())
        kept = {name: tensors[name].detach() for name in tensors if name not in self.model.all_tied_weights_keys}
        return kept if self._planned else {name: tensor.cpu() for name, tensor in kept.items()}

    @property
    def _planned(self) -> bool:
        """On the meta device: names, types and shapes without values, from which another such model can be planned."""
        return self.model.device.type == "meta"

    def __getitem__(self, name: str) -> Computed:
        tensor = self._tensors[name]
        return Computed(dtype_name(tensor.dtype), tuple(tensor.shape), lambda: tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.values())

    def tensor(self, name: str):
        return self._tensors[name]

    def loaded(self, kind: type, **how: Any):
        """Once more, with other settings."""
        return built(kind, self.config, dict(self), **how)

    def check_values(self) -> None:
        refuse_not_finite(self)

    def header_digest(self) -> str:
        return digest({name: [entry.dtype, entry.shape] for name, entry in self.items()})

    def rebuilt(self, config: Mapping[str, Any], pieces: Iterable[tuple[str, Piece]], kind: type | None = None):
        """Another model, of the same class unless told; it shares no memory with this one."""
        if self._planned:
            return planned(kind or type(self.model), config)
        model = built(kind or type(self.model), config, dict(pieces), dtype=self.model.dtype)
        model.config._experts_implementation = self.model.config._experts_implementation
        return model.to(self.model.device).train(self.model.training)


def built(kind: type, config: Mapping[str, Any], pieces: Mapping[str, Piece], **how: Any):
    """The model of these tensors, loaded as transformers loads a file."""
    state = {name: made(piece).clone() for name, piece in pieces.items()}
    config = kind.config_class.from_dict(dict(config))
    return kind.from_pretrained(None, config=config, state_dict=state, **how)


def planned(kind: type, config: Mapping[str, Any]):
    """The model of a config without storage."""
    import torch

    with torch.device("meta"):
        return kind(kind.config_class.from_dict(dict(config)))


def empty(kind: type, config: Mapping[str, Any], dtype: Any, device: Any):
    """The model of a config with storage, and nothing in it yet."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = kind(kind.config_class.from_dict(dict(config)))
    model.tie_weights()
    model.config._experts_implementation = "eager"  # grouped_mm wants sizes that suit a GPU
    return model.to(device, dtype).eval()


def pieces(model: Any, tensor: Callable[[Any], Any]) -> Iterator[tuple[str, Computed]]:
    """The parameters of a model as they are called in a checkpoint; `tensor` makes one when its turn comes."""
    named = dict(model.named_parameters())
    for name, (owner, window) in stored(model).items():
        p = named[owner]
        yield name, Computed(dtype_name(p.dtype), window.shape, lambda p=p, w=window: w.of(tensor(p)))


def stored(model: Any) -> dict[str, tuple[str, Window]]:
    """Where each tensor of a checkpoint lies in the model: the parameter, and what part of it."""
    return {
        name: (owner, window) for owner, p in model.named_parameters() for name, window in _windows(model, owner, p)
    }


@dataclass(frozen=True)
class Window:
    """A part of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensor):
        return tensor.as_strided(self.shape, self.strides, self.offset)


def _windows(model: Any, owner: str, p: Any) -> Iterator[tuple[str, Window]]:
    """Experts lie in one tensor and are stored one by one: numbers in their place tell which goes where."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    (name, same), *others = revert_weight_conversion(model, {owner: p.data}).items()
    if not others and same.data_ptr() == p.data_ptr():
        yield name, Window(tuple(p.shape), p.stride(), 0)
        return
    numbers = torch.arange(p.numel()).view(p.shape)
    for name, part in revert_weight_conversion(model, {owner: numbers}).items():
        first = int(part.flatten()[0])
        steps = [int(part.select(d, 1).flatten()[0]) - first if n > 1 else 1 for d, n in enumerate(part.shape)]
        window = Window(tuple(part.shape), tuple(steps), first)
        assert torch.equal(window.of(numbers), part), f"{name} is no window of {owner}"
        yield name, window
