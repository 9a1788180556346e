"""Runs whose students are rankers: kept and online teachers, starts and ends, resume, forecasts; what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import rank_cases
import tiny
import torch
import transformers
import yaml
from safetensors.torch import load_file

from distill import preflight, recipe, stages
from distill.context import Context
from distill.forecast import forecast
from distill.ranking import rankers, teaching
from distill.ranking.opening import form, open_at
from distill.scores import Reader
from growth import files
from growth.errors import UsageError, UserError

AUTO = [{"margin_mse": {"target": "t", "scale": "auto"}}, {"contrastive": {"group": 2}}]
HOW = {"data": "lists", "optim": {"batch": 4}, "lr": 0.01, "stop": {"steps": 3}, "negatives": 2, "save_every": 1}
DUAL = {"dual_encoder": {"pooling": "mean", "dims": 7, **rank_cases.LENGTHS}}


def trained(name: str, student: dict, **changes) -> dict:
    return {"id": name, "train": {"student": student, "loss": [{"contrastive": {"group": 2}}], **HOW, **changes}}


SCORED = {"id": "scored", "data": {"from": "lists", "ops": [{"score_pairs": {"teacher": "cross"}}]}}
CACHED = trained("cached", {"cut": {"from": "plain", "layers": [0]}, "ranker": DUAL}, loss=AUTO,
                 targets={"t": {"cache": "scored"}})  # fmt: skip
ONE = {"stop": {"steps": 1}}
STAGES = [
    SCORED,
    CACHED,
    trained("online", {"cut": {"from": "plain", "layers": [0]}, "ranker": DUAL}, loss=AUTO,
            targets={"t": {"from": "cross"}}),
    *(trained(kind, {"from": "plain", "ranker": {kind: _said}}, **ONE) for kind, _said in {
        "cross_encoder": rank_cases.LENGTHS,
        "colbert": {"masks": 2, "dims": 11, **rank_cases.LENGTHS},
        "prett": {"apart": 1, **rank_cases.LENGTHS},
        "tk": rank_cases.LENGTHS,
    }.items()),
    trained("new", {"new": {"like": "plain"}, "ranker": DUAL}, **ONE),
    trained("other", {"from": "cross", "ranker": DUAL}, **ONE),
    trained("longer", {"grow": {"from": "plain", "ops": [{"stack": {"factor": 2}}]}, "ranker": DUAL}, **ONE),
    trained("shorter", {"cut": {"from": "cross", "layers": [1]}}, **ONE),
    trained("further", {"from": "cached"}, data={"from": "lists", "after": "cached"}, **ONE),
]  # fmt: skip


def recipe_of(place, stages_, **changes):
    there = {
        "recipe": "small",
        "engine": {"micro_batch": 2},
        "models": {"plain": str(place / "plain"), "cross": str(place / "cross")},
        "collections": {"lists": {"source": str(place / "beir"), "triples": str(place / "triples.jsonl")}},
        "stages": stages_,
    }
    (place / "small.yaml").write_text(yaml.safe_dump({**there, **changes}, sort_keys=False))
    return recipe.load(place / "small.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, a collection in BEIR's layout and triples of it."""
    path, tokenizer, found = tmp_path_factory.mktemp("ranking"), tiny.tokenizer(), rank_cases.collection()
    tiny.save(tiny.model("bert", seed=1, **rank_cases.SIZES), path / "plain", tokenizer)
    rankers.save(rank_cases.teacher(), path / "cross", tokenizer=path / "plain")
    (path / "beir").mkdir()
    named = {"corpus": found.documents, "queries": found.queries}
    for name, texts in named.items():
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (path / "beir" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    judged = [f"{q}\t{d}\t{grade}" for q, grades in found.judgements.items() for d, grade in grades.items()]
    (path / "beir" / "qrels.tsv").write_text("\n".join(judged) + "\n")
    keys = ("query_id", "positive_id", "negative_id")
    triples = [json.dumps(dict(zip(keys, (g.query, g.positive, list(g.negatives)), strict=True)))
               for g in rank_cases.groups()]  # fmt: skip
    (path / "triples.jsonl").write_text("\n".join(triples) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(place):
    stages.run(recipe_of(place, STAGES), place / "whole")
    return place / "whole"


def log(out, stage: str) -> list[dict]:
    return [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]


def metrics(out, stage: str) -> dict:
    return files.read_json(out / stage / "stage.json")["metrics"]


@pytest.mark.parametrize("stage", [stage["id"] for stage in STAGES[1:]])
def test_what_was_trained_is_a_ranker_with_its_tokenizer(whole, stage):
    before, after = (open_at(form(whole / stage / name)) for name in ("start", "model"))
    pairs = [("eton hias", "hias eton sena"), ("tase", "tase"), ("eton", "shah nose tees")]
    assert after.ranker.kind == before.ranker.kind and after.tokenizer_digest == before.tokenizer_digest
    scores = after.scores(pairs)
    assert scores.isfinite().all() and not torch.equal(scores, before.scores(pairs))
    assert metrics(whole, stage)["pairs_per_second"] > 0 and log(whole, stage)[0]["pairs_per_second"] > 0


def test_kept_scores_teach_what_the_teacher_beside_the_student_does(whole):
    kept, beside = log(whole, "cached"), log(whole, "online")
    for one, other in zip(kept, beside, strict=True):
        assert one["terms"] == pytest.approx(other["terms"], rel=1e-4)
    assert [entry["teacher_forwards"]["t"] for entry in kept] == [0] * 3
    assert [entry["teacher_forwards"]["t"] for entry in beside] == [2] * 3
    found = [metrics(whole, stage)["scales"]["margin_mse"] for stage in ("cached", "online")]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] != 1


def test_a_run_that_was_stopped_ends_with_the_same_bits(place, whole, monkeypatch):
    small = recipe_of(place, [SCORED, CACHED])
    monkeypatch.setattr(files, "_passed", {})
    monkeypatch.setenv("FAULT", "train.step:term:2")
    with pytest.raises(SystemExit):
        stages.run(small, place / "hard")
    monkeypatch.delenv("FAULT")
    stages.run(small, place / "hard")
    for name in ("model/head.safetensors", "model/encoder/model.safetensors", "scales.json"):
        assert files.sha256(place / "hard/cached" / name) == files.sha256(whole / "cached" / name)
    seen = [[(e["step"], e["terms"], e["grad_norm"]) for e in log(out, "cached")] for out in (place / "hard", whole)]
    assert seen[0] == seen[1]


def test_a_cut_of_a_ranker_keeps_its_head_and_a_new_one_its_tokenizer(place, whole):
    heads = [load_file(path / "head.safetensors") for path in (place / "cross", whole / "shorter/start")]
    assert heads[0].keys() == heads[1].keys() and all(heads[0][name].equal(heads[1][name]) for name in heads[0])
    start = open_at(form(whole / "new/start"))
    assert start.tokenizer_digest == open_at(form(whole / "cached/start")).tokenizer_digest
    assert not (whole / "new/start/encoder/growth.json").exists()
    assert files.read_json(whole / "shorter/model/encoder/growth.json")["preserves"] == "no"


def test_a_published_cross_encoder_learns_in_half_precision(place, tmp_path):
    config = tiny.config("bert", **rank_cases.SIZES)
    config.num_labels = 1
    model = transformers.BertForSequenceClassification(config)
    model.config.architectures = ["BertForSequenceClassification"]
    published = {"from": str(tiny.save(model, tmp_path / "published", tiny.tokenizer()))}
    published["ranker"] = {"cross_encoder": rank_cases.LENGTHS}
    engine = {"micro_batch": 2, "zero": 1, "precision": "bf16"}
    small = recipe_of(
        place, [trained("s", {"from": "published"}, **ONE)], engine=engine, models={"published": published}
    )
    stages.run(small, tmp_path / "out")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/s/model/encoder")
    assert not loaded.classifier.weight.equal(model.classifier.weight)


def test_a_stage_that_goes_on_begins_with_the_rows_after_those_seen(whole):
    assert metrics(whole, "cached")["position"] == 12 and metrics(whole, "further")["position"] == 16
    heads = [whole / path / "head.safetensors" for path in ("further/start", "cached/model")]
    assert files.sha256(heads[0]) == files.sha256(heads[1])


def test_what_a_dry_run_says_of_flops_is_what_the_log_counts(place, whole):
    small = recipe_of(place, STAGES)
    planned = preflight.Planned(small, Context(small, place / "whole", 0))
    for stage in small.stages[1:]:
        said = forecast(stage, planned, 1)
        assert (said.flops, said.teacher_flops) == tuple(
            metrics(whole, stage.id)[k] for k in ("flops", "teacher_flops")
        )
        assert said.parameters and said.steps == metrics(whole, stage.id)["steps"]
    epochs = recipe_of(place, [trained("s", {"from": "cross"}, stop={"epochs": 2})])
    planned = preflight.Planned(epochs, Context(epochs, place / "whole", 0))
    assert forecast(epochs.stages[0], planned, 1).steps == math.ceil(2 * 9 / 4)


# What is refused


def refused(place, stages_, **changes) -> str:
    with pytest.raises(UsageError) as error:
        small = recipe_of(place, stages_, **changes)
        preflight.check(small, Context(small, place / "refused", 0))
    return str(error.value)


CROSS, PLAIN = {"from": "cross"}, {"from": "plain"}
KEPT, BESIDE = ({"targets": {"t": target}} for target in ({"cache": "scored"}, CROSS))
UNTAUGHT = {"ensemble": ["cross", "cross"], "combine": "mean_logprob"}
MET = [{"in_batch_margin": {"target": "t", "group": 2}}]
DEEP = {"prett": {"apart": 2, **rank_cases.LENGTHS}}
CORPUS = {"corpora": {"text": {"source": "stdlib", "tokenizer": "plain", "length": 16}}}
WRONG = {  # student, other keys of the stage, what is said
    "no ranker": (PLAIN, {}, "set `ranker`"),
    "nothing known": ({"new": {"like": "plain"}}, {}, "student: `ranker` is needed"),
    "no tokenizer": ({"new": {"config": {"model_type": "bert"}}, "ranker": DUAL}, {}, "`new: {like: MODEL}`"),
    "too long": (PLAIN | {"ranker": {"dual_encoder": {}}}, {}, "its encoder reads 70"),
    "too deep": (PLAIN | {"ranker": DEEP}, {}, "leaves no layer to join"),
    "text loss": (PLAIN | {"ranker": DUAL}, {"loss": [{"ce": {}}]}, "ce is for language models; rankers learn by"),
    "both": (CROSS, BESIDE | {"loss": [{"ce": {}}, {"ranknet": {"target": "t"}}]}, "a student is one of them"),
    "plain teacher": (CROSS, {"loss": AUTO, "targets": {"t": PLAIN}}, "targets.t: plain is an encoder that does not"),
    "kept in batch": (CROSS, KEPT | {"loss": MET}, "in_batch_margin wants scores of what meets in a batch"),
    "group cut": (CROSS, {"loss": [{"contrastive": {"group": 4}}]}, "engine.micro_batch=4 or group=2 fits"),
    "held out": (CROSS, {"evaluate_every": 2}, "evaluate_every is the held-out loss of `ce`"),
    "submodel": (CROSS, {"hooks": [{"submodel": {"depths": [1], "train_top": 1}}]}, "hooks.submodel"),
    "mean": (CROSS, {"loss": AUTO, "targets": {"t": UNTAUGHT}}, "the mean of their scores"),
    "text": (CROSS, {"data": "text"}, "data: text is text; rankers learn from"),
    "no lists": (CROSS, {"data": "bare"}, "bare has no negatives of its own"),
    "other lists": (
        CROSS,
        KEPT | {"data": "again", "loss": AUTO},
        "has scored pairs of lists, this one trains",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_said_with_what_does(place, case):
    student, changes, words = WRONG[case]
    lists = {"source": str(place / "beir"), "triples": str(place / "triples.jsonl")}
    collections = {"collections": {"lists": lists, "again": lists, "bare": {"source": str(place / "beir")}}}
    found = refused(place, [SCORED, trained("s", student, **changes)], **CORPUS, **collections)
    assert words in found and "Traceback" not in found


def test_a_ranker_is_no_language_model(place):
    text = {"id": "s", "train": {"student": {"from": "cross"}, "data": "text", "loss": [{"ce": {}}],
                                 **{key: HOW[key] for key in ("optim", "lr", "stop")}}}  # fmt: skip
    assert "student: cross scores queries and passages" in refused(place, [text], **CORPUS)
    grown = {"id": "g", "grow": {"from": "cross", "ops": [{"stack": {"factor": 2}}]}}
    assert "grow its encoder where it learns" in refused(place, [grown])
    text["train"]["student"], text["train"]["data"] = {"from": "plain"}, "lists"
    assert "ce reads text of `corpora`" in refused(place, [text], **CORPUS)


def test_scores_of_others_or_of_too_few_pairs_are_refused(place, whole, tmp_path):
    reader = Reader(whole / "scored/scores")
    lists = rank_cases.lists()
    teaching.insist_on_all(reader, lists, "here")
    more = rank_cases.gather([*lists.groups, rank_cases.Group("q0", "d0", ("d22",))])
    more = dataclasses.replace(lists, groups=more)
    with pytest.raises(UserError, match=r"lacks the scores of 1 of \d+ pairs; score the very groups"):
        teaching.insist_on_all(reader, more, "here")
    small = recipe_of(place, [SCORED, CACHED])
    other = rankers.build(rank_cases.TEACHER.model_copy(update={"passage_length": 20}), rank_cases.teacher().encoder)
    rankers.save(other, tmp_path / "cross", tokenizer=place / "plain")
    context = Context(small, whole, 0, found={"cross": tmp_path / "cross"})
    subject = SimpleNamespace(spec=small.stages[1].train, context=context, corpus=lists)
    with pytest.raises(UserError, match="lengths of cross is \\[9, 33\\], the run's \\[9, 20\\]; score again"):
        teaching.source("t", subject)
