"""Laws of data stages on queries and documents: what is prepared, mined, scored, filtered; kills, ranks, strangers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import transformers

from distill import recipe as recipes
from distill import scores, stages, world
from distill.context import Context
from distill.forecast import show
from distill.ranking import (
    collection,
    dense,
    groups,
    kinds,
    mining,
    opening,
    pairing,
    prepared,
    rankers,
    search,
    stores,
)
from distill.ranking.groups import Group
from distill.specs import CollectionSpec
from growth import console, files
from growth.errors import UsageError, UserError

TEXT = "the old dog sat by a red fox near some quiet river while many birds sang above it"
WORDS = TEXT.split(" ")
ASKED = {f"q{i}": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4]) for i in range(9)}
SAID = {f"d{i}": " ".join(WORDS[(i * 7 + k) % len(WORDS)] for k in range(2 + i * 5 % 11)) for i in range(14)}
JUDGED = {"q0": {"d0": 1, "d3": 2}, **{f"q{i}": {f"d{i}": 1} for i in range(1, 8)}}
LENGTHS = {"query_length": 12, "passage_length": 40}
DUAL = {"pooling": "mean", **LENGTHS}


def lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def beir(directory, titled=False, judged=True):
    title = {"title": "Red"} if titled else {}
    lines(directory / "corpus.jsonl", *({"_id": name, "text": text, **title} for name, text in SAID.items()))
    lines(directory / "queries.jsonl", *({"_id": name, "text": text} for name, text in ASKED.items()))
    if judged:
        lines(directory / "qrels.tsv", *(f"{q}\t{d}\t{g}" for q, found in JUDGED.items() for d, g in found.items()))
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A collection, an encoder, a published cross-encoder, a triples file."""
    root = tmp_path_factory.mktemp("pairs")
    beir(root / "beir")
    tiny.save(tiny.model("bert", seed=1), root / "encoder", tiny.tokenizer())
    torch.manual_seed(3)
    cross = transformers.BertForSequenceClassification(tiny.config("bert", num_labels=1))
    with torch.no_grad():
        for p in cross.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    tiny.save(cross.eval(), root / "cross", tiny.tokenizer())
    lines(root / "triples.tsv", "q0\td0\td9", "q0\td0\td8", "q5\td5\td1", "q8\td2\td1")
    return root


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    """Not measured: it takes longer than the work."""
    monkeypatch.setattr(pairing, "matmul_speed", lambda *_: (1e9, "CPU"))


RECIPE = """
recipe: pairs
models:
  dual: {{from: {root}/encoder, ranker: {{dual_encoder: {dual}}}}}
  cross: {{from: {root}/cross, ranker: {{cross_encoder: {lengths}}}}}
collections:
  docs: {{source: {root}/beir}}
  marco: {{source: {root}/beir, triples: {root}/triples.tsv}}
stages:
{stages}
"""
MINED = "- {id: mined, data: {from: docs, ops: [{mine: {by: bm25, depth: 6}}]}}"
SCORED = "- {id: scored, data: {from: mined, ops: [{score_pairs: {teacher: cross}}]}}"


def recipe(place, tmp_path, *written):
    filled = RECIPE.format(root=place, stages="\n".join(written), dual=json.dumps(DUAL), lengths=json.dumps(LENGTHS))
    path = tmp_path / "r.yaml"
    path.write_text(filled)
    return recipes.load(path)


def run(place, tmp_path, *written):
    stages.run(recipe(place, tmp_path, *written), tmp_path / "out")
    return tmp_path / "out"


def metrics(out, stage):
    return json.loads((out / stage / "stage.json").read_text())["metrics"]


def opened(place, name="dual"):
    given = {"dual": kinds.DualKind(**DUAL), "cross": kinds.CrossKind(**LENGTHS)}[name]
    return opening.open_at(opening.form(place / {"dual": "encoder", "cross": "cross"}[name], given))


def some_groups():
    """Every query with its answers, and negatives from all over."""
    return groups.gather(
        Group(query, d, tuple(n for n in SAID if n not in judged and hash_of(query, n) % 3))
        for query, judged in JUDGED.items()
        for d in judged
    )


def hash_of(*names):
    return sum(map(ord, "".join(names)))


