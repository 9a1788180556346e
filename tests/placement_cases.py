"""A student of a teacher whose weights lie in shares on all ranks, against one whose teacher is whole on each of them.

Asked by engine_cases.py, in its process, for one ZeRO stage of the student.
"""

from __future__ import annotations

from types import SimpleNamespace

import tiny
import torch
from engine_cases import BATCH, OPTIM, Rows, Run, relative

from distill.engine import Engine, Shared
from distill.lesson import Data, Lesson, freeze_unreachable
from distill.models import freeze
from distill.objectives import OBJECTIVES
from distill.teachers.targets import Online, Reading, Targets

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Placed(Run):
    """It learns from taps and from the head of its teacher."""

    def __init__(self, stage: int, precision: str, shared: bool):
        losses = {
            "relation_kl": OBJECTIVES["relation_kl"](target="t", relations=["qk", "vv"], heads=6, teacher_layer=-2),
            "divergence": OBJECTIVES["divergence"](target="t", objective="mlm"),
        }
        teacher, dtype = freeze(tiny.model("bert", "mlm", seed=2)), DTYPES[precision]
        read = Shared(Reading(teacher), dtype) if shared else None
        assert (sum(p.numel() for p in teacher.parameters()) == 0) == shared
        for p in teacher.parameters() if not shared else ():
            p.data = p.data.to(dtype)
        self.lesson = Lesson(tiny.model("bert", "mlm", seed=1), losses)
        self.targets = Targets({"t": Online(teacher, read=read)}, losses)
        self.data = Data(Rows(), BATCH, 2, True, torch.device("cpu"))
        freeze_unreachable(self.lesson, self.targets, self.data)
        spec, optim = SimpleNamespace(zero=stage, precision=precision, deepspeed={}), SimpleNamespace(**OPTIM)
        self.engine = Engine(self.lesson, spec, optim, 2)

    def told(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the loss of a step, a tenth of its gradient)."""
        loss = torch.tensor(self.step(0), dtype=torch.float64)
        slopes = torch.cat([tensor.flatten() for _, tensor in self.engine.state("exp_avg")])
        self.engine.close()
        return loss, slopes


def cases(stage: int) -> dict[str, list[float]]:
    """{precision: how far apart losses are, and gradients}."""
    found = {}
    for precision in DTYPES:
        pairs = zip(*(Placed(stage, precision, shared).told() for shared in (True, False)), strict=True)
        found[precision] = [relative(one, other) for one, other in pairs]
    return found
