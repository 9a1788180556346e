"""Linear maps of a student's hidden states into the width of a teacher's: one a loss, shared by its layers.

They learn beside the student, are kept in its snapshots and lie in a file beside its exported model, which never holds
them. Every stage draws its own anew: they are of one student and one teacher. No torch at import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill.objectives.states import Hidden
from growth.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.models import Facts
    from distill.objectives.protocol import Objective

FILE = "projections.safetensors"


def shapes(objectives: Mapping[str, Objective], student: Facts, teachers: Mapping[str, tuple[Facts, ...]]) -> dict:
    """{objective: (width of the student, of its teacher)} where a loss has one."""
    return {
        name: (student.widths["hidden"], teachers[objective.target][0].widths["hidden"])
        for name, objective in objectives.items()
        if isinstance(objective, Hidden) and objective.project
    }


def drawn(shapes: Mapping[str, tuple[int, int]], seed: int) -> nn.ModuleDict:
    """Random ones, each from (seed, its name)."""
    from torch import nn

    from distill.loading import seeded

    made = nn.ModuleDict()
    for name, (width, into) in shapes.items():
        digest = hashlib.sha256(f"{seed}:projections.{name}".encode()).digest()
        with seeded(int.from_bytes(digest[:7], "little")):
            made[name] = nn.Linear(width, into, bias=False)
    return made


def write(stage: Path, trained: Mapping[str, Callable[[], Tensor]]) -> None:
    """Those among the trained tensors of a lesson, into the directory of its stage; no file where there are none."""
    from safetensors.torch import save

    own = {name: make for name, make in trained.items() if name.startswith("projections.")}
    if own:
        write_bytes(stage / FILE, [save({name.removeprefix("projections."): make() for name, make in own.items()})])
