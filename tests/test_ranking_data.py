"""Laws of ranking data: what is read is what was written, and what is wrong or left out is said."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from distill import scores
from distill.corpus import stdlib
from distill.ranking import (
    collection,
    docstrings,
    groups,
    importers,
    measures,
    mining,
    search,
    significance,
    stores,
    texts,
    trec,
)
from distill.ranking.collection import Collection
from distill.ranking.groups import Group
from distill.ranking.mining import FalseNegatives
from growth.errors import UsageError, UserError

QUERIES = {"q1": "red fox", "q2": "old\u2028dog", "q3": "who asks"}
DOCUMENTS = {"d<1>": "Title a red fox", "d2": "an old dog", "d3": "", "4": "fox and dog", "d5": "a red fox, again"}
JUDGED = {"q1": {"d<1>": 2, "d2": 0}, "q2": {"d2": 1}}
KEPT = Collection(QUERIES, DOCUMENTS, JUDGED)


def lines(path, *records):
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def beir(directory, qrels="qrels.tsv", packed=".gz"):
    directory.mkdir(exist_ok=True)
    corpus = [{"_id": name, "text": text} for name, text in DOCUMENTS.items()]
    corpus[0] = {"_id": "d<1>", "title": "Title", "text": "a red fox"}
    corpus[3]["_id"] = 4  # some write ids as numbers
    lines(directory / f"corpus.jsonl{packed}", *corpus)
    lines(directory / "queries.jsonl", *({"_id": name, "text": text} for name, text in QUERIES.items()))
    rows = [f"{q}\t{d}\t{grade}" for q, grades in JUDGED.items() for d, grade in grades.items()]
    (directory / qrels).parent.mkdir(exist_ok=True)
    lines(directory / qrels, "query-id\tcorpus-id\tscore", *rows)
    return directory


def write_store(path, pairs, teacher="t", unit=stores.LOGIT):
    with scores.Writer(path, stores.about([{"teacher": teacher}], unit)) as writer:
        writer.add(scores.pair_keys(pairs), {"score": np.array(list(pairs.values()), dtype=np.float32)})
    return path


def read_store(path, *pairs):
    return scores.Reader(path).rows(scores.pair_keys(pairs))["score"].tolist()


# Collections


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_directory_in_beirs_layout_is_read_whole(tmp_path, packed):
    found = collection.beir(beir(tmp_path, packed=packed))
    assert (dict(found.queries), dict(found.documents), found.judgements) == (QUERIES, DOCUMENTS, JUDGED)
    assert found.unjudged == ["q3"] and found.digest == KEPT.digest and found.missing.lost == 0
    assert found.positives("q1") == ["d<1>"] == found.positives("q1", 2) and not found.positives("q3")


def test_queries_of_another_split_are_left_out_and_those_of_none_stay(tmp_path):
    beir(tmp_path, "qrels/test.tsv")
    lines(tmp_path / "qrels/dev.tsv", "q1\td2\t1", "q2\td2\t1")  # without a header, and q2 in both
    assert list(collection.beir(tmp_path, "dev").queries) == ["q1", "q2", "q3"]
    lines(tmp_path / "qrels/dev.tsv", "q3\td2\t1")
    assert list(collection.beir(tmp_path).queries) == ["q1", "q2"]  # test is the default
    with pytest.raises(UserError, match=r"no qrels/tset.tsv .*, only dev, test; did you mean"):
        collection.beir(tmp_path, "tset")


def test_the_digest_sees_every_text_and_grade():
    others = [
        Collection({**QUERIES, "q1": "x"}, DOCUMENTS, JUDGED),
        Collection(QUERIES, {**DOCUMENTS, "d3": "x"}, JUDGED),
        Collection(QUERIES, DOCUMENTS, {**JUDGED, "q2": {"d2": 2}}),
        Collection(QUERIES, {"d<1>T": "itle a red fox", **dict(list(DOCUMENTS.items())[1:])}, JUDGED),
    ]
    assert len({KEPT.digest, *(other.digest for other in others)}) == 5
    turned = {q: dict(reversed(list(JUDGED[q].items()))) for q in reversed(JUDGED)}
    assert Collection(QUERIES, DOCUMENTS, turned).digest == KEPT.digest


@pytest.mark.parametrize("hashed", [texts._hash, lambda name: 7], ids=["hashed", "all hashes equal"])
def test_stored_texts_are_those_of_a_dictionary(tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(texts, "_hash", hashed)
    found = collection.beir(beir(tmp_path / "c"), store=tmp_path / "store")
    assert isinstance(found.documents, texts.Stored) and dict(found.documents) == DOCUMENTS
    assert found.digest == KEPT.digest and "nothing" not in found.documents and found.documents["d3"] == ""


def test_a_store_is_made_again_when_its_source_has_changed(tmp_path):
    made = [0]

    def rows(text):
        made[0] += 1
        yield "here", "a", text

    for source, text, times in [(1, "x", 1), (1, "y", 1), (2, "z", 2)]:
        assert texts.store(tmp_path / "s", source, rows(text))["a"] == ("z" if source == 2 else "x")
        assert made[0] == times
    (tmp_path / "s/texts").write_bytes(b"")
    with pytest.raises(UserError, match="not as long as it was"):
        texts.Stored(tmp_path / "s")
    with pytest.raises(UserError, match="'b' stands twice"):
        texts.store(tmp_path / "t", 1, [("", "b", "1"), ("", "a", "2"), ("", "b", "3")])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("queries.jsonl", '{"_id": "q1", "text": "a"}\n{"_id": "q2", "te', r"queries.jsonl:2: .*expected one object"),
        ("queries.jsonl", '{"_id": "q1"}\n', r"queries.jsonl:1: 'text' is nothing; expected"),
        ("queries.jsonl", '{"_id": null, "text": "a"}\n', r":1: '_id' is nothing"),
        ("queries.jsonl", '["q1"]\n', r":1: found a list, expected one object"),
        ("queries.jsonl", '{"_id": "q1", "text": "a"}\n' * 2, r":2: the id 'q1' stands twice"),
        ("queries.jsonl", '{"_id": "q1", "text": ["a"]}\n', r":1: 'text' is a list"),
        ("qrels.tsv", "query-id\tcorpus-id\tscore\nq1\td2\n", r"qrels.tsv:2: found 'q1\\td2', expected three columns"),
        ("qrels.tsv", "q1\td2\t1\nq1\td2\tone\n", r"qrels.tsv:2: .*whole number"),
        ("qrels.tsv", "q1\td2\t1\nq1\td2\t0\n", r"qrels.tsv:2: d2 has the grade 0 for query q1, and 1 above"),
        ("qrels.tsv", "q1\td2\t1\nq9\td2\t0\nq1\td9\t1\n", r"2 of 3 rows .*queries q9; documents d9; at most 1.0%"),
    ],
)
def test_what_is_wrong_with_a_collection_is_said_by_line(tmp_path, file, content, said):
    beir(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=said):
        collection.beir(tmp_path)


def test_a_few_judgements_of_absent_documents_are_counted(tmp_path):
    lines(beir(tmp_path) / "qrels.tsv", *(f"q{i % 3 + 1}\td2\t1" for i in range(200)), "q1\td9\t1")
    assert str(collection.beir(tmp_path, allowed=0.3).missing).startswith("1 of 4 rows name ids")


def test_titles_ask_for_their_texts(tmp_path):
    rows = [("a", "Same", "one"), ("b", "", "two"), ("c", "Same", "three"), ("d", "Other", " ")]
    lines(tmp_path / "corpus.jsonl", *({"_id": i, "title": title, "text": text} for i, title, text in rows))
    found = collection.titles(tmp_path)
    assert found.queries == {"title of a": "Same"} and found.documents == {"a": "one", "c": "three"}
    assert found.judgements == {"title of a": {"a": 1, "c": 1}}
    lines(tmp_path / "corpus.jsonl", {"_id": "b", "title": None, "text": "two"})
    with pytest.raises(UserError, match="nothing to ask"):
        collection.titles(tmp_path)


# TREC


def test_topics_are_read_in_both_forms(tmp_path):
    tagged = "<top>\n<num> Number: 301\n<title> organised\n crime\n\n<desc> Description:\nWhich?\n</top>\n" * 2
    (tmp_path / "tagged").write_text(tagged.replace("301", "302", 1))
    assert trec.topics(tmp_path / "tagged") == {"302": "organised crime", "301": "organised crime"}
    assert trec.topics(tmp_path / "tagged", "desc")["301"] == "Which?"
    assert trec.topics(lines(tmp_path / "tabs", "301\torganised\tcrime")) == {"301": "organised\tcrime"}
    assert dict(trec.documents(tmp_path / "tabs", tmp_path / "store")) == {"301": "organised\tcrime"}
    for content, said in [
        (tagged, "topic 2: the id '301' stands twice"),
        (tagged[:-8], "a <top> without </top>"),
        (tagged.replace("<title>", "<t>"), "topic 1: expected <num> and <title>"),
        ("301\tx\n302", ":2: expected an id, a tab"),
    ]:
        (tmp_path / "bad").write_text(content)
        with pytest.raises(UserError, match=said):
            trec.topics(tmp_path / "bad")


FINITE = st.floats(-1e30, 1e30)
RUNS = st.dictionaries(st.sampled_from("ab<é"), st.dictionaries(st.text("xyz<", min_size=1), FINITE, min_size=1))


@given(RUNS)
@settings(max_examples=40)
def test_a_run_reads_back_as_it_was(tmp_path_factory, run):
    path = tmp_path_factory.getbasetemp() / "a.run"
    trec.write(path, run)
    assert trec.read(path) == run
    for query in run:
        rows = [line.split() for line in path.read_text().split("\n") if line.startswith(f"{query} ")]
        assert [row[2] for row in rows] == trec.ranked(run[query])
        assert [row[3] for row in rows] == [str(n + 1) for n in range(len(rows))]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("q Q0 d 1 2.5 x\nq Q0 e 2 1.5", ":2: 5 columns, expected six columns"),
        ("q Q0 d 1 nan x", ":1: a score is nan; expected a finite"),
        ("q Q0 d 1 1e39 x", ":1: a score is 1e39"),
        ("q Q0 d 1 high x", ":1: 'high' is no number"),
        ("q Q0 d 1 1 x\nq Q0 d 2 1 x", ":2: document d stands twice"),
    ],
)
def test_what_is_wrong_with_a_run_is_said_by_line(tmp_path, content, said):
    (tmp_path / "a.run").write_text(content)
    with pytest.raises(UserError, match=said):
        trec.read(tmp_path / "a.run")


def test_ids_with_white_space_cannot_stand_in_a_run(tmp_path):
    for run in ({"a b": {"d": 1.0}}, {"q": {"": 1.0}}, {"q": {"d\te": 1.0}}):
        with pytest.raises(UserError, match="white space"):
            trec.write(tmp_path / "a.run", run)
    assert not (tmp_path / "a.run").exists()


def test_judgements_of_trec_and_of_beir_are_the_same(tmp_path):
    rows = [f"{q} 0 {d} {g}" for q, grades in JUDGED.items() for d, g in grades.items()]
    assert trec.judgements(lines(tmp_path / "qrels", *rows, "q2 0 d3 -1")) == {**JUDGED, "q2": {"d2": 1, "d3": -1}}
    for bad, said in [("q1 0 d2", ":1: 3 columns, expected four"), ("q1 0 d2 1.5", "the grade is '1.5'")]:
        with pytest.raises(UserError, match=said):
            trec.judgements(lines(tmp_path / "bad", bad))


# Triples and groups

TRIPLES = [("q1", "d<1>", "d2"), ("q2", "d2", "4"), ("q1", "d<1>", "4")]


def test_triples_are_the_same_in_every_form(tmp_path):
    from pyarrow import Table, parquet

    names = ("query_id", "positive_id", "negative_id")
    records = [dict(zip(names, row, strict=True)) for row in TRIPLES]
    parquet.write_table(Table.from_pylist(records), tmp_path / "a.parquet")
    files = [
        tmp_path / "a.parquet",
        lines(tmp_path / "a.jsonl.gz", *records),
        lines(tmp_path / "a.tsv", *("\t".join(row) for row in TRIPLES)),
        lines(tmp_path / "b.tsv", *("\t".join(("1.5", "0", *row)) for row in TRIPLES)),
        lines(tmp_path / "c.tsv", *("\t".join(("3,4", *row)) for row in TRIPLES)),
        lines(tmp_path / "lists.jsonl", *({"qid": q, "positive_id": [p], "negative_ids": [n]} for q, p, n in TRIPLES)),
    ]
    expected = [Group(q, p, (n,)) for q, p, n in TRIPLES]
    for file in files:
        kept, found, missing = groups.read(file, KEPT)
        assert list(found) == expected and kept is KEPT and missing.lost == 0 and missing.rows == 3
    assert sorted(found.pairs()) == sorted({(q, d) for q, *both in TRIPLES for d in both})


def test_triples_of_texts_are_a_collection_of_their_own(tmp_path):
    texted = [(QUERIES[q], DOCUMENTS[p], DOCUMENTS[n]) for q, p, n in TRIPLES]
    names = ("query", "positive", "negatives")
    records = [dict(zip(names, (q, p, [n]), strict=True)) for q, p, n in texted]
    for file in (lines(tmp_path / "a.jsonl", *records), lines(tmp_path / "a.tsv", *map("\t".join, texted))):
        kept, found, _ = groups.read(file)
        assert [(*kept.pair(g.query, g.positive), kept.documents[g.negatives[0]]) for g in found] == texted
        assert len(kept.queries) == 2 and len(kept.documents) == 3
        assert all(kept.positives(g.query) == [g.positive] for g in found)


def test_triples_that_name_absent_ids_are_counted_listed_and_bounded(tmp_path):
    bad = [("q1", "d<1>", f"x{i}") for i in range(7)] + [("q9", "d2", "4")]
    file = lines(tmp_path / "a.tsv", *("\t".join(row) for row in TRIPLES * 30 + bad))
    said = "8 of 98 rows .*queries q9; documents x0, x1, x2, x3, x4 and 2 more"
    with pytest.raises(UserError, match=f"{said}; at most 1.0% may"):
        groups.read(file, KEPT)
    _, found, missing = groups.read(file, KEPT, allowed=0.1)
    assert len(found) == 90 and missing.lost == 8 and list(missing.queries) == ["q9"] and len(missing.documents) == 7


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "q1\td2\t4\nq1\td2\n", ":2: 2 columns, expected 3 as above: query positive negative"),
        ("a.tsv", "q1\td2\n", ":1: 2 columns; expected tabs between 3: query positive negative; 4:"),
        ("a.tsv", "q1\td2\t4\nq1\td2\t", ":2: expected a line end; truncated?"),
        ("a.tsv", "q1\td2\t4\nq1\t\t4\n", ":2: an empty column"),
        ("a.tsv", "1.5\tx\tq1\td2\t4\n", ":1: 'x' is no number; expected negative_score"),
        ("a.jsonl", '{"query_id": "q1", "positive_id": "d2"}\n', ":1: expected a positive and at least one"),
        ("a.jsonl", '{"query_id": "q1", "positive_id": "d2", "negative_ids": []}\n', ":1: expected a positive and"),
        ("a.jsonl", '{"query_id": "q1", "positive": "d2", "negative_id": "4"}\n', ":1: found the keys"),
        ("a.jsonl", '{"query": "q1", "positive": "d2", "negative": "4"}\n', ":1: texts, not ids; give no coll"),
        ("a.jsonl", '{"query_id": "q1", "positive_id": "d2", "negative_id": 1.5}\n', ":1: 'negative_id' is '1.5'"),
        ("a.jsonl", '{"query_id": "q1", "positive_id": "d2", "negat', ":1: .*expected an object with query"),
        ("a.parquet", "PAR1", "not a sound parquet file"),
        ("a.csv", "q1,d2,4\n", "are read from tsv, jsonl, parquet"),
    ],
)
def test_what_is_wrong_with_triples_is_said_by_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        groups.read(tmp_path / name, KEPT)


def test_ids_without_their_collection_are_no_texts(tmp_path):
    for file in (lines(tmp_path / "a.tsv", "12\t13\t14"), lines(tmp_path / "a.jsonl", {"qid": 1, "positive_id": 2,
                 "negative_id": 3})):  # fmt: skip
        with pytest.raises(UserError, match=r":1: .*ids, not texts"):
            groups.read(file)


NAMES = st.sampled_from(["a", "b", "ü", "d\u2028"])
GROUPS = st.lists(st.builds(Group, NAMES, NAMES, st.lists(NAMES, min_size=1, max_size=5).map(tuple)), max_size=8)


@given(GROUPS, st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60)
def test_groups_are_what_was_gathered_and_cut_group_by_group(listed, count, seed):
    found = groups.gather(listed)
    assert list(found) == listed and len(found.negative) == sum(len(g.negatives) for g in listed)
    assert list(found.first(count)) == [g._replace(negatives=g.negatives[:count]) for g in listed]
    drawn = found.drawn(count, seed)
    assert len(drawn) == len(listed) and list(drawn) == list(found.drawn(count, seed))
    for some, every in zip(drawn, listed, strict=True):
        rest = iter(every.negatives)
        assert len(some.negatives) == min(count, len(every.negatives)) and all(name in rest for name in some.negatives)
    codes, places = found.codes()
    named = list(found.named(codes))
    assert named == list(found.pairs()) and len(set(named)) == len(named)
    expected = [(g.query, g.positive) for g in listed] + [(g.query, n) for g in listed for n in g.negatives]
    assert [named[place] for place in places] == expected


def test_every_negative_is_drawn_as_often():
    found = groups.gather([Group("q", "p", tuple("abcd")), Group("r", "p", ("a",))])
    drawn = Counter(name for seed in range(300) for name in found.drawn(2, seed)[0].negatives)
    assert set(drawn) == set("abcd") and all(120 < count < 180 for count in drawn.values())


def test_saved_groups_are_verified_when_they_are_loaded(tmp_path):
    found = groups.gather([Group("a\n", "b", ("c", "d")), Group("e", "c", ("b",))])
    groups.save(tmp_path / "g", found, {"x": 1})
    assert list(groups.load(tmp_path / "g")) == list(found) and groups.load(tmp_path / "g").digest == found.digest
    np.save(tmp_path / "g/positive.npy", found.positive[::-1])
    with pytest.raises(UserError, match="is damaged; remove it"):
        groups.load(tmp_path / "g")


# Docstrings

SOURCE = '''
"""Says what a module does.

