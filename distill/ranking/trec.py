"""TREC's files: topics, judgements (qrels) and runs. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from distill.ranking import texts
from distill.ranking.collection import Judgements, judge
from growth import files
from growth.errors import UserError

JUDGEMENT = "four columns: query, iteration, document, grade (a whole number)"
RUN = "six columns: query, Q0, document, rank, score, name of the run"
TOPIC = re.compile(r"<top>(.*?)</top>", re.DOTALL | re.IGNORECASE)
NUMBER = re.compile(r"<num>\s*(?:Number:)?\s*([^\s<]+)", re.IGNORECASE)
LARGEST = 3.4e38  # a store and a model hold single precision
FIELD = r"<{}>\s*(?:(?:Topic|Description|Narrative):)?\s*(.*?)\s*(?=<|\Z)"

Run = Mapping[str, Mapping[str, float]]  # query -> document -> score


def topics(path: str | Path, field: str = "title") -> dict[str, str]:
    """Queries by id: lines of an id, a tab and a text, or `<top>` records, of which `field` (title, desc, narr)."""
    path = Path(path)
    first = next((line for _, line in texts.numbered(path) if line.strip()), "")
    return texts.once(_tagged(path, field) if first.lstrip().startswith("<") else texts.tab_separated(path))


def documents(path: str | Path, store: Path | None = None) -> Mapping[str, str]:
    """Lines of an id, a tab and a text, as MS MARCO's collection; `store`: where they are kept if there are many."""
    path = Path(path)
    found = texts.tab_separated(path)
    return texts.once(found) if store is None else texts.store(store, texts.identity(path), found)


def judgements(path: str | Path) -> Judgements:
    found: dict[str, dict[str, int]] = {}
    for where, cells in _cells(Path(path), 4, JUDGEMENT):
        if not re.fullmatch(r"-?\d+", cells[3]):
            raise UserError(f"{where}: the grade is {cells[3]!r}; expected {JUDGEMENT}")
        judge(found, cells[0], cells[2], cells[3], where)
    return found


def read(path: str | Path) -> dict[str, dict[str, float]]:
    """A run. Scores decide, not ranks, as in trec_eval."""
    found: dict[str, dict[str, float]] = {}
    for where, (query, _, document, _, score, _) in _cells(Path(path), 6, RUN):
        scores = found.setdefault(query, {})
        if document in scores:
            raise UserError(f"{where}: document {document} stands twice for query {query}")
        scores[document] = number(score, where, RUN)
    return found


def write(path: str | Path, run: Run, name: str = "distill") -> None:
    """Best first, of equal scores by document id; the scores read back as they were."""
    path, rows = Path(path), []
    for query, scores in run.items():
        for rank, document in enumerate(ranked(scores), start=1):
            cells = (query, "Q0", document, str(rank), repr(float(scores[document])), name)
            if any(not cell or cell.split() != [cell] for cell in cells):
                raise UserError(f"{path}: white space in {cells[:3]} or {name!r}; columns of a run end at white space")
            rows.append(" ".join(cells) + "\n")
    files.write_text(path, "".join(rows))


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Documents from best to worst; of equal scores the smaller id first."""
    return sorted(scores, key=lambda document: (-scores[document], document))


def number(text: str, where: str, expected: str) -> float:
    """A finite one, of single precision as well."""
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where}: {text[:40]!r} is no number; expected {expected}") from None
    if not abs(value) <= LARGEST:
        raise UserError(f"{where}: a score is {text}; expected a finite number")
    return value


def _cells(path: Path, count: int, expected: str) -> Iterator[tuple[str, list[str]]]:
    for where, line in texts.numbered(path):
        if line.strip():
            if len(cells := line.split()) != count:
                raise UserError(f"{where}: {len(cells)} columns, expected {expected}")
            yield where, cells


def _tagged(path: Path, field: str) -> Iterator[tuple[str, str, str]]:
    whole = "\n".join(line for _, line in texts.numbered(path))
    if whole.lower().count("<top>") != len(records := TOPIC.findall(whole)):
        raise UserError(f"{path}: a <top> without </top>; the file may be truncated")
    for place, record in enumerate(records, start=1):
        where, asked = f"{path}: topic {place}", re.search(FIELD.format(field), record, re.DOTALL | re.IGNORECASE)
        if not (named := NUMBER.search(record)) or not asked or not asked[1]:
            raise UserError(f"{where}: expected <num> and <{field}>")
        yield where, named[1], " ".join(asked[1].split())
