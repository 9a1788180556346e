"""Rankers in evaluations: opened by name, measured over a collection, compared query by query; what is refused."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers

from distill import evaluate, preflight, report, sources
from distill import recipe as recipes
from distill.context import Context
from distill.evaluate import RESULT
from distill.kinds import EvaluateSpec
from distill.ranking import measures, opening, rankers, search, significance, trec
from distill.ranking.collection import beir
from distill.ranking.joining import join_of
from distill.ranking.kinds import ColBERTKind, CrossKind, DualKind, TKKind
from distill.recipe import Recipe
from distill.report import plots
from distill.specs import RankerSpec
from growth import files
from growth.errors import UsageError, UserError

WORDS = ("sea", "ship", "rain", "moon", "bird", "tree", "stone", "fire", "snow", "wolf", "corn", "gold")
LENGTHS = {"query_length": 20, "passage_length": 40}
DUAL = {"dual_encoder": {"pooling": "mean", "similarity": "cosine", **LENGTHS}}


def text_of(i: int) -> str:
    return f"{WORDS[i % 12]} {WORDS[(i * 5 + 1) % 12]} {WORDS[(i * 7 + i // 12) % 12]}"


def classifier(family: str, labels: int = 1, **changes):
    """As a cross-encoder is published."""
    config = tiny.config(family, **changes)
    config.num_labels = labels
    config.pad_token_id = tiny.PAD
    stem = tiny.FACTS[family][0]
    model = getattr(transformers, f"{stem}ForSequenceClassification")(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator)) if p.dim() > 1 else None
    return model.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A collection in BEIR's layout, an encoder, a published cross-encoder, rankers of ours."""
    root = tmp_path_factory.mktemp("ranking")
    tokenizer = tiny.tokenizer()
    tiny.save(tiny.model("bert", seed=1), root / "plain", tokenizer)
    tiny.save(classifier("bert"), root / "published", tokenizer)
    tiny.save(classifier("bert", labels=2), root / "two", tokenizer)
    for name, kind, seed in (
        ("dual", DualKind(pooling="mean", dims=7, **LENGTHS), 1),
        ("dual0", DualKind(pooling="mean", dims=7, **LENGTHS), 2),
        ("dual1", DualKind(pooling="mean", dims=7, **LENGTHS), 3),
        ("cross", CrossKind(join=join_of(tokenizer), **LENGTHS), 1),
        ("colbert", ColBERTKind(dims=5, **LENGTHS), 1),
    ):
        ranker = rankers.build(kind, tiny.model("bert", seed=seed), seed=seed)
        rankers.save(ranker, root / name, tokenizer=root / "plain")
    documents = [{"_id": f"d{i}", "title": WORDS[i % 12], "text": text_of(i)} for i in range(40)]
    queries = [{"_id": f"q{i}", "text": f"{WORDS[i % 12]} {WORDS[(i * 5 + 1) % 12]}"} for i in range(14)]
    (root / "mini").mkdir()
    for name, records in (("corpus", documents), ("queries", queries)):
        (root / "mini" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    judged = [f"q{i}\td{j}\t{1 + i % 2}\n" for i in range(12) for j in (i, i + 24)] + ["q12\td3\t0\n"]
    (root / "mini" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    return root


def recipe_of(place, evaluation, **changes):
    models = {name: str(place / name) for name in ("two", "dual", "dual0", "dual1", "cross", "colbert")}
    models["plain"] = {"from": str(place / "plain"), "ranker": DUAL}
    models["published"] = {"from": str(place / "published"), "ranker": {"cross_encoder": LENGTHS}}
    written = {
        "recipe": "tried",
        "models": models | changes.pop("models", {}),
        "collections": {"mini": {"source": str(place / "mini")}},
        "stages": [{"id": "report", "evaluate": {"data": "mini", **evaluation}}],
        **changes,
    }
    return Recipe.model_validate(written)


def contexts_of(place, tmp_path, recipe, seeds=1):
    """`name@` stands for a model of each seed."""
    found = [Context(recipe, tmp_path / "run", seed) for seed in range(seeds)]
    for seed, context in enumerate(found):
        whole = context.model
        context.model = lambda name, whole=whole, seed=seed: whole(name.replace("@", str(seed)))
    return found


def measure(place, tmp_path, seeds=1, **evaluation):
    """evaluation.json"""
    recipe = recipe_of(place, evaluation)
    (tmp_path / "run" / "report").mkdir(parents=True, exist_ok=True)
    contexts = contexts_of(place, tmp_path, recipe, seeds)
    evaluate.evaluate(recipe.stage("report").evaluate, contexts, tmp_path / "run" / "report")
    return files.read_json(tmp_path / "run" / "report" / RESULT)


# Opening by name


PAIRS = [("sea ship", "rain, and a ship at sea"), ("moon", "wolf"), ("sea ship", "a [SEP] that is text"), ("x", "corn")]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "qwen2"])
def test_a_published_cross_encoder_scores_as_its_own_forward_pass_does(family, tmp_path):
    tokenizer, model = tiny.tokenizer(), classifier(family)
    path = tiny.save(model, tmp_path / family, tokenizer)
    if family == "bert":  # whose tokenizers tell the two texts apart
        told = files.read_json(path / "tokenizer_config.json")
        names = ["input_ids", "token_type_ids", "attention_mask"]
        files.write_json(path / "tokenizer_config.json", told | {"model_input_names": names})
    found = opening.open_at(opening.form(path, CrossKind(**LENGTHS))).scores(PAIRS)
    for (query, passage), score in zip(PAIRS, found.tolist(), strict=True):
        first, second = (opening.token_ids(tokenizer, [text], 40)[0] for text in (query, passage))
        ids = torch.tensor([first + second[1:]])
        types = torch.tensor([[0] * len(first) + [1] * (len(second) - 1)])
        given = {"token_type_ids": types} if family == "bert" else {}
        expected = model(ids, attention_mask=torch.ones_like(ids), **given).logits[0, 0]
        assert score == pytest.approx(expected.item(), abs=2e-5)


