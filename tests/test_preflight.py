"""What cannot work is said before data is read or anything is written, whatever is wrong with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import yaml

from distill import preflight, recipe
from distill.context import Context
from growth.errors import UserError

RECIPE = {
    "recipe": "small",
    "engine": {"micro_batch": 2},
    "models": {"teacher": "teacher"},
    "corpora": {"text": {"source": "nowhere.txt", "tokenizer": "teacher", "length": 64}},
    "stages": [
        {
            "id": "student",
            "train": {
                "student": {"cut": {"from": "teacher", "layers": 2}},
                "data": "text",
                "targets": {"t": {"from": "teacher"}},
                "loss": [{"relation_kl": {"target": "t", "heads": 6}}],
                "optim": {"batch": 4},
                "lr": 0.01,
                "stop": {"steps": 2},
            },
        },
        {"id": "report", "evaluate": {"rows": {"teacher": "teacher", "student": "student"}, "on": ["agreement"]}},
    ],
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.save(tiny.model("bert", head="mlm"), tmp_path / "teacher", tiny.tokenizer())
    return tmp_path


def check(*overrides: str, ranks: int = 1, models: dict | None = None) -> None:
    written = copy.deepcopy(RECIPE)
    written["models"] |= models or {}
    Path("small.yaml").write_text(yaml.safe_dump(written))
    read = recipe.load("small.yaml", overrides)
    preflight.check(read, Context(read, Path("out"), 0), ranks)


def refused(*overrides: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        check(*overrides, **options)
    assert not Path("out").exists()
    return str(caught.value)


def test_what_fits_passes(place):
    check()
    check(ranks=2)


def test_a_batch_that_cannot_be_cut_is_refused_with_one_that_can(place):
    said = refused(ranks=3)
    assert said == (
        "stages.student.train: optim.batch=4 rows cannot be cut into micro-batches of 2 on 3 ranks; batch=6 can"
    )


@pytest.mark.parametrize("family, places", [("bert", 70), ("roberta", 69), ("gpt2", 70), ("llama", None)])
def test_rows_are_no_longer_than_a_table_of_positions(place, family, places):
    tiny.save(tiny.model(family, head=tiny.head(family)), place / "teacher", tiny.tokenizer())
    check(f"corpora.text.length={places or 4000}")
    if places:
        said = refused(f"corpora.text.length={places + 1}")
        assert f"corpora.text.length: {places + 1} tokens, but the student has positions for {places}" in said
        assert "target t has" in said and "stages.report.evaluate: " in said


def test_a_vocabulary_that_a_model_does_not_have_is_refused(place):
    wide = ["corpora.text.tokenizer={train: {vocab: 500}}", "student.train.student={new: {like: teacher}}"]
    said = refused(*wide)
    assert "corpora.text.tokenizer: 500 ids, but the student knows 61" in said and "target t knows 61" in said


def test_a_tokeniser_that_gives_other_ids_than_a_model_has_learned_is_refused(place):
    other = tiny.tokenizer()
    names = json.loads(other.backend_tokenizer.to_str())["model"]["vocab"]
    names["e"], names["t"] = names["t"], names["e"]
    tiny.save(tiny.model("bert"), place / "other", other)
    path = place / "other" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {**_model(path), "vocab": names}}))
    said = refused("corpora.text.tokenizer=other", models={"other": "other"})
    assert "other's, but teacher has learned other ids: 2 of 61 ids are of other pieces, first 6 is 't' and 'e'" in said
    assert "a new one, but teacher has learned the ids" in refused("corpora.text.tokenizer={train: {vocab: 61}}")


def _model(path: Path) -> dict:
    return json.loads(path.read_text())["model"]


def test_random_weights_have_learned_no_ids(place):
    check(
        "corpora.text.tokenizer={train: {vocab: 61}}",
        "student.train={student: {new: {like: teacher}}, data: text, loss: [{ce: {}}], optim: {batch: 4}, lr: 0.1, "
        "stop: {steps: 1}}",
    )


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "convert it to safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "truncated"),
        (lambda d: _config(d, intermediate_size=44), "config.json asks for float [44"),
        (lambda d: _config(d, num_attention_heads=0), "no BertForMaskedLM can be built"),
        (lambda d: _config(d, auto_map={"AutoModel": "x.Y"}), "teacher: config.json brings its own code"),
    ],
)
def test_a_damaged_model_is_refused_by_its_name(place, damage, words):
    damage(place / "teacher")
    said = refused()
    assert said.startswith("model teacher: ") and words in said and "\n" not in said


def _config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
