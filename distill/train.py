"""One training stage: student, targets, objectives, engine, snapshots, and the loop that joins them."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from distill import corpus, layout, models, snapshot, sources, world
from distill.engine import Engine, NonFinite
from distill.lesson import Data, Lesson, Targets, freeze_unreachable, named_losses
from distill.preflight import micro_batch
from distill.recipe import NO_INPUT
from distill.schedules import Progress
from growth import console
from growth.errors import UserError
from growth.files import digest, ensure_space, fault, write_text


class Terminated(SystemExit):
    """SIGTERM came, the step was finished and saved; the exit code is the one shells give it."""

    def __init__(self):
        super().__init__(143)


def train(spec, context, directory: Path) -> dict:
    """Run or resume the stage in `directory`; writes start/, snapshots/, log.jsonl and model/, returns its metrics."""
    world.start()
    return Stage(spec, context, directory).run()


class Stage:
    """What a training stage holds while it runs."""

    def __init__(self, spec, context, directory: Path):
        self.spec, self.context, self.directory = spec, context, directory
        self.objectives = named_losses(spec)
        headed = next((o for o in self.objectives.values() if o.needs().head), None)
        self.head, self.mask = (headed.needs().head, headed.mask) if headed else (None, None)
        self.micro_batch = micro_batch(context.recipe.engine, spec.optim, world.size())
        self.start = world.first(self._make_start) or directory / "start"
        self.corpus = corpus.open(context.corpus(spec.data), "train")
        self.steps = total_steps(spec.stop, spec.optim.batch, self.corpus)
        self.student = models.load(self.start, self.head)
        self.student.train(spec.dropout)
        self.targets = Targets({name: self._load_target(name) for name in spec.targets}, self.objectives)
        self.data = self._data()
        self.log = directory / "log.jsonl"

    def _make_start(self) -> Path:
        start = self.directory / "start"
        if not start.exists():
            corpus = self.context.corpus(self.spec.corpus)
            models.seed_checkpoint(self.spec.student, self.context.model, start, self.head, self.context.seed, corpus)
        return start

    def _load_target(self, name: str) -> nn.Module:
        """With its head if an objective asks for its logits."""
        recipe, target = self.context.recipe, self.spec.targets[name]
        needs = [objective.needs() for objective in self.objectives.values() if objective.target == name]
        head = next((need.head for need in needs if need.target_head), None)
        asked = recipe.models[target.from_].dtype if target.from_ in recipe.models else None
        dtype = asked or {"fp32": "float32", "bf16": "bfloat16"}[recipe.engine.precision]
        model = models.load(self.context.model(target.from_), head, getattr(torch, dtype))
        return models.freeze(model).to(world.device())

    def _data(self) -> Data:
        together = [self.student, *self.targets.models.values()]
        packed = all(layout.packable(model.config) for model in together)
        batches = corpus.Batches(self.corpus, self.context.seed, self.head)
        return Data(batches, self.spec.optim.batch, self.micro_batch, packed, world.device())

    def run(self) -> dict:
        lesson = Lesson(self.student, self.objectives)
        frozen = freeze_unreachable(lesson, self.targets, self.data)
        engine = Engine(lesson, self.context.recipe.engine, self.spec.optim, self.micro_batch)
        try:
            self._loop(engine, *self._resume(engine))
            self._export(engine)
        finally:
            engine.close()
        return {**self._summary(), "steps": self.steps, "frozen": frozen}

    def _summary(self) -> dict:
        """From the log, so that an interrupted run counts whole."""
        entries = [json.loads(line) for line in self.log.read_text().splitlines()]
        tokens, seconds = entries[-1]["tokens"], sum(entry["seconds"] for entry in entries)
        return {
            "terms": entries[-1]["terms"],
            "tokens": tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": tokens / seconds,
        }

    def belongs(self) -> dict:
        """What the training state of this stage is of; the engine's part may differ when it is read back."""
        engine = self.context.recipe.engine
        return {
            "recipe_digest": digest(self.spec.model_dump(mode="json", by_alias=True, exclude=NO_INPUT)),
            "seed": self.context.seed,
            "student_digest": sources.weights_sha256(self.start),
            "teacher_digests": {
                name: sources.weights_sha256(self.context.model(t.from_)) for name, t in self.spec.targets.items()
            },
            "corpus_digest": self.corpus.digest,
            "stage": engine.zero,
            "ranks": world.size(),
            "precision": engine.precision,
        }

    def _resume(self, engine: Engine) -> tuple[int, int]:
        """(steps done, tokens seen): of the latest snapshot, or of a fresh start from the seed checkpoint."""
        found = snapshot.latest(self.directory / "snapshots")
        if found is None:
            world.first(lambda: self._begin(snapshot.state_bytes(engine.shapes())))
            return 0, 0
        manifest = snapshot.restore(found, engine, self.belongs())
        world.first(lambda: _forget_after(self.log, manifest["step"]))
        return manifest["step"], manifest["cursor"]["tokens"]

    def _begin(self, needed: int) -> None:
        """An empty log; and no training whose state could not be kept."""
        ensure_space(self.directory, needed, "a snapshot")
        write_text(self.log, "")

    def _save(self, engine: Engine, step: int, tokens: int) -> None:
        cursor = {"position": step * self.spec.optim.batch, "tokens": tokens}
        snapshot.save(self.directory / "snapshots", step, engine, self.belongs(), cursor, self.spec.keep)

    def _loop(self, engine: Engine, step: int, tokens: int) -> None:
        with (
            world.stop_signal() as stopped,
            console.bar(self.steps, self.directory.name) as advance,
            open(self.log if world.rank() == 0 else os.devnull, "a") as log,
        ):
            advance(step)
            while step < self.steps:
                fault("train.step")
                entry, stop = self._step(engine, step, tokens, stopped)
                step, tokens = entry["step"], entry["tokens"]
                print(json.dumps(entry), file=log, flush=True)
                advance(1, note=_note(entry))
                if stop or (step % self.spec.save_every == 0 and step < self.steps):
                    self._save(engine, step, tokens)
                if stop:
                    raise Terminated()

    def _step(self, engine: Engine, step: int, tokens: int, stopped) -> tuple[dict, bool]:
        """One update; returns its log entry and whether any rank was told to stop."""
        began = time.perf_counter()
        torch.manual_seed(hash((self.context.seed, step, world.rank())))  # dropout: a function of these three
        progress = Progress(step=step, steps=self.steps, tokens=tokens)
        weights = self._weights(progress)
        batches = self.data(step, self.mask.at(progress) if self.mask else None)
        counts, real = self._count(batches, weights)
        sums, teaching = self._learn(engine, batches, weights, counts)
        *totals, stop = world.agree(*sums.values(), float(stopped()))
        means = {key: total / counts[key] for key, total in zip(sums, totals, strict=True)}
        self._insist_on_finite(means, step)
        lr = self.spec.lr.at(progress)
        norm = engine.step(lr)
        seconds = time.perf_counter() - began
        return {
            "step": step + 1,
            "tokens": tokens + int(real),
            "lr": lr,
            "grad_norm": norm,
            "terms": means,
            "weights": weights,
            "tokens_per_second": real / seconds,
            "seconds": seconds,
            "teacher_share": teaching / seconds,
            "memory": memory(),
        }, bool(stop)

    def _weights(self, progress: Progress) -> dict[str, float]:
        """Of the objectives that count at this step; the others, and teachers that only they need, do not run."""
        weights = {name: objective.weight.at(progress) for name, objective in self.objectives.items()}
        active = {name: weight for name, weight in weights.items() if weight}
        if not active:
            raise UserError(f"{self.directory.name}: every loss has weight 0 at step {progress.step + 1}")
        return active

    def _learn(self, engine: Engine, batches: list[dict], weights: dict, counts: dict) -> tuple[dict, float]:
        """Gradients of all micro-batches; returns this rank's sum of every term and the seconds spent in teachers."""
        sums, teaching = Counter(), 0.0
        for batch in batches:
            asked = time.perf_counter()
            targets = self.targets(batch, list(weights))
            teaching += time.perf_counter() - asked
            terms = engine(batch, targets, list(weights))
            engine.backward(sum(weights[key.split(".")[0]] * value / counts[key] for key, value in terms.items()))
            sums.update({key: float(value.detach()) for key, value in terms.items()})
        return sums, teaching

    def _count(self, batches: list[dict], active: Iterable[str]) -> tuple[dict[str, float], float]:
        """The denominators of the whole step, over all micro-batches and ranks, before any forward pass; its tokens."""
        counts: Counter = Counter()
        for batch in batches:
            counts["tokens"] += int((batch["segment_ids"] > 0).sum())
            for name in active:
                counts.update({f"{name}.{k}": float(n) for k, n in self.objectives[name].count(batch).items()})
        whole = dict(zip(counts, world.agree(*counts.values()), strict=True))
        tokens = whole.pop("tokens")
        return {key: max(n, 1.0) for key, n in whole.items()}, tokens  # nothing to count: the sum is 0, and so the mean

    def _insist_on_finite(self, means: dict[str, float], step: int) -> None:
        bad = {key: value for key, value in means.items() if not math.isfinite(value)}
        if bad:
            name, value = next(iter(bad.items()))
            first = step * self.spec.optim.batch
            raise NonFinite(
                f"{self.directory.name}: {name} is {value} at step {step + 1} (stream positions {first} to "
                f"{first + self.spec.optim.batch - 1}); the weights are those before the step"
            )

    def _export(self, engine: Engine) -> None:
        """The student as an ordinary directory: trained masters, everything else as it was at the start."""
        trained = {name.removeprefix("student."): tensor for name, tensor in engine.state("master")}
        world.first(lambda: models.export(self.start, trained, self.directory / "model"))


def total_steps(stop, batch: int, data) -> int:
    """How many updates `stop` means on this corpus."""
    if stop.steps is not None:
        return stop.steps
    rows = stop.epochs * len(data) if stop.epochs is not None else stop.tokens / data.tokens * len(data)
    return max(math.ceil(rows / batch), 1)


def memory() -> int:
    """Peak bytes: of the device's allocator on CUDA, of the process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _note(entry: dict) -> str:
    terms = "  ".join(f"{name.split('.')[-1]} {value:.4f}" for name, value in entry["terms"].items())
    return f"{terms}  {console.count(entry['tokens_per_second'])} tok/s"


def _forget_after(log: Path, step: int) -> None:
    """Drop the entries of steps that will be done again."""
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
    write_text(log, "".join(line + "\n" for line in lines))
