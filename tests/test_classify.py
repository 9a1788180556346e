"""Laws of classification: heads and their names, losses of classes, corpora with labels, and what a bad one gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div

from distill import classifiers, corpus, models, preflight, recipe
from distill.context import Context
from distill.evaluate.accuracy import macro_f1
from distill.heads import Logits
from distill.objectives import CrossEntropy, Divergence
from distill.refine.label import Label
from distill.specs import CorpusSpec
from distill.taps import Trace, trace
from growth.errors import UserError

CLASSES = ["cat", "dog", "eel"]
FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "gpt_neox", "gemma2"]


def classifier(family: str, classes=CLASSES, seed: int = 0):
    """A tiny random one."""
    config = classifiers.named(tiny.config(family), classes)
    config._attn_implementation = tiny.attentions(family)[0]
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p if p.dim() == 1 else 0))
    return model.eval()


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_a_row_are_those_transformers_makes_of_it_alone(family):
    """Whatever stands beside it, on whichever side its padding is, however the batch is cut."""
    model, lengths = classifier(family), [[7], [12], [3]]
    batch = tiny.batch(lengths, length=15)
    with torch.no_grad():
        alone = torch.cat([model(batch["input_ids"][i : i + 1, :n]).logits for i, (n,) in enumerate(lengths)])
        right = trace(model, batch, (), classify=True).logits
        left = trace(model, tiny.batch(lengths, length=15, side="left"), (), classify=True).logits
        longer = trace(model, tiny.batch(lengths, length=40), (), classify=True).logits
        cut = trace(model, {key: value[1:2] for key, value in batch.items()}, (), classify=True).logits
    assert alone.std() > 0.01
    for found in (right, left, longer):
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(cut, alone[1:2], atol=2e-5, rtol=1e-4)


def test_the_token_that_pads_may_end_a_document():
    """GPT-2 pads with its end of text; transformers alone would take the token before it."""
    model = classifier("gpt2")
    model.config.pad_token_id = tiny.SEP
    batch = tiny.batch([[5]], length=9)
    batch["input_ids"][0, 4], batch["input_ids"][0, 5:] = tiny.SEP, tiny.SEP
    with torch.no_grad():
        found = trace(model, batch, (), classify=True).logits
        hidden = model.transformer(batch["input_ids"][:, :5]).last_hidden_state[:, -1]
        torch.testing.assert_close(found, model.score(hidden))


def test_a_row_of_several_documents_is_refused():
    with pytest.raises(UserError, match="packed: false"):
        trace(classifier("bert"), tiny.batch([[3, 4]], length=9), (), classify=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [None, "own"])
def test_a_head_that_is_not_there_is_made_new_from_the_seed(family, kept, tmp_path, capfd):
    """Of base models and of language models alike; the rest of the weights are theirs."""
    source = tiny.model(family, head=kept and tiny.head(family))
    tiny.save(source, tmp_path / "source")
    one, same, other = (started(tmp_path, seed, f"{i}") for i, seed in enumerate([1, 1, 2]))
    assert "no classification head" in capfd.readouterr().err and classifiers.known(one.name_or_path) == CLASSES
    has, body = source.base_model.state_dict(), one.base_model.state_dict()
    assert all(body[name].equal(has[name]) for name in body.keys() & has.keys())
    assert all(name.startswith("pooler.") for name in body.keys() ^ has.keys())
    a, b, c = (model.state_dict() for model in (one, same, other))
    assert all(a[name].equal(b[name]) for name in a) and any(not a[name].equal(c[name]) for name in a)


def started(tmp_path: Path, seed: int, name: str):
    """The classifier that training would start with."""
    student = type("Student", (), {"origin": "x", "from_": "x"})
    start = models.seed_checkpoint(
        student, lambda _: tmp_path / "source", tmp_path / name, "classify", seed, classes=CLASSES
    )
    return classifiers.load(start, CLASSES)


def test_a_head_keeps_its_names_through_start_and_export(tmp_path):
    tiny.save(tiny.model("bert", head="mlm"), tmp_path / "source", tiny.tokenizer())
    start = Path(started(tmp_path, 3, "start").name_or_path)
    done = models.export(start, {}, tmp_path / "done")
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(done, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert list(model.config.id2label.values()) == CLASSES


def test_a_head_in_another_order_is_put_into_the_one_asked_for(tmp_path):
    model = classifier("roberta", ["eel", "cat", "dog"])
    tiny.save(model, tmp_path)
    batch = tiny.batch([[7], [12]], length=15)
    with torch.no_grad():
        has, asked = (trace(m, batch, (), classify=True).logits for m in (model, classifiers.load(tmp_path, CLASSES)))
    assert asked.equal(has[:, [1, 2, 0]])


@pytest.mark.parametrize("others", [["cat", "dog"], ["cat", "dog", "emu"]])
def test_a_head_of_other_classes_is_refused_with_both_lists(others, tmp_path):
    tiny.save(classifier("bert"), tmp_path)
    with pytest.raises(UserError) as refused:
        classifiers.load(tmp_path, others)
    assert "cat, dog, eel" in str(refused.value) and ", ".join(others) in str(refused.value)


@pytest.mark.parametrize(("classes", "problem"), [(["score"], None), (CLASSES, "multi_label_classification")])
def test_a_head_that_scores_is_not_taken_for_one_that_classifies(classes, problem, tmp_path):
    model = classifier("bert", classes)
    model.config.problem_type = problem
    tiny.save(model, tmp_path)
    with pytest.raises(UserError, match="not for one class out of several"):
        classifiers.known(tmp_path)


def test_a_head_that_labels_tokens_is_not_taken_for_one_that_classifies(tmp_path):
    config = classifiers.named(tiny.config("bert"), CLASSES)
    tokens = transformers.BertForTokenClassification(config)
    tokens.save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="no classification head"):
        classifiers.load(tmp_path / "source", CLASSES)
    assert not started(tmp_path, 0, "start").classifier.weight.equal(tokens.classifier.weight)


# --- losses -----------------------------------------------------------------------------------------------------------


def seen(logits) -> Trace:
    return Trace({}, {}, False, Logits(logits))


def test_cross_entropy_counts_the_rows_of_a_known_class():
    torch.manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    batch = {"classes": torch.tensor([2, -100, 0, 0, -100])}
    objective, rows = CrossEntropy(objective="classify"), batch["classes"] >= 0
    assert float(objective.count(batch)["classify"]) == 3
    value = objective.terms(seen(logits), None, batch)["classify"]
    expected = cross_entropy(logits[rows], batch["classes"][rows], reduction="sum")
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (value, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_a_batch_without_a_class_costs_nothing_and_still_has_a_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    value = CrossEntropy(objective="classify").terms(seen(logits), None, {"classes": torch.tensor([-100, -100])})
    assert value["classify"].item() == 0
    assert torch.autograd.grad(value["classify"], logits)[0].equal(torch.zeros(2, 3))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_of_classes_is_over_every_row_and_reads_no_label(temperature):
    torch.manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 3, dtype=torch.float64)
    batch = {"sample_ids": torch.arange(5)}  # nothing else is there to be read
    objective = Divergence(target="t", objective="classify", temperature=temperature)
    assert float(objective.count(batch)["forward_kl"]) == 5
    value = objective.terms(seen(logits), seen(teacher), batch)["forward_kl"]
    p, q = ((x / temperature).log_softmax(1) for x in (teacher, logits))
    expected = kl_div(q, p, log_target=True, reduction="sum")
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (value, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


# --- corpora ----------------------------------------------------------------------------------------------------------

WORDS = {"cat": "meow purr whiskers", "dog": "bark fetch tail", "eel": "slide river mud"}


def records(n: int, unknown: int = 0) -> list[dict]:
    """Texts whose class their words give away; every `unknown`-th has none."""
    made = []
    for i in range(n):
        kind = CLASSES[i % 3]
        words = " ".join(WORDS[kind].split()[(i + j) % 3] for j in range(2 + i % 5))
        made.append({"text": f"{words} {i}", "animal": None if unknown and i % unknown == 0 else kind})
    return made


def write(path: Path, found: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return path


def prepared(tmp_path: Path, source: Path | str, **changes) -> Path:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    spec = CorpusSpec(
        **{"source": str(source), "tokenizer": "t", "length": 40, "heldout": 0.2, "packed": False, **changes}
    )
    corpus.prepare(spec, tmp_path / "tokenizer", tmp_path / "corpus")
    return tmp_path / "corpus"


def kinds(rows: corpus.Corpus) -> list[str | None]:
    return [rows.classes[i] if i >= 0 else None for i in rows.labels]


def test_every_row_has_the_class_of_its_document(tmp_path):
    """Also the rows of a document that is longer than one."""
    found = records(60, unknown=7)
    found.append({"text": "meow " * 50, "animal": "cat"})
    path = prepared(tmp_path, write(tmp_path / "a.jsonl", found), label="animal")
    truth = {record["text"].strip(): record["animal"] for record in found}
    for side in ("train", "heldout"):
        rows = corpus.open(path, side)
        assert rows.classes == CLASSES and len(rows.labels) == len(rows)
        assert kinds(rows) == [truth[rows.texts[int(rows.spans[i][0][0])]] for i in range(len(rows))]
    counts = [kinds(corpus.open(path, side)) for side in ("train", "heldout")]
    assert sum(side.count(None) for side in counts) == 9 and sum(map(len, counts)) > 61


def test_batches_carry_classes_where_they_are_to_be_predicted_and_nowhere_else(tmp_path):
    path = prepared(tmp_path, write(tmp_path / "a.jsonl", records(60, unknown=7)), label="animal")
    rows = corpus.open(path)
    batch = corpus.Batches(rows, seed=0, objective="classify").at(range(20))
    expected = [CLASSES.index(kind) if kind else -100 for kind in (kinds(rows)[i] for i in batch["sample_ids"])]
    assert batch["classes"].tolist() == expected and (batch["labels"] == -100).all()
    narrow = corpus.unpack(batch)
    assert narrow["classes"].tolist() == expected
    for objective in (None, "mlm", "causal"):
        assert "classes" not in corpus.Batches(rows, seed=0, objective=objective).at(range(20))


def test_parts_are_classes_and_only_those_asked_for_are_read(tmp_path):
    for name in ("cat", "dog", "eel"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text("".join(f"{WORDS[name]} {i}\n" for i in range(20)))
    path = prepared(tmp_path, tmp_path / "texts", label="part", parts=["dog", "eel"])
    rows = corpus.open(path)
    assert rows.classes == ["dog", "eel"]
    assert all(part == kind for (_, part), kind in zip(rows.documents(), kinds(rows), strict=True))


def test_other_names_are_another_corpus(tmp_path):
    """Only the names of the classes differ, so the numbers are the same."""
    for directory, names in (("one", CLASSES), ("two", ["ant", "bee", "cow"])):
        (tmp_path / directory).mkdir()
        found = [{**r, "animal": names[CLASSES.index(r["animal"])]} for r in records(60)]
        prepared(tmp_path / directory, write(tmp_path / directory / "a.jsonl", found), label="animal")
    one, two = (corpus.open(tmp_path / name / "corpus") for name in ("one", "two"))
    assert (one.labels == two.labels).all() and one.digest != two.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "beast"}, "label: beast gives no class"),
        ({"label": "kingdom"}, "one class alone, 'animals'"),
        ({"label": "weight"}, "a class is a name or a whole number, not a float"),
        ({"label": "part", "parts": ["b"]}, "has no part 'b'"),
    ],
)
def test_labels_that_are_none_are_refused(changes, message, tmp_path):
    found = [{**record, "kingdom": "animals", "weight": 0.5} for record in records(60)]
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, write(tmp_path / "a.jsonl", found), **changes)


def test_a_text_file_has_no_column(tmp_path):
    (tmp_path / "a.txt").write_text("meow\n\nbark\n")
    with pytest.raises(UserError, match="no column 'animal'; `label: part`"):
        prepared(tmp_path, tmp_path / "a.txt", label="animal")


def test_packed_rows_have_no_class():
    with pytest.raises(ValueError, match="packed: false"):
        CorpusSpec(source="x", tokenizer="t", label="part")


# --- labels of a teacher ----------------------------------------------------------------------------------------------


class Place:
    """As much of a run's context as an operation asks for."""

    def __init__(self, teacher: Path):
        self.model = lambda reference: teacher


