"""Weights that are dead stay exactly zero in training, whatever the ZeRO stage, the precision and the ranks.

Two things do it (measured exact on ZeRO 0 to 3; multiplying by masks after a step is not): dead weights are zero before
the engine takes the student, and a hook on each weight fills its gradient with zero where it is dead, before anything
else sees it. Then nothing is left to do in a step: of a weight, moments and a gradient that are zero, decay, clipping,
reduction, casts and Adam's 0 / (0 + eps) make zero. A mask that changes clears master, moments and working copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial

import torch
from torch import Tensor, nn

from distill import world
from distill.engine import Engine
from distill.schedules import Progress
from distill.sparsity.held import HOLD
from distill.sparsity.rules import Rule, Static
from growth.bits import packed, unpacked
from growth.errors import UserError

FILE = "masks"  # beside the state in a snapshot


class Masking:
    """Masks of parameters of a module, by name, True where a weight is alive; for one engine.

    One byte a weight on every rank, on ZeRO 3 too, or with `hold: bits` one bit, but where masks change. Begun before
    the engine is made, once it is known what is trained. What no loss reaches keeps its mask, whatever `rule` does to
    others; every `check_every` steps the guard looks.
    """

    def __init__(
        self,
        module: nn.Module,
        masks: Mapping[str, Tensor],
        rule: Rule | None = None,
        check_every: int = 100,
        hold: str = "bools",
    ):
        named = dict(module.named_parameters())
        self.trained = frozenset(name for name in masks if named[name].requires_grad)
        self.dead: MutableMapping[str, Tensor] = HOLD[hold]()
        self.dead.update((name, ~mask.to(world.device())) for name, mask in masks.items())
        self.sizes = {name: mask.numel() for name, mask in masks.items()}
        self.rule, self.check_every = rule or Static(), check_every
        self._gradients: dict[str, Tensor] | None = None
        self._count: dict[str, int] | None = None  # counted anew when masks have changed
        for name in masks:
            _fill(named[name], self.dead[name])
        for name in self.trained:
            # a hook on the tensor: it sees the whole gradient of this rank on every stage, before norm and overflow
            # check do; hooks behind accumulation come too late, and hung on stage 3
            named[name].register_hook(partial(self._alive, name))

    def _alive(self, name: str, gradient: Tensor) -> Tensor:
        if self._gradients is not None:
            self._gradients[name] += gradient
        return gradient.masked_fill(self.dead[name], 0.0)  # fills: infinity or NaN times zero would be NaN

    # In a run

    def before(self, progress: Progress) -> None:
        """A step begins."""
        if self.rule.listens(progress):
            self.listen()

    def after(self, engine: Engine, progress: Progress) -> None:
        """So many steps are done: change what is due, look where it is time. Collective."""
        if self.rule.due(progress):
            dead = {name: self.dead[name] for name in self.dead if name in self.trained}
            self.change(engine, self.rule.changed(progress, lambda: engine.masters(dead), dead, self.heard))
        if progress.step % self.check_every == 0:
            self.check(engine)

    # Changes

    def change(self, engine: Engine, masks: Mapping[str, Tensor]) -> None:
        """Other masks for some parameters; what dies is cleared at once, what comes to life is zero. Collective."""
        dead = {name: ~mask.to(self.dead[name].device) for name, mask in masks.items()}
        self.dead.update(dead)
        self._count = None
        engine.clear({name: dead[name] for name in dead.keys() & self.trained})

    @property
    def listening(self) -> bool:
        return self._gradients is not None

    def listen(self) -> None:
        """From here on keep what the gradient of every weight would be, dead ones too."""
        self._gradients = {name: torch.zeros_like(self.dead[name], dtype=torch.float32) for name in self.trained}

    def heard(self) -> dict[str, Tensor]:
        """The gradients since `listen`, of all ranks together, up to one factor; frees them."""
        found, self._gradients = self._gradients, None
        return {name: world.total(found[name]) for name in sorted(found)}

    # Guard

    def check(self, engine: Engine) -> None:
        """Refuse weights that are not zero where they are dead, by name. Collective."""
        for copy, stream in (("master", engine.masters), ("working copy", engine.working)):
            counts = {name: int((self.dead[name] & weight.ne(0)).sum()) for name, weight in stream(self.trained)}
            counts = dict(zip(counts, world.agree(*counts.values()), strict=True))  # raised on all ranks, if on one
            name, most = max(counts.items(), key=lambda item: item[1], default=(None, 0))
            if most:
                others, most = sum(n > 0 for n in counts.values()) - 1, math.ceil(most / world.size())
                more = f" (and {others} more such tensors)" if others else ""
                raise UserError(
                    f"{name}: {most} weights that its mask says are dead are not zero in the {copy}{more}; something "
                    "wrote them behind the masks' back: an optimizer that mixes weights, or code of one's own"
                )

    # Snapshots

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a snapshot keeps: one bit a weight."""
        masks = {name: packed(~dead.cpu()) for name, dead in self.dead.items()}
        return {FILE: masks} if masks else {}

    def load(self, read: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Put back what `state` gave; `read` takes the name of a file."""
        bits = read(FILE) if self.dead else {}
        if bits.keys() != self.dead.keys():
            raise UserError(f"the snapshot has masks for {len(bits)} tensors, this run for {len(self.dead)}")
        for name, dead in self.dead.items():
            self.dead[name] = ~unpacked(bits[name], tuple(dead.shape)).to(dead.device)
        self._count = None

    # Numbers

    @property
    def alive(self) -> dict[str, int]:
        """Live weights of every mask."""
        if self._count is None:
            self._count = {name: self.sizes[name] - int(dead.sum()) for name, dead in self.dead.items()}
        return self._count

    @property
    def masked(self) -> int:
        """Weights that have a mask."""
        return sum(self.sizes.values())


@torch.no_grad()
def _fill(p: nn.Parameter, dead: Tensor) -> None:
    dead = dead.to(p.device)
    if bool((p.ne(0) & dead).any()):  # what is mapped from a file stays there where nothing is written
        p.masked_fill_(dead, 0.0)