It does one thing, and that it does as well as a module can do it."""
def one():
    """Opens a door of the house.

    The door is opened by turning its handle to the right and pushing hard.

        >>> one()
    """
def two():
    """Opens a door of the house.

    Another text with the same summary, which a search could not tell apart from it.
    """
def three():
    """Too short.

    A body of quite enough words, but its summary says next to nothing at all."""
def four():
    """Of this one the summary
    goes over two lines.

    A body of quite enough words that nobody asks for, as its summary is no line."""
'''


def test_a_summary_asks_for_the_body_below_it(tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text(SOURCE)
    monkeypatch.setattr(stdlib, "modules", lambda: [("m", tmp_path / "m.py"), ("n", tmp_path / "m.py")])
    assert docstrings.pairs.__wrapped__() == [
        ("Says what a module does.", "It does one thing, and that it does as well as a module can do it."),
        ("Opens a door of the house.", "The door is opened by turning its handle to the right and pushing hard."),
    ]


def test_the_two_sides_of_the_docstrings_share_no_query_and_no_answer():
    train, test = (docstrings.collection(side) for side in docstrings.SIDES)
    asked = [train.queries, test.queries]
    assert not asked[0].keys() & asked[1].keys()
    assert len(train.queries) + len(test.queries) == len(docstrings.pairs()) == len(test.documents) > 500
    assert {d for q in train.judgements for d in train.positives(q)} == train.documents.keys()
    assert not {d for q in test.judgements for d in test.positives(q)} & train.documents.keys()
    for side in (train, test):
        assert not side.unjudged and side.missing.lost == 0
        assert len({text.casefold() for text in side.documents.values()}) == len(side.documents)
    assert 0.15 < len(test.queries) / len(test.documents) < 0.25
    assert docstrings.collection("train", 0.0).queries.keys() == asked[0].keys() | asked[1].keys()
    with pytest.raises(UserError, match="no side 'dev', only train and test"):
        docstrings.collection("dev")


# Published scores

SCORED = {("q1", "d<1>"): 9.5, ("q1", "d2"): -1.25, ("q2", "d2"): 3.0, ("q2", "4"): 0.1, ("q1", "4"): 2.0}
TEXTED = {KEPT.pair(*pair): score for pair, score in SCORED.items()}


def scored_rows():
    return [(SCORED[q, p], SCORED[q, n], q, p, n) for q, p, n in TRIPLES]


def scored_files(directory):
    """(file, whether it holds ids) of the same scores in every form."""
    five = [[str(cell) for cell in row] for row in scored_rows()]
    nested = {}
    for (query, document), score in SCORED.items():
        nested.setdefault(query, {})[document] = score
    (directory / "a.pkl.gz").write_bytes(gzip.compress(pickle.dumps(nested)))
    yield lines(directory / "ids.tsv", *map("\t".join, five)), True
    texted = [[a, b, QUERIES[q], DOCUMENTS[p], DOCUMENTS[n]] for a, b, q, p, n in five]
    yield lines(directory / "texts.tsv.gz", *map("\t".join, texted)), False
    seven = [[a, f"{a} 0.5", b, f"{b} 7 8", q, p, n] for a, b, q, p, n in five]
    yield lines(directory / "seven.tsv", *map("\t".join, seven)), True
    yield directory / "a.pkl.gz", True
    records = [{"query_id": q, "positive_id": p, "negative_id": n, "score": [a, b]} for a, b, q, p, n in scored_rows()]
    yield lines(directory / "tuples.jsonl", *records), True
    each = [{"query": q, "positive": p, "negative": n, "positive_score": float(a), "negative_score": float(b)}
            for a, b, q, p, n in texted]  # fmt: skip
    yield lines(directory / "each.jsonl", *each), False
    many = [{"query_id": q, "document_ids": list(d), "scores": list(d.values())} for q, d in nested.items()]
    yield lines(directory / "lists.jsonl", *many), True
    yield (
        lines(directory / "pairs.jsonl", *({"query": q, "document": d, "score": s} for (q, d), s in TEXTED.items())),
        False,
    )


def test_published_scores_are_the_same_in_every_form(tmp_path):
    for number, (file, ids) in enumerate(scored_files(tmp_path)):
        out = tmp_path / f"store{number}"
        found = importers.store(file, out, teacher="T2", collection=KEPT if ids else None)
        assert read_store(out, *TEXTED) == np.float32(list(TEXTED.values())).tolist(), file
        assert (found.pairs, found.differing, found.missing.lost) == (5, 0, 0) and found.scored in (5, 6)
        (producer,) = scores.Reader(out).about.producers
        assert producer["teacher"] == "T2" and len(producer["file"]) == 64
        assert importers.store(file, out, teacher="T2", collection=KEPT if ids else None) == found  # again: nothing new
        with pytest.raises(UserError, match="holds other scores: producers is"):
            importers.store(file, out, teacher="T1", collection=KEPT if ids else None)


def test_a_pair_that_stands_again_with_another_score_is_said(tmp_path):
    five = ["1\t0\tq1\td2\t4", "1\t0.5\tq1\td2\t4", "3\t0\tq1\td2\td3"]
    found = importers.store(lines(tmp_path / "a.tsv", *five), tmp_path / "s", teacher="t", collection=KEPT)
    assert (found.pairs, found.scored, found.differing, found.largest) == (3, 6, 2, 2.0)
    assert read_store(tmp_path / "s", KEPT.pair("q1", "d2"), KEPT.pair("q1", "4")) == [1, 0]  # the first


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "1\t0\tq1\td2\t4\nnan\t0\tq1\td2\t4\n", ":2: a score is nan; expected a finite"),
        ("a.tsv", "1\t0\tq1\td2\t4\n1\tinf\tq1\td2\t4\n", ":2: a score is inf"),
        ("a.tsv", "1\t0\tq1\td2\t4\n1\t0\tq1\td2\n", ":2: 4 columns, expected 5 as above: positive_score"),
        ("a.tsv", "1\t0\tq1\td2\t4\n1\t0\tq1\td2\t4", ":2: expected a line end; truncated"),
        ("a.tsv", "1\t0\tq1\td2\t4\n\n", ":2: 1 columns, expected 5"),
        ("a.tsv", "1\t0\tq1\td2\t4\t5\n", ":1: 6 columns; expected tabs between"),
        ("a.tsv", "q1\td2\t4\n", ":1: no scores here; expected 3:"),
        ("a.tsv", "1\t0\tq1\td2\tx\n", "1 of 1 rows .*documents x"),
        (
            "a.jsonl",
            '{"query_id": "q1", "positive_id": "d2", "negative_id": "4", "score": 2.5}\n',
            ":1: 1 scores for 2",
        ),
        ("a.jsonl", '{"query_id": "q1", "document_id": "d2", "score": NaN}\n', ":1: a score is nan"),
        ("a.jsonl", '{"query_id": "q1", "document_id": "d2", "score": "2"}\n', r":1: the scores are \['2'\]"),
        ("a.jsonl", '{"query_id": "q1", "document_id": "d2", "score": true}\n', r":1: the scores are \[True\]"),
        ("a.jsonl", '{"query_id": "q1", "document_id": "d2", "sco', ":1: .*expected an object with query"),
        ("a.jsonl", '{"query": "a", "document": "b", "score": 1}\n', ":1: texts; give no collection"),
    ],
)
def test_what_is_wrong_with_published_scores_is_said_by_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        importers.store(tmp_path / name, tmp_path / "s", teacher="t", collection=KEPT)
    assert not list(tmp_path.glob("s/r*"))


IDS = st.one_of(st.integers(-(2**40), 2**40), st.text(max_size=9))


@given(st.dictionaries(IDS, st.dictionaries(IDS, st.floats(-9, 9), max_size=4), max_size=4), st.integers(2, 5))
@settings(max_examples=60)
def test_a_pickle_of_scores_is_read_as_it_was_written(tmp_path_factory, nested, protocol):
    from distill.ranking import pickled

    path = tmp_path_factory.getbasetemp() / "a.pkl"
    path.write_bytes(pickle.dumps(nested, protocol))
    found = [(pair.query, pair.document, pair.score) for pair in pickled.pairs(path)]
    assert found == [(str(q), str(d), s) for q, inner in nested.items() for d, s in inner.items()]


SHARED = {"d": 1.0}  # the second time it stands in a pickle as a reference


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_executed(tmp_path):
    from distill.ranking import pickled

    for harmful in (Runs(tmp_path / "made"), {"q": {"d": Runs(tmp_path / "made")}}, {Runs(tmp_path / "made"): {}}):
        for protocol in range(6):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(harmful, protocol))
            with pytest.raises(UserError, match="expected a pickle of"):
                list(pickled.pairs(tmp_path / "a.pkl"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"q": {"d": float("nan")}},
        {"q": {"d": "1"}},
        {"q": {"d": {}}},
        {"q": SHARED, "r": SHARED},
        {"q": 1.0},
        [("q", "d", 1.0)],
        {"q": {"d": [1.0]}},
        {"q": {1.5: 2.0}},
        {1.5: {"d": 1.0}},
        {"q": {"d": np.float32(1)}},
        {"x" * 2000: {"d": 1.0}},
        "text",
    ],
    ids=repr,
)
def test_a_pickle_of_anything_else_is_refused(tmp_path, wrong):
    from distill.ranking import pickled

    (tmp_path / "a.pkl").write_bytes(pickle.dumps(wrong))
    with pytest.raises(UserError, match="pkl: byte"):
        list(pickled.pairs(tmp_path / "a.pkl"))


def test_a_truncated_or_damaged_pickle_is_refused(tmp_path):
    from distill.ranking import pickled

    nested = {q: {d: len(q) / 3 for d in ("a", "b", "c")} for q in ("q", "r", "qq")}
    whole = pickle.dumps(nested)
    for cut in range(len(whole)):
        (tmp_path / "a.pkl").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="truncated"):
            list(pickled.pairs(tmp_path / "a.pkl"))
    rng = np.random.default_rng(0)
    for place, byte in zip(rng.integers(0, len(whole), 300), rng.integers(0, 256, 300), strict=True):
        (tmp_path / "a.pkl").write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        try:
            list(pickled.pairs(tmp_path / "a.pkl"))
        except UserError as error:
            assert "byte" in str(error)  # and no other error


# Ensembles

PAIRS = [(f"q{i}", f"d{i}") for i in range(9)]


def test_an_ensemble_of_one_is_itself(tmp_path):
    one = write_store(tmp_path / "a", {pair: i / 7 for i, pair in enumerate(PAIRS)})
    for weights in (None, [3.0]):
        out = tmp_path / f"out{weights}"
        assert stores.ensemble([one], out, weights=weights) == stores.Ensemble(9, (0,))
        assert read_store(out, *PAIRS) == read_store(one, *PAIRS)


def test_an_ensemble_is_the_weighted_mean_of_the_pairs_that_all_have(tmp_path):
    a = write_store(tmp_path / "a", {pair: i for i, pair in enumerate(PAIRS[:6])}, "a")
    b = write_store(tmp_path / "b", {pair: 10 * i for i, pair in enumerate(PAIRS[2:])}, "b")
    found = stores.ensemble([a, b], tmp_path / "c", weights=[3, 1])
    assert found == stores.Ensemble(4, (2, 3)) and "left out: 2, 3" in str(found)
    reader = scores.Reader(tmp_path / "c")
    assert len(reader) == 4 and reader.missing(scores.pair_keys(PAIRS[6:] + PAIRS[:2])).all()
    assert read_store(tmp_path / "c", *PAIRS[2:6]) == [0.75 * (i + 2) + 0.25 * 10 * i for i in range(4)]
    assert [(p["teacher"], p["weight"]) for p in reader.about.producers] == [("a", 0.75), ("b", 0.25)]
    nothing = write_store(tmp_path / "d", {("x", "y"): 1.0})
    with pytest.raises(UserError, match="have no pair in common"):
        stores.ensemble([a, nothing], tmp_path / "e")


def test_standardised_teachers_count_the_same_whatever_their_scale(tmp_path):
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=9), rng.normal(size=9)
    a = write_store(tmp_path / "a", dict(zip(PAIRS, first, strict=True)))
    b = write_store(tmp_path / "b", dict(zip(PAIRS, second, strict=True)))
    alone = {("only", "here"): 1e6}  # does not count: the others lack it
    c = write_store(tmp_path / "c", {**dict(zip(PAIRS, 40 * second - 9, strict=True)), **alone}, unit="sigmoid")
    stores.ensemble([a, b], tmp_path / "ab", standardise=True)
    stores.ensemble([a, c], tmp_path / "ac", standardise=True)
    expected = sum((x - x.mean()) / x.std() for x in (first, second)) / 2
    for out in ("ab", "ac"):
        np.testing.assert_allclose(read_store(tmp_path / out, *PAIRS), expected, atol=1e-5)
    with pytest.raises(UserError, match="scores in logit and sigmoid have no mean; standardise"):
        stores.ensemble([a, c], tmp_path / "x")
    flat = write_store(tmp_path / "flat", dict.fromkeys(PAIRS, 1.0))
    with pytest.raises(UserError, match="they cannot be standardised"):
        stores.ensemble([a, flat], tmp_path / "x", standardise=True)
    for weights in ([1], [1, 0], [1, -1], [1, math.nan]):
        with pytest.raises(UsageError, match="every store needs a weight above 0"):
            stores.ensemble([a, b], tmp_path / "x", weights=weights)


def test_what_a_teacher_says_of_groups_is_counted_by_pair(tmp_path):
    found = groups.gather([Group("q1", "d<1>", ("d2", "4", "d3")), Group("q2", "d2", ("4", "d5", "d<1>"))])
    known = {**SCORED, ("q1", "d3"): 9.5, ("q2", "d5"): 4.0}
    path = write_store(tmp_path / "s", {KEPT.pair(*pair): score for pair, score in known.items()})
    positive, negative = stores.of_groups(scores.Reader(path), KEPT, found)
    assert positive.tolist() == [9.5, 3.0] and negative[:3].tolist() == [-1.25, 2.0, 9.5] and np.isnan(negative[5])
    told = stores.margins(scores.Reader(path), KEPT, found)
    margins = [10.75, 7.5, 0.0, 3.0 - float(np.float32(0.1)), -1.0]
    assert (told.pairs, told.lacking, told.accuracy) == (6, 1, 3.5 / 5)
    assert (told.mean, told.deviation) == pytest.approx((np.mean(margins), np.std(margins)))
    assert told.quantiles[2] == sorted(margins)[2] and "70.0% of 5 pairs in order (1 lack" in str(told)
    other = Collection({q: f"{text}?" for q, text in QUERIES.items()}, DOCUMENTS, JUDGED)
    with pytest.raises(UserError, match="has no score of these pairs"):
        stores.margins(scores.Reader(path), other, found)


# Search and mining


def bm25(documents, query, k1, b):
    """Lucene's variant, from its definition, in float64."""
    words = {name: Counter(search.WORD.findall(text.lower())) for name, text in documents.items()}
    mean = sum(found.total() for found in words.values()) / len(words)
    totals = dict.fromkeys(documents, 0.0)
    for word in search.WORD.findall(query.lower()):
        having = sum(word in found for found in words.values())
        idf = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
        for name, found in words.items():
            totals[name] += idf * found[word] / (found[word] + k1 * (1 - b + b * found.total() / mean))
    return {name: total for name, total in totals.items() if total > 0}


