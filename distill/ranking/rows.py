"""Rows of training files: a query, what answers it, what does not, and perhaps a teacher's scores. No torch.

Tab-separated forms are told by their number of columns, records (jsonl, parquet) by their keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill.corpus.streams import Budget, seekable, text
from distill.ranking import pickled
from distill.ranking.texts import numbered, records
from distill.ranking.trec import number
from growth.errors import UserError

# three: triples. Four: with the places of answers, which are not read. Five: neural-ranking-kd's teacher scores, by id
# or with texts. Seven: with scores of each passage of a document, space-separated, which are looked at and not
# kept.
SCORES = ("positive_score", "negative_score")
PASSAGES = {"positive_passages", "negative_passages"}
COLUMNS = {
    columns.count(" ") + 1: tuple(columns.split())
    for columns in (
        "query positive negative",
        "answer_spans query positive negative",
        "positive_score negative_score query positive negative",
        "positive_score positive_passages negative_score negative_passages query positive negative",
    )
}
FORMS = "; ".join(f"{n}: {' '.join(columns)}" for n, columns in COLUMNS.items())
QUERY, POSITIVE = ("query", "query_id", "qid"), ("positive", "positive_id")
OTHERS = ("negative", "negatives", "document", "documents", "negative_id", "negative_ids", "document_id",
          "document_ids")  # fmt: skip
SCORE = ("score", "scores")
HARD = {"qid", "pos", "neg"}  # of sentence-transformers' hard negatives
IDS = re.compile(r"(.*_ids?|qid)")
RECORD = (
    "an object with query, positive and negative(s), or query and document(s); for ids query_id, positive_id, "
    "negative_id(s), document_id(s); scores as positive_score and negative_score, or in `scores` one a document; or "
    "with ids qid, pos and neg: {system: [...]}"
)


class Row(NamedTuple):
    """`documents`: first the positive, where one is known. `scores`: one for each document."""

    where: str
    query: str
    documents: tuple[str, ...]
    scores: tuple[float, ...] | None
    positive: bool
    ids: bool


def read(path: str | Path, ids: bool) -> Iterator[Row]:
    """The rows of a file; `ids`: whether the columns of a tab-separated one hold ids (records say it themselves)."""
    path = Path(path)
    kind = path.name.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind not in READERS:
        raise UserError(
            f"{path}: rows of queries and documents are read from {', '.join(READERS)}, also as .gz or .zst"
        )
    return READERS[kind](path, ids)


def _tab_separated(path: Path, ids: bool) -> Iterator[Row]:
    columns: tuple[str, ...] = ()
    for where, line in numbered(path, ended=True):
        cells = line.split("\t")
        columns = columns or _form(cells, ids, where)
        if len(cells) != len(columns):
            raise UserError(f"{where}: {len(cells)} columns, expected {len(columns)} as above: {' '.join(columns)}")
        row = dict(zip(columns, cells, strict=True))
        scores = tuple(number(row[name], where, f"{name} in {columns}") for name in SCORES if name in row)
        for name in PASSAGES & row.keys():
            _look_at(row[name], where, name)
        named = [row[name].strip() for name in ("query", "positive", "negative")]
        if not all(named):
            raise UserError(f"{where}: an empty column, expected {' '.join(columns)}")
        yield Row(where, named[0], tuple(named[1:]), scores or None, True, ids)


def _look_at(scores: str, where: str, name: str) -> None:
    for score in scores.split():
        number(score, where, f"{name} as numbers with spaces between them")


def _form(cells: list[str], ids: bool, where: str) -> tuple[str, ...]:
    if len(cells) not in COLUMNS:
        raise UserError(f"{where}: {len(cells)} columns; expected tabs between {FORMS}")
    if not ids and all(cell.isdecimal() for cell in cells[-3:]):
        raise UserError(f"{where}: {' '.join(cells[-3:])} are ids, not texts; say of which collection they are")
    return COLUMNS[len(cells)]


def _json_lines(path: Path, ids: bool) -> Iterator[Row]:
    for where, record in records(path, RECORD):
        yield from _hard(record, where) if record.keys() >= HARD else (_row(record, where),)


def _hard(record: dict[str, Any], where: str) -> Iterator[Row]:
    """Of the hard negatives of sentence-transformers: for each answer all that any system has found; none, no row."""
    if not isinstance(record["neg"], dict) or isinstance(record["qid"], list):
        raise UserError(f"{where}: expected {{qid: id, pos: [ids], neg: {{system: [ids]}}}}")
    queries, positives = _listed(record, "qid", where), _listed(record, "pos", where, ids=True)
    found = dict.fromkeys(name for system in record["neg"] for name in _listed(record["neg"], system, where, ids=True))
    negatives = tuple(name for name in found if name not in positives)
    for positive in positives if negatives else ():
        yield Row(where, queries[0], (positive, *negatives), None, True, True)


def _parquet(path: Path, ids: bool) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with seekable(path) as stream:
            file = parquet.ParquetFile(stream)
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            Budget(path).spend(max((group.total_byte_size for group in groups), default=0))
            found = (record for batch in file.iter_batches(batch_size=256) for record in batch.to_pylist())
            for place, record in enumerate(found):
                yield _row(record, f"{path}: row {place}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a sound parquet file: {str(error).splitlines()[0]}") from error


def _row(record: dict[str, Any], where: str) -> Row:
    names = [next((name for name in names if name in record), None) for names in (QUERY, POSITIVE, OTHERS)]
    given = [name for name in names if name]
    if names[0] is None or len(given) < 2 or len({IDS.fullmatch(name) is None for name in given}) > 1:
        raise UserError(f"{where}: found the keys {', '.join(record)[:200]}; expected {RECORD}")
    query, positive, others = (_listed(record, name, where) for name in names)
    documents = (*positive, *others)
    if not documents or len(query) != 1 or len(positive) > 1 or ("document" in str(names[2]) and positive):
        raise UserError(f"{where}: {len(query)} queries, {len(positive)} positives; expected {RECORD}")
    return Row(where, query[0], documents, _scores(record, documents, where), bool(positive), names[0] != "query")


def _listed(record: dict[str, Any], name: str | None, where: str, *, ids: bool = False) -> list[str]:
    if name is None:
        return []
    values = record[name] if isinstance(record[name], list) else [record[name]]
    kinds = str | int if ids or IDS.fullmatch(name) else str
    if any(isinstance(value, bool) or not isinstance(value, kinds) or value == "" for value in values):
        raise UserError(f"{where}: {name!r} is {str(record[name])[:80]!r}; expected {RECORD}")
    return [text(str(value), where) for value in values]


def _scores(record: dict[str, Any], documents: tuple[str, ...], where: str) -> tuple[float, ...] | None:
    parts = [record[name] for name in SCORES if name in record] or [record[name] for name in SCORE if name in record]
    if not parts:
        return None
    values = [value for part in parts for value in (part if isinstance(part, list) else [part])]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise UserError(f"{where}: the scores are {str(values)[:80]}; expected numbers")
    if len(values) != len(documents):
        what = "a margin alone cannot be kept by pair" if len(values) == 1 else "they do not belong together"
        raise UserError(f"{where}: {len(values)} scores for {len(documents)} documents; {what}; expected {RECORD}")
    return tuple(number(str(value), where, "a score") for value in values)


def _pickled(path: Path, ids: bool) -> Iterator[Row]:
    for pair in pickled.pairs(path):
        yield Row(pair.where, pair.query, (pair.document,), (pair.score,), positive=False, ids=True)


READERS = {"tsv": _tab_separated, "jsonl": _json_lines, "parquet": _parquet, "pkl": _pickled}
