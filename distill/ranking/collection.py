"""What is asked, what may be found and what answers it, as a value; directories in BEIR's layout. No torch.

`corpus.jsonl`, `queries.jsonl` (each also .gz or .zst) and `qrels.tsv` or `qrels/SPLIT.tsv` (Thakur et al. 2021,
arXiv 2104.08663).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from distill.corpus.streams import PACKED
from distill.ranking import texts
from growth import files
from growth.errors import UserError, did_you_mean

CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"
ALLOWED = 0.01  # of the rows of a file may name what is not there
LISTED = 5
DOCUMENT = "one object a line with '_id' and 'text', and perhaps 'title'"
SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[^a-z\s])")  # where one ends
FEWEST_WORDS, FIRST_WORDS = 3, 8  # of a sentence that asks; where no sentence ends
QUERY = "one object a line with '_id' and 'text'"
JUDGEMENT = "three columns with tabs between them: query-id, corpus-id, score (a whole number)"

Judgements = Mapping[str, Mapping[str, int]]  # query -> document -> grade, above 0 where it answers


@dataclass
class Missing:
    """Ids that a file names and a collection lacks: a few are said, many are a mistake."""

    rows: int = 0
    lost: int = 0
    queries: dict[str, None] = field(default_factory=dict)
    documents: dict[str, None] = field(default_factory=dict)

    def row(self, collection: Collection, query: str, *documents: str) -> bool:
        """Whether all of a row is there."""
        absent = [name for name in documents if name not in collection.documents]
        unasked = query not in collection.queries
        if unasked:
            self.queries[query] = None
        self.documents.update(dict.fromkeys(absent))
        self.rows += 1
        self.lost += unasked or bool(absent)
        return not (unasked or absent)

    def refuse_many(self, where: object, allowed: float = ALLOWED) -> None:
        if self.lost > allowed * self.rows:
            raise UserError(f"{where}: {self}; at most {allowed:.1%} may. Is this the collection they are of?")

    def __str__(self) -> str:
        named = [f"{what} {_some(ids)}" for what, ids in vars(self).items() if isinstance(ids, dict) and ids]
        return f"{self.lost} of {self.rows} rows name ids that the collection lacks: {'; '.join(named) or 'none'}"


def _some(ids: Iterable[str]) -> str:
    shown = list(ids)
    return ", ".join(shown[:LISTED]) + f" and {len(shown) - LISTED} more" * (len(shown) > LISTED)


@dataclass(frozen=True)
class Collection:
    """Queries and documents (title and text in one) by id, and what is known to answer what."""

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    judgements: Judgements

    @cached_property
    def digest(self) -> str:
        judged = [[query, sorted(grades.items())] for query, grades in sorted(self.judgements.items())]
        return files.digest([texts.digest(self.queries), texts.digest(self.documents), judged])

    @cached_property
    def missing(self) -> Missing:
        """Judgements of what is not there."""
        found = Missing()
        for query, grades in self.judgements.items():
            for document in grades:
                found.row(self, query, document)
        return found

    def positives(self, query: str, at_least: int = 1) -> list[str]:
        return [document for document, grade in self.judgements.get(query, {}).items() if grade >= at_least]

    @property
    def unjudged(self) -> list[str]:
        """Queries nobody has judged a document of."""
        return [query for query in self.queries if not self.judgements.get(query)]

    def pair(self, query: str, document: str) -> tuple[str, str]:
        """The texts, which are what a score is kept by."""
        return self.queries[query], self.documents[document]


def beir(
    directory: str | Path, split: str | None = None, *, store: Path | None = None, allowed: float = ALLOWED
) -> Collection:
    """A directory in BEIR's layout; `store`: where documents are kept that are too many for memory.

    Queries that another split judges are left out; those that none judges stay.
    """
    directory = Path(directory)
    queries = texts.once(_queries(_file(directory, QUERIES)))
    chosen, others = _splits(directory, split)
    judged = judgements(chosen)
    elsewhere = {query for other in others for query in judgements(other)} - judged.keys()
    queries = {name: text for name, text in queries.items() if name not in elsewhere}
    found = Collection(queries, _read_documents(directory, store), judged)
    found.missing.refuse_many(chosen, allowed)
    return found


def unjudged(directory: str | Path, *, store: Path | None = None) -> Collection:
    """The queries and documents of such a directory alone, for triples that come with it."""
    queries = texts.once(_queries(_file(Path(directory), QUERIES)))
    return Collection(queries, _read_documents(Path(directory), store), {})


def is_judged(directory: str | Path) -> bool:
    return (Path(directory) / "qrels.tsv").is_file() or (Path(directory) / "qrels").is_dir()


def titles(directory: str | Path, *, store: Path | None = None) -> Collection:
    """Each title as the question that its text answers: training data of a collection without training queries.

    A title that stands above several texts is answered by each; a document without title or text is left out.
    """
    return _asked(directory, "title", lambda title, text: (title, text), store)


def openings(directory: str | Path, *, store: Path | None = None) -> Collection:
    """How each text begins as the question that the rest answers, where there are no titles to ask.

    The inverse cloze task (Lee et al. 2019, arXiv 1906.00300) with the first sentence in place of a random one, so that
    nothing is drawn; a text of one sentence is asked for by its first words.
    """
    return _asked(directory, "opening", lambda title, text: _opened(title, *opening(text)), store)


def opening(text: str) -> tuple[str, str]:
    """How a text begins, and the rest of it; the first sentence of some length, else the first words."""
    for end in SENTENCE.finditer(text):
        if len(text[: end.start()].split()) >= FEWEST_WORDS:
            return text[: end.start()], text[end.end() :]
    words = text.split()
    return " ".join(words[:FIRST_WORDS]), " ".join(words[FIRST_WORDS:])


def _opened(title: str, first: str, rest: str) -> tuple[str, str]:
    return first, f"{title} {rest}".strip() if rest else ""


def _asked(
    directory: str | Path, what: str, cut: Callable[[str, str], tuple[str, str]], store: Path | None
) -> Collection:
    path = _file(Path(directory), CORPUS)
    queries: dict[str, str] = {}
    judged: dict[str, dict[str, int]] = {}
    asked: dict[str, str] = {}

    def documents() -> Iterator[tuple[str, str, str]]:
        for where, record in texts.records(path, DOCUMENT):
            name = texts.written(record, "_id", where, DOCUMENT)
            question, answer = cut(_title(record, where), texts.written(record, "text", where, DOCUMENT).strip())
            if question and answer:
                query = asked.setdefault(question, f"{what} of {name}")
                queries[query] = question
                judged.setdefault(query, {})[name] = 1
                yield where, name, answer

    found = texts.once(documents()) if store is None else texts.store(store, [what, texts.identity(path)], documents())
    if not queries:
        deque(documents(), maxlen=0)  # the texts were in the store already
    if not queries:
        raise UserError(f"{path}: no document has both a {what} and a text, so there is nothing to ask")
    return Collection(queries, found, judged)


def judgements(path: Path) -> dict[str, dict[str, int]]:
    """Of a file of three columns with a header or without one."""
    found: dict[str, dict[str, int]] = {}
    for number, (where, line) in enumerate(texts.numbered(path)):
        cells = line.split("\t")
        if number == 0 and len(cells) == 3 and not _whole(cells[2]):
            continue  # the header
        if line.strip():
            if len(cells) != 3 or not _whole(cells[2]):
                raise UserError(f"{where}: found {line[:80]!r}, expected {JUDGEMENT}")
            judge(found, *cells, where)
    return found


def judge(found: dict[str, dict[str, int]], query: str, document: str, grade: str, where: str) -> None:
    """Add one; the same may stand twice, another one may not."""
    grades = found.setdefault(query, {})
    if grades.setdefault(document, int(grade)) != int(grade):
        raise UserError(f"{where}: {document} has the grade {grade} for query {query}, and {grades[document]} above")


def _whole(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def _file(directory: Path, name: str) -> Path:
    there = [path for ending in ("", *PACKED) if (path := directory / f"{name}{ending}").is_file()]
    if not there:
        raise UserError(f"{directory}: no {name} here; a collection has corpus.jsonl, queries.jsonl and qrels.tsv")
    return there[0]


def _splits(directory: Path, split: str | None) -> tuple[Path, list[Path]]:
    """The judgements asked for and all others: `qrels.tsv`, else `qrels/test.tsv` or the only one."""
    alone, several = directory / "qrels.tsv", {path.stem: path for path in sorted(directory.glob("qrels/*.tsv"))}
    if split is None and alone.is_file():
        return alone, []
    name = split or ("test" if "test" in several or len(several) != 1 else next(iter(several)))
    if name not in several:
        there = ", ".join(several) or "nothing"
        raise UserError(f"{directory}: no qrels/{name}.tsv (or qrels.tsv), only {there}{did_you_mean(name, several)}")
    return several.pop(name), list(several.values())


def _queries(path: Path) -> Iterator[tuple[str, str, str]]:
    for where, record in texts.records(path, QUERY):
        yield where, texts.written(record, "_id", where, QUERY), texts.written(record, "text", where, QUERY)


def _documents(path: Path) -> Iterator[tuple[str, str, str]]:
    for where, record in texts.records(path, DOCUMENT):
        name, text = (texts.written(record, key, where, DOCUMENT) for key in ("_id", "text"))
        yield where, name, f"{_title(record, where)} {text}".strip()


def _title(record: dict, where: str) -> str:
    return "" if record.get("title") is None else texts.written(record, "title", where, DOCUMENT).strip()


def _read_documents(directory: Path, store: Path | None) -> Mapping[str, str]:
    corpus = _file(directory, CORPUS)
    found = _documents(corpus)
    return texts.once(found) if store is None else texts.store(store, texts.identity(corpus), found)
