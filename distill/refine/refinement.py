"""A selection written as a corpus, and what it has kept: of each part, the best and the worst. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from distill import corpus
from distill.corpus import store
from distill.refine import cut
from distill.refine.gather import Chosen, gather, heldout
from distill.refine.scored import Scored
from distill.refine.selection import Rule, Table, select, steps
from growth.console import say

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 40  # of the histogram
EXAMPLES, LONGEST = 4, 300  # rows at either end, and characters of each


def refine(src: Path, scores: Path, out: Path, rule: Rule, unwanted: Sequence[str] = ()) -> dict[str, Any]:
    """The corpus in `out` of those rows of the one in `src` that a rule keeps by its scores; what was kept.

    What is held out stays held out, all of it. `unwanted` are parts known to be worthless.
    """
    text = corpus.open(src, store.TRAIN)
    scored = Scored(scores, text)
    table = Table(text, scored)
    rows = select(table, rule)
    sides = {store.TRAIN: [Chosen(text, rows)], store.HELDOUT: heldout(src)}
    request = {"select": asdict(rule), "of": text.digest, "score": scored.about}
    gather(out, {side: chosen for side, chosen in sides.items() if chosen}, request)
    found = of_selection(table, rows, scored.title, rule.better, unwanted)
    tell(found)
    return found


def of_selection(table: Table, rows: np.ndarray, title: str, better: str, unwanted: Sequence[str]) -> dict[str, Any]:
    """Plain figures, which stage.json keeps and the report shows."""
    kept = np.zeros(len(table), dtype=bool)
    kept[rows] = True
    parts, scores = _parts(table, kept), table.facts["score"]
    return {
        "score": title,
        "better": better,
        "rows": len(table),
        "kept": len(rows),
        "tokens": int(table.facts["tokens"].sum(dtype=np.int64)),
        "kept_tokens": int(table.facts["tokens"][rows].sum(dtype=np.int64)),
        "parts": parts,
        "quantiles": {
            "at": list(QUANTILES),
            "all": np.quantile(scores, QUANTILES).tolist(),
            "kept": np.quantile(scores[rows], QUANTILES).tolist(),
        },
        "histogram": _histogram(scores, kept),
        "unwanted": _found(parts, unwanted),
        "best": _examples(table, better),
        "worst": _examples(table, "low" if better == "high" else "high"),
    }


def tell(found: dict[str, Any]) -> None:
    """The main figures on the terminal."""
    share = found["kept_tokens"] / max(found["tokens"], 1)
    say(f"kept {found['kept']} of {found['rows']} rows, {share:.1%} of the tokens")
    if spotted := found["unwanted"]:
        say(f"  {sentence(spotted)}")


def sentence(spotted: dict[str, Any]) -> str:
    """How well a selection has told the worthless from the rest."""
    names = ", ".join(spotted["parts"])
    return (
        f"of {names}, known to be worthless, {spotted['recall']:.1%} is discarded (recall); of what is discarded "
        f"{spotted['precision']:.1%} is {names} (precision), where chance gives {spotted['share']:.1%}"
    )


def _parts(table: Table, kept: np.ndarray) -> dict[str, dict[str, int]]:
    """Bytes of text and documents of each part, all and kept; a row may have text of several."""
    text, n = table.text, len(table.parts)
    sums = np.zeros((4, n), dtype=np.int64)
    for rows in steps(len(table)):
        spans, row = text.spans.of(np.array(rows))
        part, size = np.asarray(text.texts.parts)[spans[:, 0]], spans[:, 2].astype(np.int64) - spans[:, 1]
        here = kept[rows.start : rows.stop][row]
        for line, weights in zip(sums, (size, size * here, np.ones_like(size), here), strict=True):
            line += np.bincount(part, weights, minlength=n).astype(np.int64)
    keys = ("bytes", "kept_bytes", "pieces", "kept_pieces")
    return {name: dict(zip(keys, sums[:, i].tolist(), strict=True)) for i, name in enumerate(table.parts) if sums[0, i]}


def _found(parts: dict[str, dict[str, int]], unwanted: Sequence[str]) -> dict[str, Any] | None:
    """Precision and recall of discarding, by bytes of text."""
    here = [name for name in unwanted if name in parts]
    if not here:
        return None
    lost = {name: part["bytes"] - part["kept_bytes"] for name, part in parts.items()}
    worthless, gone, discarded = sum(parts[n]["bytes"] for n in here), sum(lost[n] for n in here), sum(lost.values())
    return {
        "parts": here,
        "share": worthless / sum(part["bytes"] for part in parts.values()),
        "recall": gone / worthless,
        "precision": gone / max(discarded, 1),
    }


def _histogram(scores: np.ndarray, kept: np.ndarray) -> dict[str, list]:
    """Of the middle 99 %; what lies outside counts in the bins at the ends."""
    low, high = np.quantile(scores, (0.005, 0.995))
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    inside = np.clip(scores, edges[0], edges[-1])
    return {
        "edges": edges.tolist(),
        "all": np.histogram(inside, edges)[0].tolist(),
        "kept": np.histogram(inside[kept], edges)[0].tolist(),
    }


def _examples(table: Table, better: str) -> list[dict[str, Any]]:
    """The rows with the highest (lowest) scores, the beginning of their text in one line."""
    rows = np.concatenate(list(cut.best(table.stream, EXAMPLES, high=better == "high")))
    scores = table.facts["score"][rows]
    return [_example(table, row) for row in rows[np.argsort(-scores if better == "high" else scores, kind="stable")]]


def _example(table: Table, row: int) -> dict[str, Any]:
    text = " / ".join(" ".join(piece.split()) for piece in table.text.pieces(int(row)))
    facts = table.facts[row]
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return {"score": float(facts["score"]), "row": int(row), "part": table.parts[facts["part"]], "text": shown}