def test_what_is_scored_together_changes_no_score_and_texts_are_cut_at_its_lengths(place):
    for name in ("dual", "cross", "colbert"):
        found = opening.open_at(opening.form(place / name))
        long = [*PAIRS, ("sea " * 30, "rain " * 60)]
        alone = torch.cat([found.scores([pair]) for pair in long])
        torch.testing.assert_close(found.scores(long), alone, atol=1e-4, rtol=1e-5)
        assert not found.ranker.training and not any(p.requires_grad for p in found.ranker.parameters())
        torch.testing.assert_close(alone[-1], found.scores([("sea " * 9, "rain " * 11)])[0], atol=50, rtol=50)


@pytest.mark.parametrize(
    "name, given, words",
    [
        ("plain", None, "does not say how it scores; set `ranker`"),
        ("plain", CrossKind(), "a cross_encoder scores with a layer of its own, which it lacks: train one"),
        ("plain", TKKind(), "a tk scores with a layer of its own"),
        ("plain", DualKind(dims=3), "a dual_encoder with dims scores with a layer of its own"),
        ("plain", DualKind(), "passage_length 200 make texts of 200 tokens, and its encoder reads 70"),
        ("two", None, "tells 2 classes apart; what scores pairs has a head of one label"),
        ("published", DualKind(), "it is a cross_encoder and nothing else"),
        ("dual", DualKind(), "says how it scores; leave `ranker` out"),
    ],
)
def test_what_cannot_score_pairs_is_refused_in_words_before_a_weight_is_read(place, name, given, words):
    with pytest.raises(UserError, match=words):
        opening.form(place / name, given, name)


def test_what_the_tokenizer_knows_is_not_asked_of_a_recipe():
    with pytest.raises(ValueError, match="leave it out, it is found from the tokenizer"):
        RankerSpec.model_validate({"cross_encoder": {"join": {"skip": 0}}})
    assert RankerSpec.model_validate(RankerSpec.model_validate(DUAL).model_dump()).kind.pooling == "mean"


def test_another_head_or_another_description_is_another_model(place, tmp_path):
    ranker = rankers.load(place / "dual")
    identities = {sources.identity(place / "dual"), sources.identity(place / "dual0")}
    with torch.no_grad():
        ranker.linear.weight += 1
    identities.add(sources.identity(rankers.save(ranker, tmp_path / "head", tokenizer=place / "plain")))
    ranker.kind = ranker.kind.model_copy(update={"query_length": 19})
    identities.add(sources.identity(rankers.save(ranker, tmp_path / "kind", tokenizer=place / "plain")))
    assert len(identities) == 4


# Measuring

ROWS = {"bm25": "bm25", "teacher": "published", "student": "dual@", "late": "colbert", "untrained": "plain"}


@pytest.fixture(scope="module")
def found(place, tmp_path_factory):
    """(directory of the run, evaluation.json) of two seeds."""
    directory = tmp_path_factory.mktemp("measured")
    return directory / "run", measure(place, directory, 2, rows=ROWS, on=["ndcg", "mrr", "map", "recall"], depth=20)


def values(result, row, metric):
    return next(each for each in result["rows"] if each["name"] == row)["metrics"][metric]