def test_bm25_is_its_formula(tmp_path):
    queries = {**QUERIES, "q4": "fox fox RED nothing", "q5": "nothing known"}
    found = search.BM25(DOCUMENTS).run(queries, 4)
    for query, text in queries.items():
        expected = bm25(DOCUMENTS, text, search.K1, search.B)
        assert list(found[query]) == trec.ranked(found[query]) == trec.ranked(expected)[:4]
        assert found[query] == pytest.approx({name: expected[name] for name in found[query]}, rel=1e-6)
    assert found["q5"] == {} and len(found["q1"]) == 3
    with pytest.raises(UserError, match="without a single word"):
        search.BM25({"a": "..."})


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=40)
def test_dense_search_is_exact_with_ties_by_id_however_it_is_cut(k, chunk, seed):
    rng = np.random.default_rng(seed)
    queries, documents = (
        rng.integers(-1, 2, (3, 2)),
        rng.integers(-1, 2, (8, 2)),
    )  # many equal scores, negative ones too
    ids = [f"d{i}" for i in rng.permutation(11)[:8]]
    found = search.dense(queries.astype(np.float16), documents.astype(np.float32), "abc", ids, k, chunk=chunk)
    for row, query in zip(queries, "abc", strict=True):
        every = dict(zip(ids, (documents @ row).tolist(), strict=True))
        best = trec.ranked(every)[:k]
        assert list(found[query]) == best and found[query] == {name: every[name] for name in best}


