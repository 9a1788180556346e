"""One training stage: student, targets, objectives, engine, snapshots, and the loop that joins them."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from distill import extent, hooks, memory, projections, snapshot, sources, watch, world
from distill.attention import choose
from distill.changes import flat
from distill.cost import as_much_as
from distill.engine import Engine, NonFinite, placed
from distill.kinds import NO_INPUT
from distill.language import Language
from distill.lesson import Lesson, freeze_unreachable, named_losses, tokens
from distill.lowrank import refactor
from distill.objectives import Objective
from distill.preflight import micro_batch
from distill.ranking import scales
from distill.ranking.relevance import Relevance
from distill.schedules import Progress, fixed
from distill.sparsity.student import Sparse
from distill.teachers.targets import Targets
from growth import console
from growth.console import count
from growth.errors import UserError
from growth.files import ensure_space, fault, write_text


class Terminated(SystemExit):
    """SIGTERM came, the step was finished and saved; the exit code is the one shells give it."""

    def __init__(self):
        super().__init__(143)


def train(spec, context, directory: Path) -> dict:
    """Run or resume the stage in `directory`; writes start/, snapshots/, log.jsonl and model/, returns its metrics."""
    world.start()
    watch.at(f"{directory.name}, loading")
    memory.forget_peak()
    return Stage(spec, context, directory).run()


@dataclass(frozen=True)
class Spent:
    """What a stage has used so far: steps, tokens without padding, FLOPs of the student and of its teachers."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    teacher_flops: int = 0

    @classmethod
    def of(cls, entry: dict) -> Spent:
        return cls(*(entry[field.name] for field in fields(cls)))