def test_every_row_orders_the_candidates_of_bm25_as_its_own_scores_say(place, found):
    run, _ = found
    collection = beir(place / "mini")
    asked = {query: text for query, text in collection.queries.items() if collection.positives(query)}
    candidates = search.BM25(collection.documents).run(asked, 20)
    assert trec.read(run / "report" / "runs" / "bm25.trec") == candidates and len(asked) == 12
    for file, name in (("student@0", "dual0"), ("student@1", "dual1"), ("late", "colbert")):
        kept = trec.read(run / "report" / "runs" / f"{file}.trec")
        opened = opening.open_at(opening.form(place / name))
        assert {query: set(scores) for query, scores in kept.items()} == {q: set(r) for q, r in candidates.items()}
        for query, scores in list(kept.items())[:3]:
            alone = opened.scores([collection.pair(query, document) for document in scores])
            torch.testing.assert_close(torch.tensor(list(scores.values())), alone, atol=1e-4, rtol=1e-5)


def test_figures_are_those_of_the_runs_that_are_kept(place, found):
    run, result = found
    collection = beir(place / "mini")
    for seed in range(2):
        kept = trec.read(run / "report" / "runs" / f"student@{seed}.trec")
        means = measures.evaluate(kept, collection.judgements, measures=["nDCG@10", "RR@10", "AP", "R@100"]).means
        mine = [values(result, "student", name)["seeds"][seed] for name in ("ndcg", "mrr", "map", "recall")]
        assert mine == pytest.approx(list(means.values()))
    each = measures.evaluate(trec.read(run / "report" / "runs" / "late.trec"), collection.judgements).queries["RR@10"]
    error = torch.tensor(list(each.values()), dtype=torch.double).std().item() / len(each) ** 0.5
    assert values(result, "late", "mrr")["error"] == pytest.approx(error)


def test_rows_are_compared_query_by_query_with_those_below_them(place, found):
    run, result = found
    judged, runs = beir(place / "mini").judgements, run / "report" / "runs"
    told = {(each["row"], each["against"]): each for each in result["comparisons"]}
    others = [(row, other) for row in ("teacher", "student", "late") for other in ("bm25", "untrained")]
    assert list(told) == [("bm25", "untrained"), *others]
    each = [measures.evaluate(trec.read(runs / f"{name}.trec"), judged).queries["nDCG@10"] for name in
            ("student@0", "student@1", "untrained")]  # fmt: skip
    mean = {query: (each[0][query] + each[1][query]) / 2 for query in each[0]}
    expected = significance.compare(mean, each[2])
    pair = told["student", "untrained"]
    assert (pair["difference"], pair["p"], pair["low"], pair["high"]) == pytest.approx(
        (expected.difference, expected.p, expected.low, expected.high)
    )
    assert (pair["measure"], pair["items"], pair["exact"]) == ("nDCG@10", 12, True)


def test_bm25_is_a_baseline_whatever_the_row_is_called_and_counts_no_parameters(place, found):
    roles = {row["name"]: (row["role"], row["params"] > 0) for row in found[1]["rows"]}
    assert roles == {"bm25": ("baseline", False), "teacher": ("teacher", True), "student": ("student", True),
                     "late": ("student", True), "untrained": ("baseline", True)}  # fmt: skip
    dual = rankers.load(place / "dual")
    assert found[1]["rows"][2]["params"] == sum(p.numel() for p in dual.parameters())
    assert evaluate.role("student_after_bm25", "mined", None) == "student"


def test_a_dual_encoder_searches_all_documents(place, tmp_path):
    measure(place, tmp_path, rows={"student": "dual", "bm25": "bm25"}, on=["recall", "pair_speed"], retrieve=True)
    collection, kept = beir(place / "mini"), trec.read(tmp_path / "run" / "report" / "runs" / "student.trec")
    opened, documents = opening.open_at(opening.form(place / "dual")), list(collection.documents)
    for query in list(kept)[:3]:
        scores = opened.scores([collection.pair(query, name) for name in documents])
        best = [documents[i] for i in scores.argsort(descending=True)[:5].tolist()]
        assert len(kept[query]) == 40 and trec.ranked(kept[query])[:5] == best
    assert not (tmp_path / "run" / "report" / "vectors").exists()


# What is refused


