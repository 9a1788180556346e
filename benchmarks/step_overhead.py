"""What a step of `distill run` costs over a bare torch loop of the same arithmetic, in alternating pairs.

    OMP_NUM_THREADS=2 python benchmarks/step_overhead.py [--pairs 30] [--rows 16]

The main job: all-MiniLM-L6-v2 teaches three of its layers by relations of queries, keys and values, 16 rows of 128
tokens a step, ZeRO 0, one rank, float32. Ours is a step of the loop as it is, from rows on disk to the line of the log.
The bare loop has its batches ready and calls tap, relation_kl, clip_grad_norm_ and AdamW. Both begin with the same
student; their weights are compared after the last pair, and nothing is printed if they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

import distill
from distill import layout, recipe
from distill.context import Context
from distill.objectives import relation_kl
from distill.schedules import Progress
from distill.train import Spent, Stage

TAPS = [("query", -1), ("key", -1), ("value", -1)]


class Bare:
    """The loop that people write."""

    def __init__(self, stage: Stage):
        self.stage, self.spec = stage, stage.spec
        self.student, (self.teacher,) = stage.subject.load(), stage.targets.models
        learns = {name for name, p in stage.student.named_parameters() if p.requires_grad}
        for name, p in self.student.named_parameters():
            p.requires_grad_(name in learns)
        learnt = [p for p in self.student.parameters() if p.requires_grad]
        decay = [p for p in learnt if p.dim() > 1], [p for p in learnt if p.dim() == 1]
        optim, (objective,) = self.spec.optim, stage.objectives.values()
        self.heads = objective.heads
        self.optimizer = torch.optim.AdamW(
            [{"params": decay[0], "weight_decay": optim.weight_decay}, {"params": decay[1], "weight_decay": 0.0}],
            betas=optim.betas, eps=optim.eps, fused=True,
        )  # fmt: skip
        self.learnt = learnt

    def step(self, batch: dict, lr: float) -> None:
        with torch.no_grad(), distill.tap(self.teacher, TAPS) as taught:
            self.teacher.base_model(**layout.inputs(self.teacher, batch))
        with distill.tap(self.student, TAPS) as learns:
            self.student.base_model(**layout.inputs(self.student, batch))
        loss = sum(relation_kl(taught[tap], learns[tap], batch["segment_ids"], self.heads) for tap in TAPS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learnt, self.spec.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()


class Timed(Stage):
    """A stage whose loop takes turns with a bare one."""

    pairs: int

    def _loop(self, engine, spent: Spent) -> None:
        bare, self.seconds = Bare(self), {"ours": [], "bare": []}
        with open(self.log, "a") as log:
            for step in range(self.pairs + 2):
                (batch,) = self.data(step)
                entry = {}

                def ours(spent=spent, entry=entry):
                    entry.update(self._step(engine, spent, lambda: False)[0])
                    print(json.dumps(entry), file=log, flush=True)

                def other(batch=batch, step=step):
                    bare.step(batch, self.spec.lr.at(Progress(step=step, steps=self.steps)))

                for name, work in (("ours", ours), ("bare", other))[:: 1 if step % 2 else -1]:
                    self.seconds[name].append(timed(work))
                spent = Spent.of(entry)
        masters, start = dict(engine.masters()), dict(self.subject.load().named_parameters())
        learnt = [(p, masters[f"student.{n}"], start[n]) for n, p in bare.student.named_parameters() if p.requires_grad]
        self.apart = max(float((ours - p).abs().max()) for p, ours, _ in learnt)
        self.moved = max(float((ours - before).abs().max()) for _, ours, before in learnt)

    def _export(self, engine) -> None:
        pass


def timed(work) -> tuple[float, float]:
    """(CPU seconds, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--rows", type=int, default=16)
    arguments = parser.parse_args()
    keys = [f"student.train.optim.batch={arguments.rows}", "engine.precision=fp32", "engine.zero=0"]
    read = recipe.load("minilm", keys)
    spec = next(stage.train for stage in read.stages if stage.id == "student")
    with tempfile.TemporaryDirectory() as out:
        directory = Path(out) / "student"
        directory.mkdir()
        stage = Timed(spec, Context(read, Path(out), read.seed), directory)
        stage.pairs = arguments.pairs
        stage.run()
    report(stage)


def report(stage: Timed) -> None:
    if not stage.apart < 0.02 * stage.moved:  # Adam's first steps blow up what rounding does to a small gradient
        raise SystemExit(f"not the same loop: weights are {stage.apart:.1e} apart and have moved by {stage.moved:.1e}")
    tokens = stage.spec.optim.batch * stage.subject.corpus.length
    print(f"{tokens} tokens a step, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; "
          f"weights {stage.apart:.1e} apart, moved by {stage.moved:.1e}")  # fmt: skip
    for what, at in (("CPU", 0), ("wall", 1)):
        ours, bare = ([spent[at] for spent in stage.seconds[name][2:]] for name in ("ours", "bare"))
        low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, bare, strict=True)], n=4)
        print(f"{what} seconds: bare {statistics.median(bare):.4f}, ours {statistics.median(ours):.4f}; ratio, median "
              f"of {len(ours)} pairs {middle:.3f} (quartiles {low:.3f} to {high:.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