@pytest.fixture
def unlabelled(tmp_path):
    """A corpus of which some classes are known, and a teacher of the same classes in another order."""
    tiny.save(classifier("bert", ["eel", "cat", "dog"]), tmp_path / "teacher", tiny.tokenizer())
    return prepared(tmp_path, write(tmp_path / "a.jsonl", records(90, unknown=4)), label="animal")


def said(path: Path, teacher: Path, side: str):
    """What the teacher makes of every row, one at a time, through transformers alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    rows = corpus.open(path, side)
    alone = (torch.from_numpy(ids[segments > 0])[None] for ids, segments in map(rows.row, range(len(rows))))
    with torch.no_grad():
        p = torch.cat([model(ids).logits.softmax(1) for ids in alone])
    return [model.config.id2label[i] for i in p.argmax(1).tolist()], p.max(1).values


@pytest.mark.parametrize("confidence", [0.0, 0.7])
def test_labels_are_the_teachers_argmax_of_the_rows_it_is_sure_of(confidence, unlabelled, tmp_path):
    Label(teacher="t", confidence=confidence).apply(unlabelled, tmp_path / "out", Place(tmp_path / "teacher"))
    for side in ("train", "heldout"):
        before, after = corpus.open(unlabelled, side), corpus.open(tmp_path / "out", side)
        names, sure = said(unlabelled, tmp_path / "teacher", side)
        rows = [i for i in range(len(before)) if sure[i] >= confidence]
        assert len(rows) < len(before) or not confidence or side == "heldout"
        assert after.classes == ["eel", "cat", "dog"] and kinds(after) == [names[i] for i in rows]
        for j, i in enumerate(rows):
            assert all((a == b).all() for a, b in zip(after.row(j), before.row(i), strict=True))
            assert after.pieces(j) == before.pieces(i)
    after.verify()


def test_true_classes_are_counted_and_go_no_further(unlabelled, tmp_path):
    told = Label(teacher="t").apply(unlabelled, tmp_path / "out", Place(tmp_path / "teacher"))
    rows, (names, _) = corpus.open(unlabelled), said(unlabelled, tmp_path / "teacher", "train")
    right = [name == kind for name, kind in zip(names, kinds(rows), strict=True) if kind]
    assert told["train"]["agreement"] == pytest.approx(sum(right) / len(right)) and len(right) < len(rows)
    assert told["train"]["classes"] == {kind: names.count(kind) for kind in ["eel", "cat", "dog"]}
    (tmp_path / "other").mkdir()
    other = prepared(tmp_path / "other", write(tmp_path / "other" / "a.jsonl", records(90)))
    Label(teacher="t").apply(other, tmp_path / "again", Place(tmp_path / "teacher"))
    one, two = (corpus.open(tmp_path / name) for name in ("out", "again"))
    assert (one.labels == two.labels).all() and one.digest == two.digest


def test_a_teacher_that_is_never_sure_enough_is_said(unlabelled, tmp_path):
    with pytest.raises(UserError, match="nowhere sure enough"):
        Label(teacher="t", confidence=0.99999).apply(unlabelled, tmp_path / "out", Place(tmp_path / "teacher"))
    assert not (tmp_path / "out").exists()


# --- whole runs -------------------------------------------------------------------------------------------------------

FEW = {"source": "animals.jsonl", "tokenizer": "base", "length": 40, "heldout": 0.2, "packed": False, "label": "animal"}
LEARN = {"data": "few", "optim": {"batch": 8}, "lr": 0.01, "stop": {"steps": 30}}
CE = {"loss": [{"ce": {"objective": "classify"}}]}
SOFT = {"targets": {"t": {"from": "teacher"}}, "loss": [{"divergence": {"target": "t", "objective": "classify"}}]}
SMALL = {"new": {"config": "small.json"}}
STAGES = {
    "teacher": {"train": {**LEARN, **CE, "student": {"from": "base"}}},
    "pretrained": {"train": {**LEARN, "student": SMALL, "data": "text", "loss": [{"ce": {"objective": "mlm"}}]}},
    "distilled": {"train": {**LEARN, **SOFT, "student": {"from": "pretrained"}, "data": "text", "dropout": True}},
    "student": {"train": {**LEARN, **CE, "student": {"from": "distilled"}, "evaluate_every": 15}},
    "answers": {"data": {"from": "text", "ops": [{"label": {"teacher": "teacher", "confidence": 0.4}}]}},
    "answered": {"train": {**LEARN, **CE, "student": {"cut": {"from": "base", "layers": [0, 3]}}, "data": "answers"}},
    "report": {
        "evaluate": {
            "rows": {"teacher": "teacher", "student": "student", "answered": "answered", "pretrained": "pretrained"},
            "on": ["accuracy", "macro_f1", "heldout_loss"],
            "data": "few",
        }
    },
}
RECIPE = {
    "recipe": "animals",
    "models": {"base": {"from": "base"}},
    "corpora": {"few": FEW, "text": {**FEW, "source": "text.jsonl", "label": None}},
    "stages": [{"id": name, **stage} for name, stage in STAGES.items()],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a base model, texts and a recipe."""
    path = tmp_path_factory.mktemp("place")
    tiny.save(tiny.model("bert"), path / "base", tiny.tokenizer())
    small = tiny.config("bert", num_hidden_layers=2, hidden_size=24, num_attention_heads=4)
    (path / "small.json").write_text(json.dumps(small.to_dict()))
    write(path / "animals.jsonl", records(150))
    write(path / "text.jsonl", [{"text": record["text"]} for record in records(120)])
    return path