def test_the_two_zeros_are_one_score():
    import torch

    assert list(search.Order(["b", "a", "c"]).best(torch.tensor([[0.0, -0.0, -1e-45]]), 3)[0]) == ["a", "b", "c"]


def test_dense_search_refuses_what_is_no_number_and_what_does_not_fit():
    with pytest.raises(UserError, match="a vector is NaN or infinite"):
        search.dense(np.ones((1, 2)), np.array([[1, np.inf]]), ["q"], ["d"], 1)
    with pytest.raises(ValueError, match="1 vectors of 2 queries"):
        search.dense(np.ones((1, 2)), np.ones((1, 2)), ["q", "r"], ["d"], 1)


NUMBERS = st.integers(0, 3)
SMALL = st.dictionaries(st.sampled_from("qrs"), st.dictionaries(st.sampled_from("abcdef"), NUMBERS), min_size=1)


@given(SMALL, SMALL, st.integers(1, 6), st.integers(0, 2), st.integers(1, 2))
@settings(max_examples=100)
def test_no_answer_is_ever_a_negative(judged, found, depth, skip, at_least):
    documents = {name: f"text {name}" for name in "abcde"} | {"f": "text a"}  # f says what a says
    kept = Collection(dict.fromkeys("qrs", "?"), documents, judged)
    run = {query: {name: float(score) for name, score in scored.items()} for query, scored in found.items()}
    try:
        mined = list(mining.candidates(kept, run, depth=depth, skip=skip, at_least=at_least))
    except UserError:
        mined = []
    expected = []
    for query in run:
        answers = {documents[name] for name, grade in judged.get(query, {}).items() if grade > 0}
        rest = [name for name in trec.ranked(run[query])[:depth][skip:] if documents[name] not in answers]
        positives = [name for name, grade in judged.get(query, {}).items() if grade >= at_least]
        expected += [Group(query, name, tuple(rest)) for name in positives if rest]
    assert mined == (expected if skip < depth else [])


