"""What a checkpoint is worth: rows of models, columns of metrics, every number with its noise. No torch until it runs.

A metric is a frozen value with `better`, `check(bench)` (whatever makes it impossible, before any model is loaded) and
`measure(subjects, bench)` (a score or None for each). One that scores items also has `compare(one, other, bench)`: two
rows, item by item. A new one is a file here and a line in `METRICS`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from distill.evaluate import machine
from distill.evaluate.accuracy import Accuracy, MacroF1
from distill.evaluate.agreement import Agreement, Divergence
from distill.evaluate.heldout import HeldoutLoss
from distill.evaluate.probe import Probe
from distill.evaluate.ranking import NDCG, AveragePrecision, PairSpeed, Recall, ReciprocalRank
from distill.evaluate.saving import Saving
from distill.evaluate.score import Score
from distill.evaluate.speed import Speed
from distill.evaluate.sts import Sts
from distill.ranking.significance import Comparison
from distill.specs import BM25
from growth.console import bar
from growth.errors import UsageError, did_you_mean
from growth.files import write_json

RESULT = "evaluation.json"  # in the directory of the stage; everything a report is made of


class Metric(Protocol):
    title: str  # the heading of its column
    better: str  # high, low or none
    digits: int
    quality: bool  # a property of the model, not of the machine

    def note(self, bench) -> str: ...
    def check(self, bench) -> None: ...
    def measure(self, subjects: Sequence, bench) -> Iterator[Score | None]: ...


@runtime_checkable
class Paired(Protocol):
    def compare(self, one: Sequence, other: Sequence, bench) -> Comparison | None:
        """Two rows, a subject for each seed, once both are measured."""


OF_TEXT: dict[str, Metric] = {
    "probe": Probe(),
    "agreement": Agreement(),
    "kl": Divergence(),
    "heldout_loss": HeldoutLoss(),
    "accuracy": Accuracy(),
    "macro_f1": MacroF1(),
    "sts": Sts(),
    "speed": Speed(),
    "saving": Saving(),
}
OF_RANKERS: dict[str, Metric] = {
    "ndcg": NDCG(),
    "mrr": ReciprocalRank(),
    "map": AveragePrecision(),
    "recall": Recall(),
    "pair_speed": PairSpeed(),
}
METRICS = OF_TEXT | OF_RANKERS

BELOW = ("baseline", "scratch")  # roles of rows that others are compared with

# words of a label or reference -> role; the first that stands in either wins, anything else is a student
ROLES = {
    "without": "scratch",  # the teacher, say: it names what the row is not
    "teacher": "teacher",
    "assistant": "assistant",
    "scratch": "scratch",
    "twin": "scratch",
    "baseline": "baseline",
    "start": "baseline",
    "untrained": "baseline",
}


def evaluate(spec, contexts: Sequence, directory: Path) -> list[dict]:
    """Measure the rows of an evaluate stage on every seed; writes evaluation.json, returns its rows.

    `contexts` holds one context a seed. A row that is the same checkpoint for all of them is measured once.
    """
    began = time.perf_counter()
    metrics = dict(map(_metric, spec.on))
    teacher = spec.teacher or _teacher(spec.rows)
    subjects, bench = _of_rankers(spec, contexts[0]) if ranks(spec.on) else _of_text(spec, contexts[0])
    teachers = [teacher and subjects.of(c, teacher) for c in contexts]
    bench.teacher = teachers[0]
    rows = {label: _once([subjects.of(c, reference) for c in contexts]) for label, reference in spec.rows.items()}
    for metric in metrics.values():
        metric.check(bench)
    bench.begin(rows, Path(directory), [context.seed for context in contexts])
    seeds = {label: list(zip(teachers, found, strict=False)) for label, found in rows.items()}
    scores = _measure(metrics, seeds, bench)
    described = [_row(label, spec.rows[label], teacher, seeds[label], metrics, scores) for label in rows]
    result = {
        "metrics": {name: _described(metric, bench) for name, metric in metrics.items()},
        "rows": described,
        "comparisons": list(_compared(rows, described, metrics, bench)),
        **machine.facts(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(Path(directory) / RESULT, result)
    return result["rows"]


def foresee(spec, context) -> None:
    """Whatever makes a metric impossible, before anything is trained; silent where a stage makes teacher or text."""
    metrics = dict(map(_metric, spec.on))
    if ranks(spec.on):
        _, bench = _of_rankers(spec, context)
    else:
        teacher = spec.teacher or _teacher(spec.rows)
        if (teacher and teacher not in context.recipe.models) or spec.data not in context.recipe.corpora:
            return
        subjects, bench = _of_text(spec, context)
        bench.teacher = teacher and subjects.of(context, teacher)
    for metric in metrics.values():
        metric.check(bench)


def _of_text(spec, context):
    """(what finds checkpoints, what they are measured on)."""
    from distill.evaluate.bench import Bench, Subjects

    subjects = Subjects(context.corpus(spec.data))
    return subjects, Bench(subjects.corpus, None, spec.rows, context)


def _of_rankers(spec, context):
    from distill.evaluate.rank_bench import Bench, Subjects

    collection, _ = context.ranking(spec.data).open()
    measured = [metric.measured for _, metric in map(_metric, spec.on) if metric.quality]
    return Subjects(), Bench(spec.data, collection, measured, spec.depth, spec.retrieve)


def ranks(on: Sequence[str | dict]) -> bool:
    """Whether these are metrics of rankers."""
    return any(name in OF_RANKERS for entry in on for name in ([entry] if isinstance(entry, str) else entry))


def role(label: str, reference: str, teacher: str | None) -> str:
    """teacher, student, baseline, scratch or assistant: by what the row is called, then by what it is."""
    if reference == BM25:
        return "baseline"
    if reference == teacher:
        return "teacher"
    return next((ROLES[word] for text in (label, reference) for word in ROLES if word in text.lower()), "student")


def _metric(entry: str | dict[str, dict[str, Any]]) -> tuple[str, Metric]:
    """`probe`, or `{sts: {source: pairs.jsonl}}`: a metric with other fields."""
    ((name, fields),) = entry.items() if isinstance(entry, dict) else ((entry, {}),)
    if name not in METRICS:
        raise UsageError(f"no metric {name!r}{did_you_mean(name, METRICS)}; there are {', '.join(METRICS)}")
    known = [field.name for field in dataclasses.fields(METRICS[name])]
    if strange := sorted(set(fields) - set(known)):
        raise UsageError(f"{name}: no key {strange[0]!r}{did_you_mean(strange[0], known)}; it has {', '.join(known)}")
    return name, dataclasses.replace(METRICS[name], **fields)


def _teacher(rows: dict[str, str]) -> str | None:
    return next((reference for label, reference in rows.items() if role(label, reference, None) == "teacher"), None)


def _once(subjects: list) -> list:
    """One for each seed, or a single one where all are the same directory."""
    return subjects[:1] if len({subject.path for subject in subjects}) == 1 else subjects


def _measure(metrics: dict[str, Metric], rows: dict[str, list[tuple]], bench) -> dict[str, dict]:
    """metric -> (the teacher of a seed, a subject) -> score; by metric, so that one model is in memory (two for kl)."""
    pairs = dict.fromkeys(pair for row in rows.values() for pair in row)
    with bar(len(metrics) * len(pairs), "evaluate") as advance:
        scores: dict[str, dict] = {name: {} for name in metrics}
        for name, metric in metrics.items():
            for bench.teacher in dict.fromkeys(teacher for teacher, _ in pairs):
                subjects = [subject for teacher, subject in pairs if teacher is bench.teacher]
                for subject, score in zip(subjects, metric.measure(subjects, bench), strict=True):
                    scores[name][bench.teacher, subject] = score
                    advance(1, note=f"{name} of {subject.name}")
        return scores


def _described(metric: Metric, bench) -> dict:
    facts = {name: getattr(metric, name) for name in ("title", "better", "digits", "quality")}
    return {**facts, "note": metric.note(bench)}


def _compared(rows: dict[str, list], described: list[dict], metrics: dict[str, Metric], bench) -> Iterator[dict]:
    """Every row with those that others are compared with, by the first metric that can."""
    metric = next((metric for metric in metrics.values() if isinstance(metric, Paired)), None)
    below = [row["name"] for row in described if row["role"] in BELOW]
    pairs = [(label, other) for label in rows for other in below if label != other]
    for i, (label, other) in enumerate(pairs if metric else ()):
        if (other, label) not in pairs[:i] and (found := metric.compare(rows[label], rows[other], bench)):
            yield {"row": label, "against": other, "measure": metric.title, **dataclasses.asdict(found)}


def _row(label: str, reference: str, teacher: str | None, seeds: list, metrics: dict, scores: dict) -> dict:
    """`seeds`: one (teacher, subject) for each, or a single one."""
    measured = {name: [scores[name][pair] for pair in seeds] for name in metrics}
    return {
        "name": label,
        "role": role(label, reference, teacher),
        "reference": reference,
        "params": seeds[0][1].parameters,
        "metrics": {name: _summary(metrics[name], found) for name, found in measured.items() if None not in found},
    }


def _summary(metric: Metric, scores: list[Score]) -> dict:
    """`error`: the standard error of one value; the seeds share their test items, so it does not shrink with them."""
    values, errors = [score.value for score in scores], [score.error for score in scores]
    return {
        "mean": sum(values) / len(values),
        "seeds": values,
        "better": metric.better,
        "error": None if None in errors else sum(errors) / len(errors),
    }