def check(place: Path, monkeypatch, **changes) -> str:
    """What a recipe of one of the stages is refused with."""
    monkeypatch.chdir(place)
    stages = [
        {"id": name, **stage} for name, stage in {**STAGES, **changes}.items() if name not in ("answered", "report")
    ]
    (place / "bad.yaml").write_text(yaml.safe_dump({**RECIPE, "stages": stages}))
    read = recipe.load(place / "bad.yaml")
    with pytest.raises(UserError) as refused:
        preflight.check(read, Context(read, place / "none", 0))
    return str(refused.value)


def train(**changes) -> dict:
    return {"train": {**LEARN, **CE, "student": {"from": "base"}, **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": train(data="text")}, "text has no classes; set `label` of the corpus, or"),
        ({"distilled": train(**{**SOFT, "targets": {"t": {"from": "base"}}})}, "no classification head; train"),
        ({"student": train(loss=[*CE["loss"], {"divergence": {"target": "t", "objective": "mlm"}}], **{
            "targets": {"t": {"from": "base"}}})}, "objective classify and mlm are two stages"),
        ({"answers": {"data": {"from": "text", "ops": [{"label": {"teacher": "base"}}]}}}, "no classification head"),
    ],
)  # fmt: skip
def test_what_cannot_classify_is_refused_before_text_is_read(changes, message, place, monkeypatch):
    assert message in check(place, monkeypatch, **changes)