def test_false_negatives_are_told_by_a_margin_or_by_a_share(tmp_path):
    found = groups.gather([Group("q1", "d<1>", ("d2", "4", "d3")), Group("q2", "d2", ("4",))])
    known = {**SCORED, ("q1", "d3"): 9.0, ("q2", "4"): 2.9}
    path = write_store(tmp_path / "s", {KEPT.pair(*pair): score for pair, score in known.items()})
    reader = scores.Reader(path)
    by_margin = mining.filtered(found, KEPT, reader, FalseNegatives(margin=7.5))
    assert list(by_margin.groups) == [Group("q1", "d<1>", ("d2", "4"))]  # 9.5 - 2.0 is just enough
    assert (by_margin.dropped, by_margin.emptied) == (2, 1)
    by_share = mining.filtered(found, KEPT, reader, FalseNegatives(share=0.97))
    assert list(by_share.groups) == [Group("q1", "d<1>", ("d2", "4", "d3")), Group("q2", "d2", ("4",))]
    assert list(mining.filtered(found, KEPT, reader, FalseNegatives(share=0.9)).groups) == list(by_margin.groups)
    with pytest.raises(UserError, match="1 positives score 0 or less"):
        mining.filtered(groups.gather([Group("q1", "d2", ("4",))]), KEPT, reader, FalseNegatives(share=0.9))
    with pytest.raises(UserError, match="lacks the scores of 1 places"):
        mining.filtered(groups.gather([Group("q1", "d2", ("d5",))]), KEPT, reader, FalseNegatives(margin=0.0))
    for wrong in ({}, {"margin": 1.0, "share": 0.5}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(UsageError):
            FalseNegatives(**wrong)


def test_mining_by_words_is_kept_under_what_it_was_made_of(tmp_path, monkeypatch):
    first = mining.by_words(KEPT, tmp_path, depth=3)
    assert list(first) == [Group("q1", "d<1>", ("d5", "4")), Group("q2", "d2", ("4",))]
    monkeypatch.setattr(search, "BM25", None)  # nothing is searched again
    assert list(mining.by_words(KEPT, tmp_path, depth=3)) == list(first)
    for other in (
        lambda: mining.by_words(KEPT, tmp_path, depth=2),
        lambda: mining.by_words(Collection(QUERIES, {**DOCUMENTS, "d3": "x"}, JUDGED), tmp_path, depth=3),
    ):
        with pytest.raises(TypeError):
            other()
    with pytest.raises(UserError, match="none of 1 queries has both"):
        mining.candidates(KEPT, {"q3": {"d2": 1.0}})
    with pytest.raises(UsageError, match="nothing is left"):
        mining.candidates(KEPT, {"q1": {"d2": 1.0}}, depth=2, skip=2)


# Measures


def reference(ranking, grades, at):
    """nDCG@at, RR@at, AP and recall@at from their definitions, in float64."""
    gains = [max(grades.get(name, 0), 0) for name in ranking]
    ideal = sorted((max(g, 0) for g in grades.values()), reverse=True)
    dcg, best = (sum(g / math.log2(i + 2) for i, g in enumerate(x[:at])) for x in (gains, ideal))
    hits = [i for i, gain in enumerate(gains) if gain > 0]
    answers = sum(g > 0 for g in ideal)
    precision = sum((n + 1) / (i + 1) for n, i in enumerate(hits)) / answers
    first = next((1 / (i + 1) for i in hits if i < at), 0.0)
    return {
        f"nDCG@{at}": dcg / best,
        f"RR@{at}": first,
        "AP": precision,
        f"R@{at}": sum(i < at for i in hits) / answers,
    }


@given(st.integers(0, 10**6))
@settings(max_examples=40)
def test_measures_are_their_definitions_with_ties_by_id(seed):
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in rng.permutation(30)[:20]]
    judged = {q: {n: int(g) for n, g in zip(names[:12], rng.integers(-1, 3, 12), strict=True)} for q in "abcd"}
    judged["a"][names[0]] = 1
    run = {q: {n: float(s) for n, s in zip(names[4:], rng.integers(0, 4, 16) / 7, strict=True)} for q in "abcd"}
    found = measures.evaluate(run, judged, measures=["nDCG@5", "RR@5", "AP", "R@5"])
    answered = [q for q in "abcd" if max(judged[q].values()) > 0]
    expected = {q: reference(trec.ranked(run[q]), judged[q], 5) for q in answered}
    for name, values in found.queries.items():
        assert values == pytest.approx({q: expected[q][name] for q in answered}, abs=1e-12)
        assert found.means[name] == pytest.approx(np.mean([expected[q][name] for q in answered]), abs=1e-12)


