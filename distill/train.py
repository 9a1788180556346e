"""One training stage: student, targets, objectives, engine, snapshots, and the loop that joins them."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import corpus, layout, models, snapshot, sources, world
from distill.engine import Engine, NonFinite
from distill.inputs import NO_INPUT
from distill.objectives import scored
from distill.schedules import Progress
from distill.taps import Trace, trace
from growth import console
from growth.errors import UserError
from growth.files import digest, fault, write_text

PROBE = 16  # tokens a row are enough to see which parameters a loss reaches


class Terminated(SystemExit):
    """SIGTERM came, the step was finished and saved; the exit code is the one shells give it."""

    def __init__(self):
        super().__init__(143)


class Lesson(nn.Module):
    """Student and objectives as one module, so that one forward pass and one backward pass go through the engine."""

    def __init__(self, student: nn.Module, objectives: dict):
        super().__init__()
        self.student = student
        self.objectives = objectives

    def forward(self, batch: dict, targets: dict[str, Trace], active: list[str]) -> dict[str, Tensor]:
        """{objective.term: sum over this micro-batch} of the active objectives."""
        seen = _trace(self.student, batch, [self.objectives[name].needs() for name in active], "student")
        return {
            f"{name}.{term}": value
            for name in active
            for term, value in self._terms(name, seen, targets, batch).items()
        }

    def _terms(self, name: str, seen: Trace, targets: dict[str, Trace], batch: dict) -> dict[str, Tensor]:
        objective = self.objectives[name]
        return objective.terms(seen, targets.get(objective.target), batch)


def _trace(model: nn.Module, batch: dict, needs: list, side: str) -> Trace:
    wanted = sorted({tap for need in needs for tap in getattr(need, side)})
    heads = {need.head for need in needs if need.head} if side == "student" else set()
    rows = scored(batch["labels"], batch["segment_ids"], causal="causal" in heads)[0] if heads else None
    return trace(model, batch, wanted, rows)


@dataclass
class Targets:
    """The frozen models of a stage and what of each its objectives want."""

    models: dict[str, nn.Module]
    objectives: dict

    @torch.no_grad()
    def __call__(self, batch: dict, active: list[str]) -> dict[str, Trace]:
        """A target is run only if an active objective asks for it."""
        needs: dict[str, list] = {}
        for name in active:
            if target := self.objectives[name].target:
                needs.setdefault(target, []).append(self.objectives[name].needs())
        return {target: _trace(self.models[target], batch, wanted, "target") for target, wanted in needs.items()}


def named_losses(spec) -> dict:
    """The objectives of a stage by the name of their terms in logs: `relation_kl`, a second one `relation_kl_2`."""
    seen, named = Counter(), {}
    for name, objective in spec.objectives():
        seen[name] += 1
        named[name if seen[name] == 1 else f"{name}_{seen[name]}"] = objective
    return named


class Data:
    """The rows of every step, for every rank: a pure function of (seed, step)."""

    def __init__(self, batches: corpus.Batches, batch: int, micro_batch: int, packed: bool, device):
        self.batches, self.batch, self.micro_batch = batches, batch, micro_batch
        self.packed, self.device = packed, device

    def __call__(self, step: int, mask: float | None = None) -> list[dict]:
        """The micro-batches of this rank, on its device; `mask` is the masking rate of this step."""
        mine = range(world.rank(), self.batch // self.micro_batch, world.size())
        return [self._load(step * self.batch + m * self.micro_batch, mask) for m in mine]

    def _load(self, position: int, mask: float | None) -> dict:
        batch = self.batches.at(range(position, position + self.micro_batch), mask)
        batch = batch if self.packed else corpus.unpack(batch)
        return {key: value.to(self.device) for key, value in batch.items()}


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
        self.micro_batch = micro_batch(context.recipe.engine, spec.optim)
        self.start = world.first(self._make_start) or directory / "start"
        self.corpus = corpus.open(context.corpus(spec.data), "train")
        self.steps = total_steps(spec.stop, spec.optim.batch, self.corpus)
        self.student = models.load(self.start, self.head)
        self.student.train(spec.dropout)
        self.targets = Targets({name: self._load_target(t) for name, t in spec.targets.items()}, self.objectives)
        self.data = self._data()
        self.log = directory / "log.jsonl"

    def _make_start(self) -> Path:
        start = self.directory / "start"
        if not start.exists():
            models.seed_checkpoint(self.spec.student, self.context.model, start, self.head, self.context.seed)
        return start

    def _load_target(self, target) -> nn.Module:
        recipe = self.context.recipe
        asked = recipe.models[target.from_].dtype if target.from_ in recipe.models else None
        dtype = asked or {"fp32": "float32", "bf16": "bfloat16"}[recipe.engine.precision]
        model = models.load(self.context.model(target.from_), None, getattr(torch, dtype))
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
            step, tokens = self._resume(engine)
            began = time.perf_counter()
            last = self._loop(engine, step, tokens)
            seconds = time.perf_counter() - began
            self._export(engine)
        finally:
            engine.close()
        return {**last, "steps": self.steps, "seconds": round(seconds, 2), "frozen": frozen}

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
            world.first(lambda: write_text(self.log, ""))
            return 0, 0
        manifest = snapshot.restore(found, engine, self.belongs())
        world.first(lambda: _forget_after(self.log, manifest["step"]))
        return manifest["step"], manifest["cursor"]["tokens"]

    def _save(self, engine: Engine, step: int, tokens: int) -> None:
        cursor = {"position": step * self.spec.optim.batch, "tokens": tokens}
        snapshot.save(self.directory / "snapshots", step, engine, self.belongs(), cursor, self.spec.keep)

    def _loop(self, engine: Engine, step: int, tokens: int) -> dict:
        entry: dict = {}
        with (
            world.stop_signal() as stopped,
            console.bar(self.steps, self.directory.name) as advance,
            open(self.log, "a") if world.rank() == 0 else open("/dev/null", "w") as log,
        ):
            advance(step)
            while step < self.steps:
                fault("train.step")
                entry, stop = self._step(engine, step, tokens, stopped)
                step, tokens = step + 1, entry["tokens"]
                print(json.dumps(entry), file=log, flush=True)
                advance(1, note=_note(entry))
                if stop or (self.spec.save_every and step % self.spec.save_every == 0 and step < self.steps):
                    self._save(engine, step, tokens)
                if stop:
                    raise Terminated()
        return {key: entry[key] for key in ("terms", "tokens", "tokens_per_second") if key in entry}

    def _step(self, engine: Engine, step: int, tokens: int, stopped) -> tuple[dict, bool]:
        """One update; returns its log entry and whether any rank was told to stop."""
        began = time.perf_counter()
        torch.manual_seed(hash((self.context.seed, step, world.rank())))  # dropout: a function of these three
        progress = Progress(step=step, steps=self.steps, tokens=tokens)
        weights = {name: o.weight.at(progress) for name, o in self.objectives.items()}
        active = [name for name, weight in weights.items() if weight]
        batches = self.data(step, self.mask.at(progress) if self.mask else None)
        counts, real = self._count(batches, active)
        sums, teaching = dict.fromkeys(counts, 0.0), 0.0
        for batch in batches:
            asked = time.perf_counter()
            targets = self.targets(batch, active)
            teaching += time.perf_counter() - asked
            terms = engine(batch, targets, active)
            engine.backward(sum(weights[k.split(".")[0]] * v / max(counts[k], 1.0) for k, v in terms.items()))
            for key, value in terms.items():
                sums[key] += float(value.detach())
        *totals, stop = world.agree(*sums.values(), float(stopped()))
        means = {key: total / max(counts[key], 1.0) for key, total in zip(sums, totals, strict=True)}
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

    def _count(self, batches: list[dict], active: list[str]) -> tuple[dict[str, float], float]:
        """The denominators of the whole step, over all micro-batches and ranks, before any forward pass."""
        counts: Counter = Counter()
        for batch in batches:
            counts["tokens"] += int((batch["segment_ids"] > 0).sum())
            for name in active:
                counts.update({f"{name}.{k}": float(n) for k, n in self.objectives[name].count(batch).items()})
        whole = dict(zip(counts, world.agree(*counts.values()), strict=True))
        return whole, whole.pop("tokens")

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


def freeze_unreachable(lesson: Lesson, targets: Targets, data: Data) -> list[str]:
    """Freeze what no objective reaches (MiniLM: the last output projection and FFN); returns the names.

    Found by one backward pass over a few tokens: a parameter without a gradient is outside the graph. Left in, ZeRO's
    flat partitions would decay it.
    """
    batch = {key: value[:1, :PROBE] if value.dim() == 2 else value[:1] for key, value in data(0)[0].items()}
    lesson.to(data.device)
    names = list(lesson.objectives)
    sum(lesson(batch, targets(batch, names), names).values()).backward()
    unreached = [name for name, p in lesson.named_parameters() if p.grad is None]
    for name, p in lesson.named_parameters():
        p.grad = None
        p.requires_grad_(name not in unreached)
    return [name.removeprefix("student.") for name in unreached]


def micro_batch(engine, optim) -> int:
    """Rows of one forward pass on one rank: the recipe's, or all of the step at once."""
    rows = engine.micro_batch or max(optim.batch // world.size(), 1)
    if optim.batch % (rows * world.size()):
        raise UserError(
            f"optim.batch={optim.batch} rows cannot be cut into micro-batches of {rows} on {world.size()} ranks; "
            f"batch={math.ceil(optim.batch / (rows * world.size())) * rows * world.size()} can"
        )
    return rows


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