@pytest.fixture(scope="module")
def run(place) -> Path:
    (place / "animals.yaml").write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", "animals.yaml", "--out", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return place / "run"


def test_both_ways_to_learn_from_a_teacher_end_in_a_table(run):
    report = json.loads((run / "report.json").read_text())
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    assert all({"accuracy", "macro_f1"} <= rows[name].keys() for name in ("teacher", "student", "answered"))
    assert "accuracy" not in rows["pretrained"] and "heldout_loss" in rows["pretrained"]
    assert (
        "heldout_loss" not in rows["teacher"]
        and "where there is no classification head" in (run / "report.md").read_text()
    )
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        run / "student/model", output_loading_info=True
    )
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and model.config.id2label == dict(enumerate(CLASSES))
    )


def test_accuracy_is_what_transformers_alone_counts(run):
    names, _ = said(run / "corpora/few", run / "student/model", "heldout")
    truth = kinds(corpus.open(run / "corpora/few", "heldout"))
    rows = json.loads((run / "report/evaluation.json").read_text())["rows"]
    found = next(row for row in rows if row["name"] == "student")["metrics"]["accuracy"]
    share = sum(map(str.__eq__, names, truth)) / len(truth)
    assert found["mean"] == pytest.approx(share)
    assert found["error"] == pytest.approx((share * (1 - share) / len(truth)) ** 0.5)


def test_the_student_starts_where_the_stage_before_ended_and_is_taught_without_labels(run):
    (before, after) = (
        load_file(run / stage / "model.safetensors") for stage in ("pretrained/model", "distilled/start")
    )
    body = {name for name in before if name.startswith("bert.")}
    assert body and all(before[name].equal(after[name]) for name in body)
    assert corpus.open(run / "corpora/text").classes is None
    told = json.loads((run / "answers/stage.json").read_text())["metrics"]["label"]
    assert "agreement" not in told["train"] and 0 < told["train"]["kept"] <= told["train"]["rows"]


def test_macro_f1_is_the_mean_over_classes():
    truth, found = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 1, 1])
    assert macro_f1(found, truth) == pytest.approx((4 / 5 + 4 / 6 + 0) / 3)