def test_scores_that_differ_in_the_ninth_digit_are_different():
    run = {"q": {"a": 1.0, "b": 1.000000001}}
    assert measures.evaluate(run, {"q": {"b": 1}}, measures=["RR@10"]).means == {"RR@10": 1.0}


def test_queries_that_do_not_count_are_listed():
    judged = {"a": {"x": 1}, "b": {"x": 0}, "c": {"y": 2}, "d": {}}
    found = measures.evaluate({"a": {"z": 1.0, "x": 1.0}, "e": {"x": 1.0}}, judged, ["a", "f"], ["MRR@10", "MAP"])
    assert (found.unjudged, found.answerless, found.unranked, found.tied) == (("f", "e", "d"), ("b",), ("c",), ("a",))
    assert found.means == {"MRR@10": 0.5, "MAP": 0.5} and found.queries["MAP"] == {"a": 1.0, "c": 0.0}
    assert "over 2 queries; 3 without a judgement; 1 without an answer" in str(found)
    assert (
        measures.evaluate({"c": {"x": 2.0, "y": 1.0}}, judged, measures=["RR(rel=2)@10"]).means["RR(rel=2)@10"] == 0.25
    )
    with pytest.raises(UserError, match="none of 1 queries has a document that answers it"):
        measures.evaluate({"a": {"x": 1.0}}, {})


