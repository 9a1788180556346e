"""The masks of a student in a training stage: from its start through its log to its export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill import loading
from distill.cost import Cost
from distill.engine import Engine
from distill.schedules import Progress
from distill.sparsity import semi_structured, stored
from distill.sparsity.choosing import Groups
from distill.sparsity.masking import Masking
from distill.sparsity.rules import Prune, Rewire, Rule
from distill.sparsity.semi_structured import Product
from distill.sparsity.stored import Held
from distill.sparsity.values import Mask, Sparsify
from growth import families
from growth.bits import group
from growth.errors import UserError
from growth.gradual import average

KEEP = "hooks: [{mask: {}}] keeps them; `densify` in a grow stage, or `growth densify`, drops them"


class Sparse:
    """Without a hook that keeps masks there are none, and nothing is done."""

    def __init__(
        self, hooks: Sequence[Any], lesson: nn.Module, start: Path, seed: int, product: Product = semi_structured.on_gpu
    ):
        hook = next((hook for hook in hooks if isinstance(hook, Mask | Sparsify)), None)
        self.student, held = lesson.student, _held(hook, start)
        self.names = _names(self.student, held)
        self.patterns = {name: (held[inside].pattern, held[inside].dim) for name, inside in self.names.items()}
        masks = {name: held[inside].alive for name, inside in self.names.items()}
        how = {"check_every": hook.check_every, "hold": hook.hold} if hook else {}
        self.masking = Masking(lesson, masks, self._rule(hook, seed), **how)
        self.parameters = sum(p.numel() for p in self.student.parameters())  # before ZeRO 3 takes them apart
        self.used = _used(self.student, lesson, self.names)
        self.skips = isinstance(hook, Mask) and hook.skips
        if self.skips:
            semi_structured.refuse_misfits(lesson, self.names)
            semi_structured.place(lesson, self.names, product)

    def _rule(self, hook: Mask | Sparsify | None, seed: int) -> Rule | None:
        if not isinstance(hook, Sparsify):
            return None
        if hook.how == "magnitude":
            return Prune(hook)
        patterns = self.patterns.items()
        return Rewire(hook, seed, {name: Groups(dim, group(how)[1]) for name, (how, dim) in patterns if how})

    # In a run; all of these are collective

    def begin(self, engine: Engine, steps: int) -> None:
        """Before the first step."""
        self.masking.after(engine, Progress(0, steps))

    def resume(self, engine: Engine, read: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Instead of that; `read` as for `Masking.load`."""
        self.masking.load(read)
        self.masking.check(engine)

    def before(self, progress: Progress) -> None:
        """A step begins."""
        self.masking.before(progress)

    def after(self, engine: Engine, progress: Progress, cost: Cost) -> dict[str, Any]:
        """It is done; what its log entry says of it. Then masks change, if they do."""
        told = self.told(cost) if self.names else {}
        self.masking.after(engine, progress)
        return told

    def state(self, engine: Engine) -> dict[str, dict[str, Tensor]]:
        """For a snapshot, once it is sure that all is as the masks say."""
        self.masking.check(engine)
        return self.masking.state()

    def beside(self, engine: Engine) -> list[Callable[[Path], None]]:
        """What writes the masks beside the export, once it is sure likewise; nothing where there are none."""
        self.masking.check(engine)
        return [self._write] if self.names else []

    def _write(self, directory: Path) -> None:
        dead = self.masking.dead
        stored.write(directory, {own: Held(~dead[name], *self.patterns[name]) for name, own in self.names.items()})

    # Numbers

    def told(self, cost: Cost) -> dict[str, Any]:
        """What the step would cost if dead weights cost nothing. They do cost where what is executed is dense."""
        dead = {name: size - self.masking.alive[name] for name, size in self.masking.sizes.items()}
        saved = sum(self.used[name] * n for name, n in dead.items()) * cost.tokens
        passes = 4 if self.masking.listening else 6  # of a gradient that is wanted dense nothing is saved
        return {
            "density": 1 - sum(dead.values()) / self.masking.masked,
            "density_all": 1 - sum(dead.values()) / self.parameters,
            "step_flops_modelled": cost.step() + cost.skipped - round((passes + 6 * (cost.passes[None] - 1)) * saved),
        }

    def summary(self, entries: Sequence[dict]) -> dict[str, Any]:
        """For the metrics of the stage. FLOPs that are modelled are no time saved; what is executed sparse is told."""
        if not self.names:
            return {}
        alive = sum(self.masking.alive.values())
        return {
            "sparsity": {
                "density": alive / self.masking.masked,
                "density_all": 1 - (self.masking.masked - alive) / self.parameters,
                "density_mean": average((1, entry["density"]) for entry in entries),
                "flops_modelled": sum(entry["step_flops_modelled"] for entry in entries),
                "executed_sparse": self.skips and semi_structured.PATTERN,
            }
        }


def _held(hook: Mask | Sparsify | None, start: Path) -> dict[str, Held]:
    if stored.is_sparse(start):
        if hook is None:
            raise UserError(f"{start} has masks, and nothing keeps them while it trains: {KEEP}")
        held = stored.read(start)
    elif isinstance(hook, Sparsify) and hook.how == "magnitude":
        held = stored.dense(start, hook.scope)
    elif hook is not None:
        raise UserError(f"{start} has no masks to keep; `sparsify` in a grow stage, or `growth sparsify`, draws them")
    else:
        return {}
    if isinstance(hook, Sparsify) and hook.how == "magnitude" and any(one.pattern for one in held.values()):
        raise UserError(f"{start}: the largest weights of all keep no pattern; set and rigl do")
    return held


def _names(student: nn.Module, held: dict[str, Held]) -> dict[str, str]:
    """{name in the lesson: name inside the model} of what has a mask."""
    if not held:
        return {}
    inside = {f"student.{name}": loading.inside(name, student) for name, _ in student.named_parameters()}
    return {name: own for name, own in inside.items() if own in held}


def _used(student: nn.Module, lesson: nn.Module, names: dict[str, str]) -> dict[str, float]:
    """How much of a matrix a token meets: of a stack of experts, as many as it is sent to."""
    if not names:
        return {}
    named, config = dict(lesson.named_parameters()), student.config.to_dict()
    experts = families.of(config).sizes_of(config).get("experts")
    return {n: student.config.num_experts_per_tok / experts if experts and named[n].dim() == 3 else 1.0 for n in names}