def bytes_of(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


# --- collections ------------------------------------------------------------------------------------------------------


def test_a_prepared_collection_is_the_one_that_was_read(tmp_path):
    spec = CollectionSpec(source=str(beir(tmp_path / "c")))
    prepared.prepare(spec, tmp_path / "out")
    found, listed = prepared.Ranking(tmp_path / "out").open()
    assert (dict(found.queries), dict(found.documents), found.judgements, listed) == (ASKED, SAID, JUDGED, None)
    assert found.digest == collection.beir(tmp_path / "c").digest


def test_a_collection_is_made_again_only_when_what_it_is_of_has_changed(tmp_path, capsys):
    spec, out = CollectionSpec(source=str(beir(tmp_path / "c"))), tmp_path / "out"
    prepared.prepare(spec, out)
    first = prepared.Ranking(out).digest
    prepared.prepare(spec, out)
    assert capsys.readouterr().err.count("collection ") == 1
    lines(tmp_path / "c/qrels.tsv", "q1\td4\t1")
    prepared.prepare(spec, out)
    assert prepared.Ranking(out).digest != first and capsys.readouterr().err.count("(1 judged)") == 1
    (out / "documents/texts").write_bytes(b"")
    prepared.prepare(spec, out)
    assert dict(prepared.opened(out).documents) == SAID


def test_a_kill_leaves_no_half_of_a_collection(tmp_path, monkeypatch):
    spec = CollectionSpec(source=str(beir(tmp_path / "c")))
    monkeypatch.setattr(files, "fault", lambda point: 1 / 0 if point == "commit.before_rename" else None)
    with pytest.raises(ZeroDivisionError):
        prepared.prepare(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_triples_bring_groups_and_where_nothing_is_judged_what_answers(place, tmp_path):
    def both(source, **more):
        prepared.prepare(CollectionSpec(source=source, triples=str(place / "triples.tsv"), **more), tmp_path / "out")
        return prepared.Ranking(tmp_path / "out", tmp_path / "out/groups").open()

    found, listed = both(str(place / "beir"))
    assert found.judgements == JUDGED and listed[0] == ("q0", "d0", ("d9",)) and len(listed) == 4
    found, _ = both(str(beir(tmp_path / "unjudged", judged=False)))
    assert found.judgements == {"q0": {"d0": 1}, "q5": {"d5": 1}, "q8": {"d2": 1}}
    lines(tmp_path / "t.tsv", "what sat\tthe old dog\ta red fox", "what sat\tthe old dog\tmany birds")
    prepared.prepare(CollectionSpec(triples=str(tmp_path / "t.tsv")), tmp_path / "texts")
    found, listed = prepared.Ranking(tmp_path / "texts", tmp_path / "texts/groups").open()
    assert list(found.documents.values()) == ["the old dog", "a red fox", "many birds"] and len(listed) == 2
    assert found.pair(listed[1].query, listed[1].negatives[0]) == ("what sat", "many birds")


@pytest.mark.parametrize(
    ("text", "first", "rest"),
    [
        ("The dog sat down. It was old.", "The dog sat down.", "It was old."),
        ("Why? Nobody knows it. The end.", "Why? Nobody knows it.", "The end."),  # one word asks nothing
        ("It costs 3.5 euros e.g. here. More.", "It costs 3.5 euros e.g. here.", "More."),
        ("one two three four five six seven eight nine", "one two three four five six seven eight", "nine"),
        ("too short to cut.", "too short to cut.", ""),
    ],
)
def test_how_a_text_begins_asks_for_the_rest(text, first, rest):
    assert collection.opening(text) == (first, rest)


def test_openings_ask_and_no_answer_holds_its_question(tmp_path):
    texts = {"a": "The dog sat down. It was old.", "b": "Too short.", "c": "The dog sat down. It was red.", "d": ""}
    lines(tmp_path / "corpus.jsonl", *({"_id": name, "text": text} for name, text in texts.items()))
    prepared.prepare(CollectionSpec(source=str(tmp_path), ask="openings"), tmp_path / "out")
    found = prepared.opened(tmp_path / "out")
    assert dict(found.queries) == {"opening of a": "The dog sat down."}
    assert dict(found.documents) == {"a": "It was old.", "c": "It was red."}
    assert found.judgements == {"opening of a": {"a": 1, "c": 1}}
    again = [collection.openings(tmp_path, store=tmp_path / "store").digest for _ in range(2)]  # made, then opened
    assert again == [found.digest] * 2


def test_the_docstrings_have_two_sides(tmp_path):
    for split in ("train", "test"):
        prepared.prepare(CollectionSpec(source="docstrings", split=split), tmp_path / split)
    train, test = (prepared.opened(tmp_path / split) for split in ("train", "test"))
    assert not train.queries.keys() & test.queries.keys() and test.documents.keys() > train.documents.keys()


# --- what a recipe may say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "put", "said"),
    [
        ("from: docs", "from: dosc", "stages.mined.data.from: no corpus or collection 'dosc'; did you mean 'docs'?"),
        ("by: bm25", "by: bm52", "mine.by: no model or earlier stage 'bm52'; did you mean 'bm25'?"),
        ("teacher: cross", "teacher: mined", "score_pairs.teacher: stage 'mined' trains nothing, so it is no model"),
        ("teacher: cross", "ensemble: [cross]", "score_pairs.ensemble: at least 2 needed, found 1"),
        ("teacher: cross", "ensemble: [cross, cross]", "ensemble: a ranker stands twice; give it a weight instead"),
        ("teacher: cross", "teacher: cross, ensemble: [cross, dual]", "exactly one of teacher, ensemble is needed"),
        ("teacher: cross", "teacher: cross, weights: [1.0]", "weights: only an ensemble has several to weigh"),
        ("teacher: cross", "ensemble: [cross, dual], weights: [1.0]", "weights: 1 of them for 2 rankers"),
        ("depth: 6", "depth: 6, skip: 6", "mine: skip: 6 of the 6 best leaves nothing"),
        ("docs: {", "dual: {", "collections.dual: 'dual' is a model already; a name means one thing"),
        ("id: mined", "id: marco", "stages.marco.id: 'marco' is a collection already; a name means one thing"),
        ("id: mined", "id: collections", "'collections' is a directory of every run"),
        ("id: mined", "id: bm25", "'bm25' is the search by words"),
        ("id: scored, data: {from: mined", "id: scored, data: {from: scored", "no corpus or collection 'scored'"),
        ("/beir}", "/beir, ask: titel}", "ask: 'titel' is not one of judged, titles, openings"),
        ("/beir}", "/beir, ask: titles, split: dev}", "split: with ask: titles the documents themselves ask"),
        ("source: ", "sorce: ", "no key 'sorce'; did you mean 'source'?"),
        ("docs: {source:", "docs: {source: docstrings, split: dev}\n  no: {source:", "the docstrings have train and"),
        ("docs: {", "docs: {source: docstrings, ask: titles}\n  no: {", "ask: titles are those of a directory"),
        ("docs: {", "docs: {}\n  no: {", "collections.docs: source or triples is needed"),
        ("mine: {by: bm25, depth: 6}", "label: {teacher: dual}", "label reads the rows of a corpus; 'docs' is a coll"),
        ("margin: 0.5", "margin: 0.5, share: 0.5", "exactly one of margin, share is needed"),
        ("by: scored", "by: mined", "no earlier data stage with scores of pairs 'mined'; known: scored"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(place, tmp_path, found, put, said):
    kept = "- {id: kept, data: {from: mined, ops: [{drop_false_negatives: {by: scored, margin: 0.5}}]}}"
    recipe(place, tmp_path, MINED, SCORED, kept)
    written = (tmp_path / "r.yaml").read_text()
    assert found in written
    (tmp_path / "r.yaml").write_text(written.replace(found, put, 1))
    with pytest.raises(UsageError) as caught:
        recipes.load(tmp_path / "r.yaml")
    assert said in str(caught.value) and "(line" in str(caught.value)


def test_an_operation_on_text_is_not_given_pairs_nor_one_on_pairs_text(place, tmp_path):
    text = "corpora:\n  prose: {source: stdlib, tokenizer: dual}\n"
    mine = "- {id: m, data: {from: prose, ops: [{mine: {}}]}}"
    recipe(place, tmp_path, MINED)
    written = (tmp_path / "r.yaml").read_text()
    (tmp_path / "r.yaml").write_text(text + written + mine)
    with pytest.raises(UsageError, match="mine reads queries and documents; 'prose' is text, not a collection"):
        recipes.load(tmp_path / "r.yaml")


def test_what_is_no_ranker_is_refused_before_anything_runs(place, tmp_path):
    cases = [
        ("{mine: {by: cross}}", "cross makes no vector of a text, so it cannot search; a dual_encoder does, or bm25"),
        ("{score_pairs: {teacher: plain}}", "plain is an encoder that does not say how it scores"),
        ("{import_scores: {path: no/file.tsv}}", "import_scores: path: no/file.tsv is not a file"),
    ]
    for op, said in cases:
        recipe(place, tmp_path, "- {id: s, data: {from: marco, ops: [" + op.replace("plain", "cross") + "]}}")
        path = tmp_path / "r.yaml"
        path.write_text(path.read_text().replace("models:", f"models:\n  plain: {place}/encoder").replace(
            "teacher: cross", "teacher: plain"))  # fmt: skip
        with pytest.raises(UserError, match=said):
            stages.run(recipes.load(path), tmp_path / "out")
        assert not (tmp_path / "out" / "s").exists()


# --- mining -----------------------------------------------------------------------------------------------------------


def test_a_stage_mines_what_the_library_mines(place, tmp_path):
    out = run(place, tmp_path, MINED)
    docs = collection.beir(place / "beir")
    run_of = search.by_words(docs.documents, {q: docs.queries[q] for q in JUDGED}, 6)
    wanted = mining.candidates(docs, run_of, depth=6)
    found = groups.load(out / "mined/groups")
    assert list(found) == list(wanted) and len(found) > 5
    told = metrics(out, "mined")["mine"]
    assert (told["groups"], told["negatives"]) == (len(wanted), len(wanted.negative))


def test_dense_mining_finds_what_scores_highest(place, tmp_path):
    out = run(place, tmp_path, "- {id: mined, data: {from: docs, ops: [{mine: {by: dual, depth: 5, skip: 1}}]}}")
    ranker, found = opened(place), groups.load(out / "mined/groups")
    every = ranker.scores([(ASKED[q], text) for q in ASKED for text in SAID.values()]).view(len(ASKED), -1)
    for group in found:
        row = every[list(ASKED).index(group.query)]
        best = [list(SAID)[i] for i in row.argsort(descending=True)[1:5]]
        answers = {SAID[d] for d in JUDGED[group.query]}
        assert list(group.negatives) == [name for name in best if SAID[name] not in answers]
    assert len(found) == 9 and not (out / "mined/vectors").exists()
    with pytest.raises(UserError, match="a Classifier makes no vector"):
        dense.run(opened(place, "cross"), SAID, ASKED, 3, tmp_path / "v")


# --- scoring ----------------------------------------------------------------------------------------------------------


KINDS = {
    "cross_encoder": kinds.CrossKind(**LENGTHS),
    "dual_encoder": kinds.DualKind(dims=5, **LENGTHS),
    "colbert": kinds.ColBERTKind(dims=7, masks=2, mask_token=tiny.MASK, **LENGTHS),
    "prett": kinds.PreTTKind(apart=2, **LENGTHS),
    "tk": kinds.TKKind(**LENGTHS),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_ranker_scores_every_pair_as_it_does_alone(place, tmp_path, name, monkeypatch):
    for constant, value in [("JOINED", 7), ("APART", 7), ("TOKENS", 60), ("PAIRS", 4)]:
        monkeypatch.setattr(pairing, constant, value)
    ranker = rankers.build(KINDS[name], tiny.model("bert", seed=5), seed=2)
    rankers.save(ranker, tmp_path / "ranker", tokenizer=place / "encoder")
    ranker = opening.open_at(opening.form(tmp_path / "ranker"))
    docs, listed = collection.beir(place / "beir"), some_groups()
    told = pairing.score(ranker, docs, listed, tmp_path / "scores")
    named = list(listed.pairs())
    pairs = [docs.pair(*pair) for pair in named]
    kept = scores.Reader(tmp_path / "scores").rows(scores.pair_keys(pairs))["score"]
    alone = torch.cat([ranker.scores([pair]) for pair in pairs])
    assert torch.allclose(torch.from_numpy(kept), alone, atol=1e-5, rtol=1e-5)
    assert told["pairs"] == told["scored"] == len(named) == len(set(named))
    nothing = ranker.ranker(*ranker.read(pairs[:2])[:2], torch.zeros(0, 2, dtype=torch.long))
    assert nothing.shape == (0,) and nothing.dtype == torch.float32


def test_a_passage_goes_through_an_encoder_once(place, tmp_path):
    """Each passage once, each query once in a part: not a pair is read as a pair."""
    docs, listed, ranker = collection.beir(place / "beir"), some_groups(), opened(place)
    told = pairing.score(ranker, docs, listed, tmp_path / "scores")
    asked = sum(len(one) for one in opening.token_ids(ranker.tokenizer, [ASKED[q] for q in listed.query_ids], 12))
    said = sum(len(one) for one in opening.token_ids(ranker.tokenizer, [SAID[d] for d in listed.document_ids], 40))
    assert told["tokens"] == asked + said
    assert told["tflops"] > 0 and told["share_of_peak"] == pytest.approx(told["tflops"] / told["peak_tflops"], abs=0.02)


def test_two_ids_of_one_text_are_one_pair(place, tmp_path):
    docs = collection.Collection({"q": "a", "r": "b"}, {"x": "same", "y": "same", "z": "other one"}, {})
    listed = groups.gather([Group("q", "x", ("z", "y")), Group("r", "y", ("x",))])
    assert len(pairing.listed(docs, listed).keys) == 3
    assert pairing.score(opened(place), docs, listed, tmp_path / "scores")["pairs"] == 3


def test_blocks_are_decided_from_the_whole_list(place):
    ranker = opened(place)
    for count in (0, 1, 100, pairing.APART + 1, 10_000_000):
        cut = pairing.blocks(count, ranker)
        assert [row for rows in cut for row in (rows.start, rows.stop)] == sorted(
            [rows.start for rows in cut] + [rows.stop for rows in cut])  # fmt: skip
        assert sum(rows.stop - rows.start for rows in cut) == count and len(cut) <= pairing.SHARDS


def test_passages_come_shortest_first(place):
    docs, listed = collection.beir(place / "beir"), some_groups()
    pairs = pairing.listed(docs, listed)
    sizes = [len(SAID[listed.document_ids[p]]) for p in pairs.passage]
    assert sizes == sorted(sizes)
    assert (np.diff(pairs.passage) != 0).sum() + 1 == len(set(pairs.passage.tolist()))  # each is one run


# --- kills, ranks, strangers ------------------------------------------------------------------------------------------


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import torch
from distill.ranking import collection, groups, kinds, opening, pairing
from distill.specs import CollectionSpec
torch.set_num_threads(1)
pairing.matmul_speed = lambda *_: (1e12, "CPU")
place, out = map(Path, sys.argv[1:3])
pairing.APART = 9
docs, listed = collection.beir(place / "beir"), groups.load(out / "groups")
ranker = opening.open_at(opening.form(place / "encoder", kinds.DualKind(**%r)))
work = lambda where: pairing.score(ranker, docs, listed, out / where)

def killed(where, fault):
    child = os.fork()
    if child == 0:
        os.environ["FAULT"] = fault
        work(where)
        os._exit(0)
    return os.waitpid(child, 0)[1]

for fault in ("pairs.block:kill:1", "pairs.block:kill:6", "write.before_fsync:kill:1", "write.before_rename:kill:4",
              "scores.after_shard:kill:3"):
    assert killed(fault, fault) == signal.SIGKILL, fault
    assert killed(fault, fault[:-1] + "2") == signal.SIGKILL, fault  # and the next one as well
    work(fault)
work("whole")
"""


def test_a_kill_at_any_moment_changes_no_byte(place, tmp_path):
    """Real processes, killed without a warning in the work, while writing and after it, twice each."""
    groups.save(tmp_path / "groups", some_groups(), {})
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM % DUAL, str(place), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    whole, others = bytes_of(tmp_path / "whole"), sorted(tmp_path.glob("*:kill:*"))
    assert len(whole) > 8 and len(others) == 5
    for other in others:
        assert bytes_of(other) == whole, other.name


def test_ranks_share_the_blocks_and_write_what_one_writes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(pairing, "APART", 9)
    docs, listed, ranker = collection.beir(place / "beir"), some_groups(), opened(place)
    pairing.score(ranker, docs, listed, tmp_path / "one")
    monkeypatch.setattr(world, "size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
        work = pairing.Work(ranker, docs, listed)
        with scores.Writer(tmp_path / "two", stores.about([ranker.about]), rank) as writer:
            work.run(writer, "two")
        assert abs(work.scored / len(work.pairs.keys) - 0.5) < 0.1
    scores.seal(tmp_path / "two")
    one, two = (shards_of(tmp_path / name) for name in ("one", "two"))
    assert one == two and len(one) > 6


def shards_of(path):
    """The digests of their bytes, whichever rank wrote them."""
    return sorted(name.split("-")[-1] for name in bytes_of(path) if name.startswith("r"))


def test_a_run_on_two_ranks_scores_as_one_does(place, tmp_path):
    """In processes of their own, through the command."""
    one = run(place, tmp_path, MINED, SCORED)
    command = ["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "two"), "--ranks", "2"]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from distill.cli import main; main()", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert shards_of(one / "scored/scores") == shards_of(tmp_path / "two/scored/scores")


def test_scores_of_another_teacher_tokenizer_or_length_are_refused(place, tmp_path):
    docs, listed = collection.beir(place / "beir"), some_groups()
    pairing.score(opened(place), docs, listed, tmp_path / "scores")
    again = pairing.score(opened(place), docs, listed, tmp_path / "scores")
    assert again["scored"] == again["tokens"] == 0
    longer = opening.open_at(opening.form(place / "encoder", kinds.DualKind(**{**DUAL, "query_length": 11})))
    half = opening.open_at(opening.form(place / "encoder", kinds.DualKind(**DUAL)), torch.bfloat16)
    tiny.save(tiny.model("bert", seed=1), tmp_path / "other", tiny.tokenizer(60))
    other = opening.open_at(opening.form(tmp_path / "other", kinds.DualKind(**DUAL)))
    for stranger, said in [(longer, r"lengths.*\[12, 40\]"), (half, "float32"), (other, "tokenizer_digest"),
                           (opened(place, "cross"), "model_digest")]:  # fmt: skip
        with pytest.raises(UserError, match=f"holds other scores: (?s:.*){said}"):
            pairing.score(stranger, docs, listed, tmp_path / "scores")


# --- several teachers, false negatives, published scores --------------------------------------------------------------


def test_an_ensemble_is_the_weighted_mean_of_its_rankers(place, tmp_path):
    both = "- {id: both, data: {from: mined, ops: [{score_pairs: {ensemble: [dual, cross], weights: [1.0, 3.0]}}]}}"
    out = run(place, tmp_path, MINED, both)
    docs, listed = collection.beir(place / "beir"), groups.load(out / "mined/groups")
    pairs = [docs.pair(*pair) for pair in listed.pairs()]
    kept = scores.Reader(out / "both/scores").rows(scores.pair_keys(pairs))["score"]
    wanted = (opened(place).scores(pairs) + 3 * opened(place, "cross").scores(pairs)) / 4
    assert torch.allclose(torch.from_numpy(kept), wanted, atol=1e-5)
    told = metrics(out, "both")["score_pairs"]
    assert told["pairs"] == len(pairs) and told["teachers"].keys() == {"dual", "cross"}
    assert 0 <= told["margins"]["accuracy"] <= 1 and told["margins"]["quantiles"].keys() >= {"0.05", "0.5", "0.95"}
    assert told["margins"] != told["teachers"]["dual"]["margins"]


def test_an_ensemble_that_was_stopped_keeps_what_its_rankers_have_said(place, tmp_path, monkeypatch):
    both = "- {id: both, data: {from: mined, ops: [{score_pairs: {ensemble: [dual, cross]}}]}}"
    monkeypatch.setattr(stores, "ensemble", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(place, tmp_path, MINED, both)
    monkeypatch.undo()
    assert not (tmp_path / "out/both/scores").exists()
    told = metrics(run(place, tmp_path, MINED, both), "both")["score_pairs"]
    assert [teacher["scored"] for teacher in told["teachers"].values()] == [0, 0]


def test_false_negatives_are_dropped_by_the_scores_of_a_stage(place, tmp_path):
    kept = "- {id: kept, data: {from: mined, ops: [{drop_false_negatives: {by: scored, margin: 0.1}}]}}"
    out = run(place, tmp_path, MINED, SCORED, kept)
    docs, listed = collection.beir(place / "beir"), groups.load(out / "mined/groups")
    scored = opened(place, "cross").scores([docs.pair(*pair) for pair in listed.pairs()])
    value = dict(zip(listed.pairs(), scored, strict=True))
    wanted = []
    for g in listed:
        true = tuple(n for n in g.negatives if value[g.query, n] <= value[g.query, g.positive] - 0.1)
        wanted += [Group(g.query, g.positive, true)] if true else []
    assert list(groups.load(out / "kept/groups")) == wanted
    told = metrics(out, "kept")["drop_false_negatives"]
    dropped = len(listed.negative) - sum(len(g.negatives) for g in wanted)
    assert told["dropped"] == dropped > 0 and told["emptied"] == len(listed) - len(wanted)


def test_scores_of_other_pairs_tell_no_false_negatives(place, tmp_path):
    other = "- {id: scored, data: {from: marco, ops: [{score_pairs: {teacher: dual}}]}}"
    kept = "- {id: kept, data: {from: mined, ops: [{drop_false_negatives: {by: scored, margin: 0.1}}]}}"
    with pytest.raises(UserError, match=r"lacks the scores of \d+ places in the groups; score their pairs first"):
        run(place, tmp_path, MINED, other, kept)
    shutil.rmtree(tmp_path / "out")
    scored = "- {id: scored, data: {from: docs, ops: [{score_pairs: {teacher: dual}}]}}"
    with pytest.raises(UserError, match="score_pairs needs queries with negatives: mine them first"):
        run(place, tmp_path, scored)


IDS = "2.5\t-1.0\tq0\td0\td9"
TEXTS = f"2.5\t-1.0\t{ASKED['q0']}\t{SAID['d0']}\t{SAID['d9']}"


@pytest.mark.parametrize("form", ["ids.tsv", "texts.tsv", "ids.jsonl", "texts.jsonl"])
def test_published_scores_are_recognised(place, tmp_path, form):
    record = {"query_id": "q0", "positive_id": "d0", "negative_id": "d9", "scores": [2.5, -1.0]}
    text = {"query": ASKED["q0"], "positive": SAID["d0"], "negative": SAID["d9"], "scores": [2.5, -1.0]}
    written = {"ids.tsv": IDS, "texts.tsv": TEXTS, "ids.jsonl": record, "texts.jsonl": text}[form]
    file = lines(tmp_path / form, written)
    out = run(place, tmp_path, f"- {{id: s, data: {{from: marco, ops: [{{import_scores: {{path: {file}}}}}]}}}}")
    reader, docs = scores.Reader(out / "s/scores"), collection.beir(place / "beir")
    keys = scores.pair_keys([docs.pair("q0", "d0"), docs.pair("q0", "d9")])
    assert reader.rows(keys)["score"].tolist() == [2.5, -1.0]
    told = metrics(out, "s")["import_scores"]
    assert told["pairs"] == 2 and told["margins"]["pairs"] == 4 and told["margins"]["lacking"] == 3
    assert reader.about.producers[0]["tokenizer_digest"] is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{IDS}\n2.5\tnan\tq0\td0\td9\n", r":2: a score is nan"),
        (f"{IDS}\n2.5\t1.0\tq0\td0\td9", r":2: expected a line end; truncated\?"),
        (f"{IDS}\n2.5\t1.0\tq0\td0\n", r":2: 4 columns, expected 5 as above"),
        (f"{IDS}\n1.0\t0.0\tq0\td0\td99\n", r"1 of 2 rows name ids that the collection lacks: documents d99"),
        ("2.5\t1 2 x\t1.0\t3 4\tq0\td0\td9\n", r":1: 'x' is no number; expected positive_passages as numbers"),
        ("", r"is empty; expected 3: query positive negative"),
    ],
)
def test_what_is_wrong_with_a_score_file_is_said_by_line(place, tmp_path, content, said):
    file = tmp_path / "scores.tsv"
    file.write_text(content)
    with pytest.raises(UserError, match=said):
        run(place, tmp_path, f"- {{id: s, data: {{from: marco, ops: [{{import_scores: {{path: {file}}}}}]}}}}")


def test_hard_negatives_of_several_systems_are_groups(tmp_path):
    docs = collection.Collection({"7": "a"}, {"1": "b", "2": "c", "3": "d", "4": "e"}, {})
    file = lines(tmp_path / "hard.jsonl", {"qid": 7, "pos": [1, 4], "neg": {"bm25": [3, 2, 1], "dense": [2]}},
                 {"qid": 7, "pos": [], "neg": {"bm25": [3]}})  # fmt: skip
    _, found, _ = groups.read(file, docs)
    assert list(found) == [Group("7", "1", ("3", "2")), Group("7", "4", ("3", "2"))]
    for record in ({"qid": 7, "pos": [1], "neg": [2]}, {"qid": [7, 8], "pos": [1], "neg": {"a": [2]}}):
        with pytest.raises(UserError, match=r":1: expected \{qid: id"):
            groups.read(lines(tmp_path / "bad.jsonl", record), docs)


# --- finished, stale, foreseen ----------------------------------------------------------------------------------------


def test_what_follows_a_collection_is_stale_when_that_changes(place, tmp_path, capsys):
    here = tmp_path / "place"
    beir(here / "beir")
    for name in ("encoder", "cross", "triples.tsv"):
        (here / name).symlink_to(place / name)
    out = run(here, tmp_path, MINED, SCORED)
    first = bytes_of(out / "mined/groups"), bytes_of(out / "scored/scores")
    capsys.readouterr()
    run(here, tmp_path, MINED, SCORED)
    assert capsys.readouterr().err.count("finished before and unchanged, not run again") == 2
    records = [{"_id": name, "text": text + " again"} for name, text in SAID.items()]
    lines(here / "beir/corpus.jsonl", *records)
    run(here, tmp_path, MINED, SCORED)
    said = capsys.readouterr().err
    assert "mined: runs again (collections.docs" in said and "scored: runs again (follows mined)" in said
    assert bytes_of(out / "mined/groups") != first[0] and bytes_of(out / "scored/scores") != first[1]


def test_groups_that_a_killed_run_had_written_are_no_hindrance(place, tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "say", lambda text: 1 / 0)  # groups are there, stage.json does not know
    with pytest.raises(ZeroDivisionError):
        run(place, tmp_path, MINED)
    assert (tmp_path / "out/mined/groups").exists()
    monkeypatch.undo()
    assert metrics(run(place, tmp_path, MINED), "mined")["mine"]["groups"] > 5


def test_a_dry_run_says_what_will_be_scored_and_writes_nothing(place, tmp_path, capsys):
    kept = "- {id: kept, data: {from: mined, ops: [{drop_false_negatives: {by: scored, margin: 0.1}}]}}"
    densely = "- {id: densely, data: {from: docs, ops: [{mine: {by: dual, depth: 6}}]}}"
    found = recipe(place, tmp_path, MINED, SCORED, kept, densely)
    show(found, tmp_path / "out", 1)
    said = rows_of(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert (said["mined"][4], said["scored"][4], said["kept"][4]) == ("0", "unknown", "0")
    prepared.prepare(found.collections["docs"], tmp_path / "out/collections/docs")
    (tmp_path / "out/recipe.yaml").write_text(recipes.dump(found))
    show(found, tmp_path / "out", 1)
    said = rows_of(capsys.readouterr().out)
    places = (len(JUDGED) + 1) * 7 * (12 + 40)  # the answers with six documents each, of pairs as long as they may be
    assert said["scored"][4] == f"~{console.count(places)}" and said["densely"][4] == f"~{9 * 12 + 14 * 40}"
    stages.run(found, tmp_path / "out")
    listed = groups.load(tmp_path / "out/mined/groups")
    show(found, tmp_path / "out", 1)
    said = rows_of(capsys.readouterr().out)
    assert said["scored"][4] == f"~{console.count((len(listed) + len(listed.negative)) * 52)}"


def rows_of(table):
    """{first cell: cells} of the plain tables, whose columns are two blanks apart."""
    return {cells[0]: cells for line in table.splitlines() if len(cells := re.split(r"\s{2,}", line)) > 5}


def test_a_name_leads_down_to_its_collection(place, tmp_path):
    kept = "- {id: kept, data: {from: mined, ops: [{drop_false_negatives: {by: scored, margin: 0.1}}]}}"
    found = recipe(place, tmp_path, MINED, SCORED, kept)
    assert [found.collection(name) for name in ("docs", "mined", "kept")] == ["docs"] * 3
    stages.run(found, tmp_path / "out")
    context = Context(found, tmp_path / "out", 0)
    docs, listed = context.ranking("kept").open()
    opened = {name: context.ranking(name).open()[1] for name in ("mined", "docs", "marco")}
    counts = {name: found and len(found) for name, found in opened.items()}
    assert docs.digest == collection.beir(place / "beir").digest
    assert 0 < len(listed) < counts["mined"] and (counts["docs"], counts["marco"]) == (None, 4)
    assert len({context.ranking(name).digest for name in ("docs", "marco", "mined", "kept")}) == 4
