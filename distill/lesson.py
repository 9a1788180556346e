"""One forward pass of training: what the student is taught, by whom, on which rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from distill import corpus, taps, views, world
from distill.corpus.masking import NONE
from distill.forwards import recomputed
from distill.hooks import Part, taking_part
from distill.objectives.protocol import Objective, View
from distill.schedules import Progress, fixed
from distill.taps import Trace
from distill.teachers.alignment import Alignment
from distill.teachers.retelling import retold
from distill.teachers.targets import Targets, traced
from growth.errors import UserError

HELDOUT_ROWS = 256  # of a curve: a few thousand scored tokens, a standard error of some hundredths of a nat
HELDOUT_SEED = 0  # of its masks: a constant of the measure, not of the run


class Lesson(nn.Module):
    """Student, projections and objectives as one module: one forward and one backward pass go through the engine.

    `checkpointing`: the student's blocks run again in backward, for what happens inside them is not kept.
    """

    def __init__(
        self,
        student: nn.Module,
        objectives: dict,
        checkpointing: bool = False,
        projections: nn.ModuleDict | None = None,
    ):
        super().__init__()
        self.student, self.objectives, self.checkpointing = student, objectives, checkpointing
        self.projections = projections or nn.ModuleDict()  # objective -> of what it reads of the student

    def forward(
        self,
        batch: dict,
        targets: dict[tuple[str, View], Trace],
        active: Mapping[str, Objective],
        part: Part | None = None,
    ) -> dict[str, Tensor]:
        """{objective.term: sum over this micro-batch} of the active objectives, as a part of the student meets them.

        `active`: those that count at this step, with their schedules as the numbers that they are there.
        """
        terms = {}
        with self._recomputing(), taking_part(self.student, part):
            for view, reading in views.wanted(self.objectives, active).items():
                seen = traced(self.student, views.of(batch, view), reading.values(), "student")
                for name in reading:
                    taught = targets.get((active[name].target, view))
                    found = active[name].terms(self._projected(name, seen), taught, batch)
                    terms.update({f"{name}.{term}": value for term, value in found.items()})
        return terms

    def _projected(self, name: str, seen: Trace) -> Trace:
        if name not in self.projections:
            return seen
        wanted = self.objectives[name].needs().student
        return replace(seen, taps={tap: self.projections[name](seen.taps[tap]) for tap in wanted})

    def _recomputing(self):
        blocks = taps.layers(self.student.base_model) if self.checkpointing else ()
        return recomputed(block for block, _ in blocks)


def named_losses(spec) -> dict:
    """The objectives of a stage by the name of their terms in logs: `relation_kl`, a second one `relation_kl_2`."""
    seen, named = Counter(), {}
    for name, objective in spec.objectives():
        seen[name] += 1
        named[name if seen[name] == 1 else f"{name}_{seen[name]}"] = objective
    return named


class Data:
    """The rows of every step, for every rank: a pure function of (seed, step).

    `offset`: where its stream begins; `alignments`: of targets that read the same text in ids of their own; `least`:
    how many rows the smallest batch has.
    """

    def __init__(
        self,
        batches: corpus.Batches,
        batch: int,
        micro_batch: int,
        packed: bool,
        device,
        offset: int = 0,
        alignments: Mapping[str, Alignment] = MappingProxyType({}),
        least: int = 1,
    ):
        self.batches, self.batch, self.micro_batch = batches, batch, micro_batch
        self.packed, self.device, self.offset, self.alignments = packed, device, offset, alignments
        self.least = least

    def __call__(self, step: int, mask: float | None = None) -> list[dict]:
        """The micro-batches of this rank, on its device; `mask` is the masking rate of this step."""
        return list(self._some(step, range(world.rank(), self.batch // self.micro_batch, world.size()), mask))

    def whole(self, step: int) -> Iterator[dict]:
        """Those of all ranks."""
        return self._some(step, range(self.batch // self.micro_batch))

    def smallest(self) -> dict:
        """The first rows of the stream, as few as a loss can be of. They are whole: a cache knows no half documents."""
        return self._load(self.offset, self.least, None)

    def _some(self, step: int, numbers: Iterable[int], mask: float | None = None) -> Iterator[dict]:
        first = self.offset + step * self.batch
        return (self._load(first + number * self.micro_batch, self.micro_batch, mask) for number in numbers)

    def _load(self, position: int, rows: int, mask: float | None) -> dict:
        batch = self.batches.at(range(position, position + rows), mask)
        return moved(retold(batch if self.packed else corpus.unpack(batch), self.alignments), self.device)


def moved(batch: dict, device) -> dict:
    """On a device; batches of rankers have batches inside."""
    return {key: moved(x, device) if isinstance(x, dict) else x.to(device) for key, x in batch.items()}


def tokens(batch: dict) -> int:
    """Those that are real, of all texts, each once."""
    texts = [batch["query"], batch["passages"]] if "query" in batch else [batch]
    return sum(int((text["segment_ids"] > 0).sum()) for text in texts)


def freeze_unreachable(
    lesson: Lesson, targets: Targets, data: Data, parts: Sequence[Part] = (), run: Callable | None = None
) -> list[str]:
    """Freeze what no objective reaches (MiniLM: the last output projection and FFN); returns the names.

    Found by one forward pass over the smallest batch (one for each part of the student that may be drawn): what is
    outside the graph has no gradient. Left in, ZeRO's flat partitions would decay it. `run`: what runs the lesson.
    """
    batch, reached = data.smallest(), set()
    active = {name: fixed(objective, Progress(0, 1)) for name, objective in lesson.objectives.items()}
    for part in parts or (None,):
        taught = targets(batch, active)
        total = sum((run or lesson)(batch, taught, active, part).values())
        if not total.requires_grad:
            raise UserError("no loss reaches anything that is trained: the hooks freeze too much")
        reached |= _leaves(total)
    for p in lesson.parameters():
        p.requires_grad_(p in reached)
    return [name.removeprefix("student.") for name, p in lesson.named_parameters() if p not in reached]


def _leaves(total: Tensor) -> set[Tensor]:
    """The parameters in the graph of a tensor."""
    found, seen, ahead = set(), set(), [total.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ahead += [before for before, _ in node.next_functions]
        if hasattr(node, "variable"):  # where gradients are accumulated
            found.add(node.variable)
    return found


class First:
    """The first rows of a stream. Places behind them are there, so that ranks run alike, and count for nothing."""

    def __init__(self, batches: corpus.Batches, rows: int):
        self.batches, self.rows = batches, rows

    def at(self, positions: Iterable[int], mask: float | None = None) -> dict:
        batch, first = self.batches.at(positions, mask), torch.tensor(positions) < self.rows
        classes = {"classes": batch["classes"].where(first, NONE)} if "classes" in batch else {}
        return {**batch, **classes, "labels": batch["labels"].where(first[:, None], NONE)}


class Heldout:
    """The loss of one objective on the same masked rows of held-out text, whenever and wherever it is asked for."""

    def __init__(self, lesson: Lesson, name: str, batches: corpus.Batches, micro_batch: int, packed: bool):
        self.student, self.objective, self.name = lesson.student, lesson.objectives[name], name
        rows, whole = min(HELDOUT_ROWS, len(batches.corpus)), micro_batch * world.size()
        self.data = Data(First(batches, rows), -(-rows // whole) * whole, micro_batch, packed, world.device())

    @torch.no_grad()
    def __call__(self, run: Callable) -> float:
        """`run` is the engine around the lesson. Collective; the student is as it was afterwards."""
        total, count, dropout = 0.0, 0.0, self.student.training
        self.student.eval()
        for batch in self.data(0):
            count += sum(float(n) for n in self.objective.count(batch).values())
            total += sum(float(value) for value in run(batch, {}, {self.name: self.objective}).values())
        self.student.train(dropout)
        total, count = world.agree(total, count)
        return total / max(count, 1.0)
