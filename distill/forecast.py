"""`--dry-run`: what a recipe would cost, from configs and one short measurement; nothing is written.

All of it is a forecast. The formulas are printed with it, so that nobody takes it for a measurement.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from distill import stages
from distill.context import Context
from distill.preflight import Planned, check
from distill.recipe import EngineSpec, Recipe, Stage
from growth.console import count, seconds, size, table
from growth.files import read_json

UTILISATION = 0.3  # share of a plain matrix product's speed that training reaches; DeepSpeed runs rarely pass a half
ACTIVATIONS = (
    34  # bytes a token, layer and hidden unit at 16 bits, fused attention (Korthikanti et al. 2022, 2205.05198)
)
BYTES_A_TOKEN = 4  # of English text, in a vocabulary of 30 thousand pieces
STDLIB_BYTES = 1_400_000  # prose of CPython 3.10 to 3.13, about
NOTES = (
    "forecast, not measured. FLOPs = 6 N D of the student + 2 N D of each teacher; N = parameters, the embedding table",
    "only where a head reads it; D = tokens; the square of the length is left out. Trainable is at most what is shown:",
    "what no loss reaches is found at the first batch and frozen. Memory is that of one rank, activations",
    f"{ACTIVATIONS} bytes x tokens x layers x width at 16 bits (twice that in fp32), losses and libraries not counted.",
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
    flops: float | None
    memory: dict[str, float]
    disk: float


def show(recipe: Recipe, out: Path, ranks: int) -> None:
    """Check the recipe as `run` would, then print what it would cost."""
    stages.refuse_out(recipe, out)
    context = Context(recipe, out, recipe.seed)
    check(recipe, context, ranks)
    planned = Planned(recipe, context)
    rows = [forecast(stage, planned, ranks) for stage in recipe.stages if stage.train]
    speed, machine = matmul_speed(recipe.engine.precision)
    workers = ranks if machine == "GPU" else 1
    table(*_stages(rows, recipe.seeds, speed * UTILISATION * workers))
    table(*_memory(rows))
    for line in NOTES:
        click.echo(line)
    click.echo(_time_note(speed, machine, recipe))
    if not all(row.exact for row in rows):
        click.echo(
            f"~ the size of the text is estimated: {BYTES_A_TOKEN} bytes a token; exact once the corpus is prepared."
        )


def forecast(stage: Stage, planned: Planned, ranks: int) -> Forecast:
    """From configs alone."""
    spec, recipe = stage.train, planned.recipe
    student = planned.student_facts(stage.id)
    teachers = {target.from_: planned.facts(target.from_) for target in spec.targets.values()}
    heads = any(objective.needs().head for _, objective in spec.objectives())
    row = spec.optim.batch * recipe.corpora[spec.data].length
    steps, exact = _steps(spec, row, lambda: corpus_tokens(planned, spec.data))
    tokens = None if steps is None else steps * row
    a_token = 6 * working(student, heads) + sum(2 * working(teacher, False) for teacher in teachers.values())
    return Forecast(
        stage=stage.id,
        shape=f"{student.family} {student.layers} x {student.widths['hidden']}",
        parameters=student.parameters,
        steps=steps,
        tokens=tokens,
        exact=exact,
        flops=None if tokens is None else tokens * a_token,
        memory=memory(student, list(teachers.values()), recipe.engine, spec, row, ranks),
        disk=disk(student.parameters, spec),
    )


def working(facts, head: bool) -> int:
    """Parameters that a token is multiplied with: a table is looked up, a head is not."""
    table_size = facts.vocab * facts.widths["hidden"]
    return facts.parameters - (0 if head else table_size)


def _steps(spec, row: int, corpus) -> tuple[int | None, bool]:
    """(steps, whether that is exact); None where nobody knows the size of the corpus."""
    if spec.stop.steps is not None:
        return spec.stop.steps, True
    if spec.stop.tokens is not None:
        return math.ceil(spec.stop.tokens / row), False
    tokens, exact = corpus()
    return (None, False) if tokens is None else (max(math.ceil(spec.stop.epochs * tokens / row), 1), exact)


def corpus_tokens(planned: Planned, name: str) -> tuple[float | None, bool]:
    """(tokens of all training rows, whether counted): from the prepared corpus, or the size of its text."""
    manifest = planned.context.out / "corpora" / name / "manifest.json"
    spec = planned.recipe.corpora[name]
    if manifest.exists():
        return read_json(manifest)["rows"]["train"] * spec.length, True
    found = _text_bytes(spec.source)
    return (None if found is None else found / BYTES_A_TOKEN * (1 - spec.heldout)), False


def _text_bytes(source: str) -> int | None:
    path = Path(source).expanduser()
    if source == "stdlib":
        return STDLIB_BYTES
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else None


def memory(student, teachers: list, engine: EngineSpec, spec, row: int, ranks: int) -> dict[str, float]:
    """Bytes of one rank, by what they hold; each ZeRO stage cuts one more thing by the number of ranks."""
    n, narrow = student.parameters, 4 if engine.precision == "fp32" else 2
    share = [ranks if engine.zero >= stage else 1 for stage in (1, 2, 3)]
    master = 0 if engine.precision == "fp32" and engine.zero == 0 else 4
    tokens = engine.micro_batch * row // spec.optim.batch if engine.micro_batch else row // ranks
    return {
        "optimizer": n * (master + 8) / share[0],
        "gradients": n * narrow / share[1],
        "weights": n * narrow / share[2],
        "teachers": float(sum(t.parameters for t in teachers) * narrow),
        "activations": tokens * student.layers * student.widths["hidden"] * ACTIVATIONS * narrow / 2,
    }


def disk(parameters: int, spec) -> float:
    """Start, model, and snapshots (master and two moments), one more than are kept while one is being written."""
    return parameters * 4 * (2 + 3 * (spec.keep + 1))


def matmul_speed(precision: str, duration: float = 0.5) -> tuple[float, str]:
    """(FLOPs a second of a plain matrix product here and now, CPU or GPU)."""
    import torch

    gpu = torch.cuda.is_available()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    n = 8192 if gpu else 1024
    a = torch.ones(n, n, dtype=dtype, device="cuda" if gpu else "cpu")
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < duration:
        a @ a
        if gpu:
            torch.cuda.synchronize()
        done += 1
    return 2 * n**3 * done / (time.perf_counter() - began), "GPU" if gpu else "CPU"


def _stages(rows: list[Forecast], seeds: int, speed: float) -> tuple[list[str], list[list[Any]], str]:
    columns = ["stage", "student", "trainable", "steps", "tokens", "FLOPs", "disk", "time"]
    lines = [
        [
            row.stage if seeds == 1 else f"{row.stage} x {seeds} seeds",
            row.shape,
            count(row.parameters),
            _or_unknown(row.steps, lambda n, row=row: f"{'' if row.exact else '~'}{n}"),
            _or_unknown(row.tokens and row.tokens * seeds, count),
            _or_unknown(row.flops and row.flops * seeds, lambda n: f"{n:.2g}"),
            size(row.disk * seeds),
            _or_unknown(row.flops and row.flops * seeds / speed, seconds),
        ]
        for row in rows
    ]
    return columns, lines, "what it would cost (a forecast)"


def _or_unknown(value, write) -> str:
    return "unknown" if value is None else write(value)


def _memory(rows: list[Forecast]) -> tuple[list[str], list[list[str]], str]:
    parts = list(rows[0].memory) if rows else []
    lines = [[r.stage, *(size(r.memory[p]) for p in parts), size(sum(r.memory.values()))] for r in rows]
    return ["stage", *parts, "together"], lines, "memory of one rank"


def _time_note(speed: float, machine: str, recipe: Recipe) -> str:
    return (
        f"Time: a {recipe.engine.precision} matrix product just ran at {speed:.2g} FLOPs a second on this {machine}; "
        f"training is taken to reach {UTILISATION:.0%} of that. Evaluation and preparing text are not in it."
    )