@pytest.mark.parametrize("wrong", ["ndgc@10", "nDCG@", "foo(", "nDCG(rel='a')@10", ""])
def test_a_measure_that_is_none_is_said(wrong):
    with pytest.raises(UsageError):
        measures.evaluate({"a": {"x": 1.0}}, {"a": {"x": 1}}, measures=[wrong])


# Significance


def test_identical_systems_differ_by_chance_alone():
    for n in (3, 40):
        values = {str(i): i / n for i in range(n)}
        told = significance.compare(values, dict(values))
        assert (told.difference, told.p, told.low, told.high, told.items) == (0, 1, 0, 0, n)


@given(st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=40), st.integers(0, 3))
@settings(max_examples=40)
def test_the_comparison_turns_round_with_its_systems(differences, seed):
    one = {str(i): d for i, d in enumerate(differences)}
    other = dict.fromkeys(one, 0.0)
    there, back = (significance.compare(*pair, rounds=500, seed=seed) for pair in ((one, other), (other, one)))
    assert there.p == back.p and 0 < there.p <= 1 and there.difference == -back.difference
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-12)
    assert significance.compare(one, other, rounds=500, seed=seed) == there


def test_p_is_the_share_of_sign_patterns_that_differ_as_much():
    differences = np.array([0.3, -0.1, 0.2, 0.25, 0.1, 0.3, 0.05, 0.2])
    signs = itertools.product((1, -1), repeat=8)
    sums = [abs(sum(s * d for s, d in zip(pattern, differences, strict=True))) for pattern in signs]
    expected = sum(total >= differences.sum() - 1e-12 for total in sums) / 2**8
    assert significance.randomisation(differences, 256) == (expected, True)
    drawn, exact = significance.randomisation(differences, 255)
    assert not exact and abs(drawn - expected) < 4 * math.sqrt(expected / 255)