@pytest.mark.parametrize(
    "spec, words",
    [
        ({"on": ["ndcg", "probe"], "data": "mini"}, "ndcg is measured of rankers, probe of models of text"),
        ({"on": ["ndcg"]}, "name the collection to measure on"),
        ({"on": ["probe"], "depth": 10}, "depth: only rankers order documents"),
        ({"on": ["probe"], "rows": {"a": "bm25"}}, "bm25 is a search, and no model of text"),
    ],
)
def test_what_no_recipe_can_mean_is_refused_when_it_is_read(spec, words):
    with pytest.raises(ValueError, match=words):
        EvaluateSpec.model_validate({"rows": {"a": "b"}, **spec})


@pytest.mark.parametrize(
    "evaluation, words",
    [
        ({"on": ["ndcg"], "data": "text", "rows": {"a": "dual"}}, "text is text; rankers are measured on one of"),
        ({"on": ["probe"], "rows": {"a": "plain"}}, "mini is of queries and documents; ndcg, mrr"),
        ({"on": ["probe"], "data": "text", "rows": {"a": "dual"}}, "rows.a: dual is a ranker; ndcg, mrr"),
        ({"on": ["ndcg"], "rows": {"a": "two"}}, "rows.a: two: its head tells 2 classes apart"),
        ({"on": ["ndcg"], "rows": {"a": "cross"}, "retrieve": True}, "cross makes no vector of a document"),
    ],
)
def test_what_cannot_be_measured_is_said_before_training(place, tmp_path, evaluation, words):
    corpora = {"text": {"source": str(place / "mini" / "corpus.jsonl"), "tokenizer": "plain", "length": 48}}
    recipe = recipe_of(place, evaluation, corpora=corpora)
    with pytest.raises(UsageError, match=words):
        preflight.check(recipe, contexts_of(place, tmp_path, recipe)[0])


def test_a_collection_that_answers_nothing_is_refused_before_training(place, tmp_path):
    (tmp_path / "mini").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / "mini" / name).write_bytes((place / "mini" / name).read_bytes())
    (tmp_path / "mini" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    recipe = recipe_of(
        place, {"rows": {"a": "dual"}, "on": ["ndcg"]}, collections={"mini": {"source": str(tmp_path / "mini")}}
    )
    with pytest.raises(UserError, match="no document is known to answer one of 14"):
        evaluate.foresee(recipe.stage("report").evaluate, contexts_of(place, tmp_path, recipe)[0])


# The report


@pytest.fixture(scope="module")
def reported(place, found):
    """A run directory that has been reported, with the model of a train stage in it."""
    run, _ = found
    train = {
        "id": "student",
        "train": {
            "student": {"cut": {"from": "plain", "layers": 2}, "ranker": DUAL},
            "data": "mined",
            "targets": {"t": {"from": "published"}},
            "loss": [{"margin_mse": {"target": "t"}}],
            "optim": {"batch": 4},
            "lr": 0.001,
            "stop": {"steps": 2},
        },
    }
    mined = {"id": "mined", "data": {"from": "mini", "ops": [{"mine": {"by": "bm25"}}]}}
    rows = ROWS | {"student": "student"}
    evaluation = {"rows": rows, "on": ["ndcg", "mrr", "map", "recall"], "depth": 20, "data": "mini"}
    recipe = recipe_of(place, {}, stages=[mined, train, {"id": "report", "evaluate": evaluation}], seeds=2)
    (run / "recipe.yaml").write_text(recipes.dump(recipe))
    for seed in range(2):
        ranker = rankers.load(place / f"dual{seed}")
        rankers.save(ranker, run / f"student@{seed}" / "model", tokenizer=place / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: {})
        return run, report.rebuild(run)


def test_the_report_says_how_far_rows_differ_and_how_sure_that_is(found, reported):
    run, public = reported
    pair = next(told for told in public["comparisons"] if (told["row"], told["against"]) == ("student", "bm25"))
    assert public["comparisons"] == found[1]["comparisons"]
    text = (run / "report.md").read_text()
    said = f"student against bm25: nDCG@10 {pair['difference']:+.3f}"
    assert said in text and f"p {pair['p']:.2g}; 12 queries)" in text
    assert "## Compared item by item" in text and "mean over 12 queries of mini (2 more have no answer)" in text
    assert "| bm25 | - |" in text  # no parameters


def test_the_card_of_a_ranker_says_how_it_scores_and_how_to_load_it(place, reported):
    run, _ = reported
    card = (run / "student@1" / "model" / "README.md").read_text()
    assert "dot of one vector a text (mean pooling)" in card and "SentenceTransformer(" in card
    code = (
        card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", str(run / "student@1" / "model"))
    )
    names: dict = {}
    exec(code, names)  # the snippet that a reader would copy
    pair = names["query"], names["passage"]
    expected = opening.open_at(opening.form(place / "dual1")).scores([pair])
    torch.testing.assert_close(names["ranker"].scores([pair]), expected)