class Stage:
    """What a training stage holds while it runs."""

    def __init__(self, spec, context, directory: Path):
        self.spec, self.context, self.directory = spec, context, directory
        self.seed = context.seed + spec.seed
        self.objectives = named_losses(spec)
        self.micro_batch = micro_batch(context.recipe.engine, spec.optim, world.size())
        self.subject = (Relevance if spec.ranks else Language)(spec, context, directory, self.objectives, self.seed)
        self.hooks, self.cost = spec.hook_values(), self.subject.cost
        self.offset = extent.offset(spec, context)
        self.steps = extent.steps(directory.name, spec, context, self.subject.corpus, self.cost)
        self.student = self.subject.load()
        fault("train.load")
        self.student.train(spec.dropout)
        shapes = projections.shapes(self.objectives, self.cost.student, self.cost.teachers)
        drawn = projections.drawn(shapes, self.seed)
        self.lesson = Lesson(self.student, self.objectives, context.recipe.engine.checkpointing, drawn)
        self.targets = Targets({name: self.subject.source(name) for name in spec.targets}, self.objectives)
        if attend := context.recipe.engine.attention:
            for model in (self.student, *self.targets.models):
                choose(model.base_model, attend)
        self.data = self.subject.data(self.targets, self.micro_batch, self.offset)
        heldout = self.subject.heldout if spec.evaluate_every else None
        self.heldout = heldout and heldout(self.lesson, self.micro_batch, self.steps)
        self.log, self.overridden = directory / "log.jsonl", []

    def run(self) -> dict:
        parts = self.cost.parts
        for hook in self.hooks:
            hook.prepare(self.student, sources.encoder(self.subject.start))
        zero = self.context.recipe.engine.zero
        scales.settle(self.directory, self.objectives, self.student, self.targets, self.data, zero)
        with placed(self.lesson, zero) as run:
            frozen = freeze_unreachable(self.lesson, self.targets, self.data, parts, run)
        self.sparse = Sparse(self.hooks, self.lesson, sources.encoder(self.subject.start), self.seed)
        phases = {f"student.{name}": when for name, when in hooks.updated_in(self.student, parts).items()}
        engine = Engine(self.lesson, self.context.recipe.engine, self.spec.optim, self.micro_batch, phases)
        try:
            self._loop(engine, self._resume(engine))
            self._export(engine)
        finally:
            engine.close()
        return {**self._summary(), "steps": self.steps, "position": self._position(self.steps), "frozen": frozen}

    def _position(self, step: int) -> int:
        """In the stream of rows, after so many steps."""
        return self.data.offset + step * self.spec.optim.batch

    def _summary(self) -> dict:
        """From the log, so that an interrupted run counts whole."""
        entries = [entry for line in self.log.read_text().splitlines() if (entry := json.loads(line))["step"]]
        last, seconds = entries[-1], sum(entry["seconds"] for entry in entries)
        before = as_much_as(self.context.recipe, self.spec.student.origin, extent.spent(self.context, "flops"))
        return {
            "terms": last["terms"],
            "tokens": last["tokens"],
            "flops": last["flops"],
            "flops_before": before,
            "teacher_flops": last["teacher_flops"],
            "teacher_forwards": {
                name: sum(entry["teacher_forwards"][name] for entry in entries) for name in self.spec.targets
            },
            "seconds": round(seconds, 2),
            "tokens_per_second": last["tokens"] / seconds,
            "memory": max(entry["memory"] for entry in entries),
            **self.subject.summary(entries),
            **self.sparse.summary(entries),
            **({"heldout": last["heldout"]} if "heldout" in last else {}),
            **({"overridden": self.overridden} if self.overridden else {}),
        }

    @cached_property
    def of(self) -> dict:
        """What the training state of this stage is of, key by key. How it runs, the engine's part, is none of it."""
        teachers = {reference for target in self.spec.targets.values() for reference in target.models}
        return {
            **flat(self.spec.model_dump(mode="json", by_alias=True, exclude=NO_INPUT)),
            "seed": self.seed,
            "start": sources.weights_sha256(self.subject.start),
            **self.subject.belongs(),
            **{f"teachers.{name}": sources.weights_sha256(self.context.model(name)) for name in sorted(teachers)},
            "corpus": self.subject.corpus.digest,
            "offset": self.offset,
            "steps": self.steps,
        }

    def _resume(self, engine: Engine) -> Spent:
        """Of the latest snapshot, or of a fresh start from the seed checkpoint."""
        found = snapshot.latest(self.directory / "snapshots")
        if found is None:
            averages = [engine.shapes() for _ in self.targets.state()]
            world.first(lambda: self._begin(snapshot.state_bytes(engine.shapes(), *averages)))
            self.sparse.begin(engine, self.steps)
            return Spent()
        manifest = snapshot.restore(found, engine, self.of, self._updates, self.context.accept_changes)
        self.overridden = manifest["overridden"]
        self.data.offset = manifest["cursor"]["position"] - manifest["step"] * self.spec.optim.batch
        self.targets.load(partial(snapshot.beside, found))
        self.sparse.resume(engine, partial(snapshot.beside, found))
        world.first(lambda: _forget_after(self.log, manifest["step"]))
        spent = Spent.of({**manifest["cursor"], "step": manifest["step"]})
        if self.context.accept_changes:
            self._save(engine, spent)  # from here on it is of what it goes on with
        return spent

    def _updates(self, steps: int, phases) -> int:
        """How many of the first steps count for the optimizer: those since it was last made new."""
        ends = steps, refactor.last(self.hooks, steps)
        all_of_them, before = (hooks.updates(self.cost.parts, self.seed, end, phases) for end in ends)
        return all_of_them - before

    def _begin(self, needed: int) -> None:
        """An empty log; and no training whose state could not be kept."""
        ensure_space(self.directory, needed, "a snapshot")
        write_text(self.log, "")

    def _save(self, engine: Engine, spent: Spent) -> None:
        watch.at(f"{self.directory.name}, snapshot of step {spent.step}")
        fault("train.save")
        about = {"cursor": {**asdict(spent), "position": self._position(spent.step)}, "overridden": self.overridden}
        parent, beside = self.directory / "snapshots", self.targets.state() | self.sparse.state(engine)
        snapshot.save(parent, spent.step, engine, self.of, about, self.spec.keep, beside, self.spec.local)

    def _loop(self, engine: Engine, spent: Spent) -> None:
        with (
            world.stop_signal() as stopped,
            console.bar(self.steps, self.directory.name) as advance,
            open(self.log if world.rank() == 0 else os.devnull, "a") as log,
        ):
            advance(spent.step)
            if self.heldout and spent.step == 0:
                print(json.dumps({**asdict(spent), "heldout": self.heldout(engine)}), file=log, flush=True)
            while spent.step < self.steps:
                watch.at(f"{self.directory.name}, step {spent.step + 1}")
                fault("train.step")
                entry, stop = self._step(engine, spent, stopped)
                spent = Spent.of(entry)
                if self.heldout and (spent.step % self.spec.evaluate_every == 0 or spent.step == self.steps):
                    entry["heldout"] = self.heldout(engine)
                print(json.dumps(entry), file=log, flush=True)
                engine.watched(spent.step, entry)
                advance(1, note=_note(entry))
                if stop or (spent.step % self.spec.save_every == 0 and spent.step < self.steps):
                    self._save(engine, spent)
                if stop:
                    raise Terminated()

    def _step(self, engine: Engine, spent: Spent, stopped) -> tuple[dict, bool]:
        """One update; returns its log entry and whether any rank was told to stop."""
        began, step = time.perf_counter(), spent.step
        progress = Progress(step=step, steps=self.steps, tokens=spent.tokens, flops=spent.flops)
        part = hooks.drawn(self.cost.parts, self.seed, step)
        active, before = self._active(progress), self.targets.calls
        self.sparse.before(progress)
        batches = self.data(step, mask.at(progress) if (mask := self.subject.mask) else None)
        counts, real, pairs = self._count(batches, active)
        sums, teaching = self._learn(engine, step, batches, active, counts, part)
        *totals, stop = world.agree(*sums.values(), float(stopped()))
        means = {key: total / counts[key] for key, total in zip(sums, totals, strict=True)}
        self._insist_on_finite(means, step)
        lr = self.spec.lr.at(progress) * refactor.warmth(self.hooks, step)
        norm = engine.step(lr, part)
        refactor.after(self.hooks, engine, self.lesson, step + 1, self.steps)
        sparse = self.sparse.after(engine, replace(progress, step=step + 1), self.cost)
        self.targets.moved(engine, progress)
        seconds = time.perf_counter() - began
        taught = {objective.target for objective in active.values() if objective.target}
        return {
            "step": step + 1,
            "tokens": spent.tokens + int(real),
            "flops": spent.flops + self.cost.step(part),
            "teacher_flops": spent.teacher_flops + self.cost.teaching(taught),
            "lr": lr,
            "grad_norm": norm,
            "terms": means,
            "weights": {name: objective.weight.value for name, objective in active.items()},
            **({"depth": part.depth} if part else {}),
            **sparse,
            "tokens_per_second": real / seconds,
            **({"pairs_per_second": pairs / seconds} if pairs else {}),
            "seconds": seconds,
            "teacher_share": teaching / seconds,
            "teacher_forwards": {name: n - before[name] for name, n in self.targets.calls.items()},
            "memory": memory.peak(),
        }, bool(stop)

    def _active(self, progress: Progress) -> dict[str, Objective]:
        """The objectives that count at this step, as they are there; others, and teachers only for them, do not run."""
        now = {name: fixed(objective, progress) for name, objective in self.objectives.items()}
        active = {name: objective for name, objective in now.items() if objective.weight.value}
        if not active:
            raise UserError(f"{self.directory.name}: every loss has weight 0 at step {progress.step + 1}")
        return active

    def _learn(self, engine: Engine, step: int, batches: list[dict], active: dict, counts: dict, part) -> tuple:
        """Gradients of all micro-batches; returns this rank's sum of every term and the seconds spent in teachers."""
        sums, teaching = Counter(), 0.0
        for number, batch in enumerate(batches):
            place = world.rank() + number * world.size()  # in the step, whatever the number of ranks
            torch.manual_seed(hash((self.seed, step, place)))  # dropout: a function of these three
            asked = time.perf_counter()
            targets = self.targets(batch, active)
            teaching += time.perf_counter() - asked if targets else 0.0
            terms = engine(batch, targets, active, part)
            weights = {key: active[key.split(".")[0]].weight.value for key in terms}
            engine.backward(sum(weights[key] * value / counts[key] for key, value in terms.items()))
            sums.update({key: float(value.detach()) for key, value in terms.items()})
        return sums, teaching

    def _count(self, batches: list[dict], active: dict) -> tuple[dict[str, float], float, float]:
        """The denominators of the whole step, over all micro-batches and ranks, before any forward pass.

        And its tokens and pairs of a query and a passage.
        """
        counts: Counter = Counter()
        for batch in batches:
            counts["tokens"] += tokens(batch)
            counts["pairs"] += len(batch["pairs"]) if "pairs" in batch else 0
            for name, objective in active.items():
                counts.update({f"{name}.{k}": float(n) for k, n in objective.count(batch).items()})
        whole = dict(zip(counts, world.agree(*counts.values()), strict=True))
        read = whole.pop("tokens"), whole.pop("pairs")
        return {key: max(n, 1.0) for key, n in whole.items()}, *read  # nothing to count: the sum is 0, and so the mean

    def _insist_on_finite(self, means: dict[str, float], step: int) -> None:
        bad = {key: value for key, value in means.items() if not math.isfinite(value)}
        if bad:
            name, value = next(iter(bad.items()))
            first = self._position(step)
            raise NonFinite(
                f"{self.directory.name}: {name} is {value} at step {step + 1} (stream positions {first} to "
                f"{first + self.spec.optim.batch - 1}); the weights are those before the step"
            )

    def _export(self, engine: Engine) -> None:
        watch.at(f"{self.directory.name}, export")
        fault("train.export")
        beside = self.sparse.beside(engine)
        engine.lend(lambda masters: self._write(masters, beside))

    def _write(self, masters: dict, beside: list) -> None:
        student = {name.removeprefix("student."): make for name, make in masters.items() if name.startswith("student.")}
        projections.write(self.directory, masters)
        self.subject.export(student, self.directory / "model", *beside)


def _note(entry: dict) -> str:
    short = [name.split(".")[-1] for name in entry["terms"]]
    names = short if len(set(short)) == len(short) else entry["terms"]  # several losses have terms of one name
    terms = "  ".join(f"{name} {value:.4f}" for name, value in zip(names, entry["terms"].values(), strict=True))
    heldout = f"  held-out {entry['heldout']:.4f}" if "heldout" in entry else ""
    pairs = f"  {count(entry['pairs_per_second'])} pairs/s" if "pairs_per_second" in entry else ""
    return f"{terms}{heldout}{pairs}  {count(entry['tokens_per_second'])} tok/s"


def _forget_after(log: Path, step: int) -> None:
    """Drop the entries of steps that will be done again."""
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
    write_text(log, "".join(line + "\n" for line in lines))
