"""What a hook is: something that changes during training. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill.schedules import Value

if TYPE_CHECKING:
    from torch import nn

    from distill.models import Facts
    from distill.objectives import Objective


@dataclass(frozen=True)
class Part:
    """What of a student takes part in a step: its first `depth` blocks run, those from `first` on are updated."""

    depth: int
    first: int = 0


class Hook(Value):
    """A frozen value whose fields are recipe keys; what it does not say of itself is as it is without any."""

    def check(self, student: Facts, objectives: Iterable[Objective]) -> list[str]:
        """Every reason why this cannot work, before weights are loaded."""
        return []

    def prepare(self, student: nn.Module, start: Path) -> None:
        """Once, before the engine has the student; `start` is the checkpoint it was loaded from."""

    def parts(self) -> tuple[Part, ...]:
        """What may take part in a step, one of which is drawn for each; (): all of the student, always."""
        return ()