def test_the_interval_of_many_queries_is_that_of_a_normal_mean():
    differences = np.random.default_rng(1).normal(0.2, 3.0, size=1000)
    low, high = significance.interval(differences, 4000)
    reach = 1.96 * differences.std() / math.sqrt(1000)
    assert (low, high) == pytest.approx((differences.mean() - reach, differences.mean() + reach), abs=0.08 * reach)


def test_p_is_even_when_nothing_differs_and_small_when_all_does():
    rng = np.random.default_rng(2)
    chance = [significance.randomisation(rng.normal(size=30), 400, seed)[0] for seed in range(200)]
    assert 0.4 < np.mean(chance) < 0.6 and np.mean(np.array(chance) < 0.05) < 0.1
    assert significance.randomisation(np.full(30, 0.1), 999)[0] == 1 / 1000


def test_correlations_are_compared_by_their_mean_difference_over_seeds():
    """Against plain loops over scipy; ties included."""
    rng = np.random.default_rng(3)
    gold = rng.integers(0, 6, size=60).astype(float)
    near, far = ([gold + rng.normal(scale=scale, size=60) for _ in range(2)] for scale in (1.0, 3.0))
    told = significance.compare_correlations(near, far, gold, rounds=4000)
    assert told.difference == pytest.approx(
        np.mean([spearmanr(a, gold)[0] - spearmanr(b, gold)[0] for a, b in zip(near, far, strict=True)])
    )
    drawn = []
    for _ in range(1000):
        items = rng.integers(0, 60, size=60)
        drawn += [np.mean([spearmanr(a[items], gold[items])[0] - spearmanr(b[items], gold[items])[0]
                           for a, b in zip(near, far, strict=True)])]  # fmt: skip
    assert (told.low, told.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.05)
    assert told.p < 0.01 and (told.items, told.of) == (60, "pairs")


def test_equal_correlations_differ_by_chance_alone():
    rng, gold = np.random.default_rng(4), np.arange(40.0)
    same = significance.compare_correlations([gold], [gold + 0.1], gold, rounds=99)
    assert (same.difference, same.p, same.low, same.high) == (0, 1, 0, 0)
    noisy = [[[gold + rng.normal(scale=20, size=40)] for _ in range(2)] for _ in range(100)]
    chance = [significance.compare_correlations(one, other, gold, rounds=200).p for one, other in noisy]
    assert 0.35 < np.mean(chance) < 0.65 and np.mean(np.array(chance) < 0.05) < 0.12
    assert significance.compare_correlations([np.zeros(40)], [gold], gold, rounds=50).difference == -1  # ranks nothing


def test_systems_on_other_queries_are_not_compared():
    with pytest.raises(UserError, match="2 only one of them has"):
        significance.compare({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0})
