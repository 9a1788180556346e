"""`--dry-run`: what a recipe would cost, from configs and one short measurement; nothing is written.

All of it is a forecast. The formulas are printed with it, so that nobody takes it for a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from distill import sources, stages
from distill.context import Context, Work
from distill.cost import Cost, as_much_as, forward, steps_for, work
from distill.evaluate.machine import matmul_speed
from distill.kinds import Stage, TargetSpec
from distill.preflight import Planned, check
from distill.ranking import amounts, fits
from distill.ranking.kinds import written
from distill.recipe import Recipe
from distill.specs import EngineSpec
from growth.console import count, seconds, size, table
from growth.files import read_json

UTILISATION = 0.3  # share of a plain matrix product's speed that training reaches; DeepSpeed runs rarely pass a half
ACTIVATIONS = (
    34  # bytes a token, layer and hidden unit at 16 bits, fused attention (Korthikanti et al. 2022, 2205.05198)
)
INPUTS = 2  # of these, what goes into a layer: all that checkpointing keeps of it
BYTES_A_TOKEN = 4  # of English text, in a vocabulary of 30 thousand pieces
STDLIB_BYTES = 1_400_000  # prose of CPython 3.10 to 3.13, about
NOTES = (
    "forecast, not measured. FLOPs of a row of T tokens = 6 N T + 12 A T T of the student (a third of it forward, the",
    "rest back through what is updated), 2 N T + 4 A T T of teachers; N = weights of matrices, the table of tokens",
    "only where a head reads it; A = channels of attention, over all layers; T of rankers: as long as texts may be.",
    "Before: what the stages cost that a student was made from. Trainable is at most what is shown: what no loss",
    "reaches is found at the first batch and frozen.",
    f"Memory is that of one rank, activations {ACTIVATIONS} bytes x tokens x layers x width at 16 bits (twice that in",
    f"fp32; with checkpointing {INPUTS} a layer and {ACTIVATIONS} for one of them, for a third more time), losses and",
    "libraries not counted.",
)


@dataclass(frozen=True)
class Forecast:
    """Of one training stage."""

    stage: str
    shape: str
    parameters: int
    steps: int | None
    tokens: float | None
    exact: bool  # whether the number of tokens is known, not estimated from the size of the text
    flops: float | None  # of the student
    flops_before: float | None  # of the train stages that the student was made from
    teacher_flops: float | None
    again: float | None  # FLOPs of what runs a second time in backward
    memory: dict[str, float]
    disk: float


def show(recipe: Recipe, out: Path, ranks: int, rate: float | None = None) -> None:
    """Check the recipe as `run` would, then print what it would cost.

    `rate`: FLOPs a second of a matrix product on one GPU; measured on this machine if it is not given.
    """
    stages.refuse_out(recipe, out)
    context = Context(recipe, out, recipe.seed, Work(resolve=sources.described))
    check(recipe, context, ranks)
    planned = Planned(recipe, context)
    rows = [forecast(stage, planned, ranks) for stage in recipe.stages if stage.train]
    speed, machine = (rate, "GPU") if rate else matmul_speed(recipe.engine.precision)
    workers = ranks if machine == "GPU" else 1
    if grown := [stage for stage in recipe.stages if stage.grow]:
        table(*_grown(grown, planned))
    if refined := [stage for stage in recipe.stages if stage.data]:
        table(*_refined(refined, planned, speed * UTILISATION * workers))
    if rows:
        table(*_stages(rows, recipe.seeds, speed * UTILISATION * workers))
        table(*_memory(rows))
    for line in NOTES:
        click.echo(line)
    ran = f"is given as {speed:.2g} FLOPs" if rate else f"just ran at {speed:.2g} FLOPs"
    click.echo(_time_note(f"{ran} a second on {'one' if rate else 'this'} {machine}", workers, recipe))
    if not all(row.exact for row in rows):
        click.echo(
            f"~ the size of the text is estimated: {BYTES_A_TOKEN} bytes a token; exact once the corpus is prepared."
        )


def _grown(stages: list[Stage], planned: Planned) -> tuple[list[str], list[list[Any]], str]:
    lines = []
    for stage in stages:
        story, facts = planned.grown(stage.grow).growth, planned.facts(stage.id)
        ops = ", ".join(name for name, _ in stage.grow.operators())
        lines.append([stage.id, stage.grow.from_, ops, _shape(facts), count(facts.parameters), story["preserves"]])
    return ["stage", "from", "operators", "model", "parameters", "preserves"], lines, "what grows"


def _refined(stages: list[Stage], planned: Planned, speed: float) -> tuple[list[str], list[list[Any]], str]:
    lines, seeds = [], planned.recipe.seeds
    for stage in stages:
        ops = stage.data.operations()
        readers = [reference for _, op in ops for reference in op.readers]
        tokens, exact, flops = _reading(stage, readers, planned)
        lines.append(
            [
                stage.id if seeds == 1 else f"{stage.id} x {seeds} seeds",
                stage.data.from_,
                ", ".join(name for name, _ in ops),
                ", ".join(readers) or "-",
                _or_unknown(tokens, lambda n, exact=exact: f"{'' if exact else '~'}{count(n)}"),
                _or_unknown(flops and flops * seeds, _flops),
                _or_unknown(flops and flops * seeds, lambda n: seconds(n / speed) if n else "-"),
            ]
        )
    return ["stage", "from", "operations", "read by", "tokens", "FLOPs", "time"], lines, "what is done to text"


def _reading(stage: Stage, readers: list[str], planned: Planned) -> tuple[float | None, bool, float | None]:
    """(tokens, whether counted, FLOPs) of what the models of a data stage read."""
    if stage.data.reads == "text":
        tokens, exact = corpus_tokens(planned, stage.data.from_)
        length = planned.recipe.text(stage.data.from_).length
        row = sum(forward(work(planned.facts(reference), head=True), ((1, length),)) for reference in readers)
        return tokens, exact, _times(tokens, row / length) if row else 0
    read = amounts.texts(stage, planned)
    if None in read:
        return None, False, None
    flops = (forward(work(planned.facts(r), head=False), texts) for r, texts in zip(readers, read, strict=True))
    return sum(number * length for texts in read for number, length in texts), not read, sum(flops)


def _shape(facts) -> str:
    return f"{facts.family} {facts.layers} x {facts.widths['hidden']}"


def forecast(stage: Stage, planned: Planned, ranks: int) -> Forecast:
    """From configs alone."""
    spec, recipe, cost = stage.train, planned.recipe, planned.cost(stage)
    student = cost.student
    steps, exact = _steps(stage, planned)
    return Forecast(
        stage=stage.id,
        shape=f"{written(planned.learner(spec))['kind']}, {_shape(student)}" if spec.ranks else _shape(student),
        parameters=student.parameters,
        steps=steps,
        tokens=_times(steps, cost.tokens),
        exact=exact,
        flops=_times(steps, cost.mean),
        flops_before=as_much_as(recipe, stage.origin, lambda s: _amount(s, planned, "flops")),
        teacher_flops=_times(steps, cost.teaching(cost.teachers)),
        again=_times(steps, cost.mean / 3 if recipe.engine.checkpointing else 0),
        memory=memory(student, cost, recipe.engine, spec, ranks),
        disk=disk(student.parameters, spec),
    )


def _times(steps: float | None, each: float) -> float | None:
    return None if steps is None else steps * each


def _amount(stage: Stage, planned: Planned, measure: str) -> float | None:
    """What a stage takes, in steps, tokens or FLOPs."""
    cost = planned.cost(stage)
    return _times(_steps(stage, planned)[0], {"steps": 1, "tokens": cost.tokens, "flops": cost.mean}[measure])


def _steps(stage: Stage, planned: Planned) -> tuple[int | None, bool]:
    """(steps, whether that is exact); None where nobody knows the size of the corpus."""
    stop, cost, recipe = stage.train.stop, planned.cost(stage), planned.recipe
    if stop.steps is not None:
        return stop.steps, True
    if stop.tokens is not None:
        return math.ceil(stop.tokens / cost.tokens), False
    if stop.like is not None:
        amount = as_much_as(recipe, stop.like, lambda s: _amount(s, planned, recipe.equal))
        exact = recipe.equal != "tokens" and all(_steps(s, planned)[1] for s in recipe.made_from(stop.like))
        return (None, False) if amount is None else (steps_for(amount, recipe.equal, cost.tokens, cost.mean), exact)
    epoch, exact = _epoch(stage, planned, cost)
    return (None, False) if epoch is None else (max(math.ceil(stop.epochs * epoch), 1), exact)


def _epoch(stage: Stage, planned: Planned, cost: Cost) -> tuple[float | None, bool]:
    """(steps of one, whether counted)."""
    if stage.train.ranks:
        lists = fits.lists(stage.train.corpus, planned)
        return lists and lists / stage.train.optim.batch, lists is not None
    tokens, exact = corpus_tokens(planned, stage.train.corpus)
    return tokens and tokens / cost.tokens, exact


def corpus_tokens(planned: Planned, name: str) -> tuple[float | None, bool]:
    """(tokens of all training rows, whether counted): from the prepared corpus, or the size of its text."""
    if name not in planned.recipe.corpora:
        return None, False  # a data stage decides
    manifest = planned.context.out / "corpora" / name / "manifest.json"
    spec = planned.recipe.corpora[name]
    if manifest.exists():
        return read_json(manifest)["rows"]["train"] * spec.length, True
    sizes = [_text_bytes(source) for source in spec.sources]
    return (None if None in sizes else sum(sizes) / BYTES_A_TOKEN * (1 - spec.heldout)), False


def _text_bytes(source: str) -> int | None:
    path = Path(source).expanduser()
    if source == "stdlib":
        return STDLIB_BYTES
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else None


def memory(student, cost: Cost, engine: EngineSpec, spec, ranks: int) -> dict[str, float]:
    """Bytes of one rank, by what they hold; each ZeRO stage cuts one more thing by the number of ranks."""
    n, narrow = student.parameters, 4 if engine.precision == "fp32" else 2
    share = [ranks if engine.zero >= stage else 1 for stage in (1, 2, 3)]
    master = 0 if engine.precision == "fp32" and engine.zero == 0 else 4
    tokens = engine.micro_batch * cost.tokens // spec.optim.batch if engine.micro_batch else cost.tokens // ranks
    return {
        "optimizer": n * (master + 8) / share[0],
        "gradients": n * narrow / share[1],
        "weights": n * narrow / share[2],
        "teachers": sum(_held(name, target, cost, ranks) for name, target in spec.targets.items()) * narrow,
        "activations": tokens * student.widths["hidden"] * _kept(student.layers, engine) * narrow / 2,
    }


def _held(name: str, target: TargetSpec, cost: Cost, ranks: int) -> float:
    """Parameters of teachers on one rank; of shared ones their share, and all of the head that a loss reads behind."""
    if not target.shared:
        return float(sum(facts.parameters for facts in cost.teachers[name]))
    heads = [facts.head if name in cost.headed else 0 for facts in cost.teachers[name]]
    return sum((f.parameters - head) / ranks + head for f, head in zip(cost.teachers[name], heads, strict=True))


def _kept(layers: int, engine: EngineSpec) -> int:
    """Bytes of activations at once for each token and hidden unit, at 16 bits."""
    return layers * INPUTS + ACTIVATIONS if engine.checkpointing else layers * ACTIVATIONS


def disk(parameters: int, spec) -> float:
    """Start, model, and snapshots (master and two moments), one more than are kept while one is being written."""
    return parameters * 4 * (2 + 3 * (spec.keep + 1))


def _stages(rows: list[Forecast], seeds: int, speed: float) -> tuple[list[str], list[list[Any]], str]:
    columns = ["stage", "student", "trainable", "steps", "tokens", "FLOPs", "before", "teachers", "disk", "time"]
    lines = [
        [
            row.stage if seeds == 1 else f"{row.stage} x {seeds} seeds",
            row.shape,
            count(row.parameters),
            _or_unknown(row.steps, lambda n, row=row: f"{'' if row.exact else '~'}{n}"),
            _or_unknown(row.tokens and row.tokens * seeds, count),
            *(_or_unknown(n and n * seeds, _flops) for n in (row.flops, row.flops_before, row.teacher_flops)),
            size(row.disk * seeds),
            _or_unknown(row.flops and (row.flops + row.teacher_flops + row.again) * seeds / speed, seconds),
        ]
        for row in rows
    ]
    return columns, lines, "what it would cost (a forecast)"


def _flops(n: float) -> str:
    return f"{n:.2g}" if n else "-"


def _or_unknown(value, write) -> str:
    return "unknown" if value is None else write(value)


def _memory(rows: list[Forecast]) -> tuple[list[str], list[list[str]], str]:
    parts = list(rows[0].memory)
    lines = [[r.stage, *(size(r.memory[p]) for p in parts), size(sum(r.memory.values()))] for r in rows]
    return ["stage", *parts, "together"], lines, "memory of one rank"


def _time_note(ran: str, workers: int, recipe: Recipe) -> str:
    together = f", on {workers} of them in as many parts" if workers > 1 else ""
    return (
        f"Time: a {recipe.engine.precision} matrix product {ran}; training is taken to reach {UTILISATION:.0%} of "
        f"that{together}. Evaluation and preparing text are not in it."
    )
