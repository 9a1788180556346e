"""How good a ranking is: nDCG, reciprocal rank, average precision, recall, by `ir_measures`. No torch.

The order is settled here, by score and then by document id, and handed over as whole ranks: trec_eval reads scores in
single precision and breaks ties by itself, other providers otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distill.ranking.collection import Judgements
from distill.ranking.trec import Run, ranked
from growth.errors import UsageError, UserError, did_you_mean

MEASURES = ("nDCG@10", "RR@10", "AP", "R@100")


@dataclass(frozen=True)
class Evaluation:
    """Means over the queries that have an answer; whatever was not counted is listed."""

    means: dict[str, float]
    queries: dict[str, dict[str, float]]  # measure -> query -> value
    unjudged: tuple[str, ...]  # nobody judged a document of them: not counted
    answerless: tuple[str, ...]  # judged, but nothing answers them: no ranking scores above 0, not counted
    unranked: tuple[str, ...]  # have an answer, but the run lacks them: they count as 0
    tied: tuple[str, ...]  # equal scores among their documents, ordered by document id

    def __str__(self) -> str:
        means = ", ".join(f"{name} {value:.4f}" for name, value in self.means.items())
        counted = len(next(iter(self.queries.values())))
        notes = {
            "without a judgement": self.unjudged,
            "without an answer": self.answerless,
            "with an answer but not ranked, which count as 0": self.unranked,
            "with equal scores, ordered by document id": self.tied,
        }
        said = [f"{len(ids)} {what}" for what, ids in notes.items() if ids]
        return "; ".join([f"{means} over {counted} queries", *said])


def evaluate(
    run: Run, judgements: Judgements, queries: Iterable[str] = (), measures: Sequence[str] = MEASURES
) -> Evaluation:
    """`queries`: all that were asked; of them and of the run, those that nobody judged are said.

    Names as `ir_measures` has them, MRR, MAP and Recall too; `RR(rel=2)@10` counts grades from 2 on as answers.
    """
    every = dict.fromkeys([*queries, *run, *judgements])
    judged = {query: grades for query in every if (grades := judgements.get(query))}
    answered = {query: grades for query, grades in judged.items() if max(grades.values()) > 0}
    if not answered:
        raise UserError(f"none of {len(every)} queries has a document that answers it: are these the judgements?")
    found = _measured(measures, answered, {query: _ranks(run.get(query, {})) for query in answered})
    return Evaluation(
        means={name: float(np.mean(list(values.values()))) for name, values in found.items()},
        queries=found,
        unjudged=tuple(query for query in every if query not in judged),
        answerless=tuple(query for query in judged if query not in answered),
        unranked=tuple(query for query in answered if not run.get(query)),
        tied=tuple(query for query in answered if len(set((s := run.get(query, {})).values())) < len(s)),
    )


def _ranks(scores: Mapping[str, float]) -> dict[str, float]:
    return {document: float(-rank) for rank, document in enumerate(ranked(scores))}


def _measured(names: Sequence[str], judged: Judgements, run: Run) -> dict[str, dict[str, float]]:
    """measure -> query -> value."""
    ir = _ir_measures()
    parsed = {name: _parsed(ir, name) for name in names}
    try:
        found = list(ir.iter_calc(list(dict.fromkeys(parsed.values())), judged, run))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{', '.join(names)}: {error}") from error
    values = {(metric.measure, metric.query_id): float(metric.value) for metric in found}
    return {name: {query: values[measure, query] for query in judged} for name, measure in parsed.items()}


def refuse_unknown(names: Sequence[str]) -> None:
    """Before anything is ranked."""
    ir = _ir_measures()
    for name in names:
        _parsed(ir, name)


def _parsed(ir, name: str):
    try:
        measure = ir.parse_measure(name)
        measure.validate_params()
        return measure
    except (NameError, ValueError, SyntaxError, AssertionError) as error:
        raise UsageError(f"no measure {name!r}{did_you_mean(name, [*MEASURES, 'MRR@10', 'MAP'])} ({error})") from None


def _ir_measures():
    try:
        import ir_measures
    except ImportError:
        raise UserError("measures need the package ir-measures: pip install 'distill-growth[ranking]'") from None
    return ir_measures
