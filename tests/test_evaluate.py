"""Laws of the measures: a model agrees with itself, padding is not seen, planted labels are found, chance is chance."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import scipy.stats
import tiny
import torch
from torch.testing import assert_close

from distill import corpus, evaluate
from distill.evaluate import RESULT, bench, role, sts
from distill.evaluate.agreement import agreement, cosines, spearman
from distill.evaluate.encode import encode
from distill.evaluate.probe import correct, fit
from distill.kinds import EvaluateSpec
from distill.specs import CorpusSpec
from growth.errors import UserError

PARTS = ("alpha", "beta", "gamma")
POOLED = [family for family in tiny.FAMILIES if family != "t5"]


def texts_of(part: str, n: int, seed: int = 0) -> list[str]:
    """Texts of letters that are more or less frequent in each part."""
    draw = random.Random(f"{part}{seed}")
    weights = [1 + 6 * (letter in part) for letter in "abegmnpst "]
    return ["".join(draw.choices("abegmnpst ", weights, k=draw.randint(5, 40))) for _ in range(n)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A prepared corpus with parts, and checkpoints: two encoders with heads, one without, two decoders."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = tiny.tokenizer()
    for name, model in {
        "one": tiny.model("bert", "mlm", seed=1),
        "other": tiny.model("bert", "mlm", seed=2, num_hidden_layers=2),
        "bare": tiny.model("bert", None, seed=3),
        "left": tiny.model("gpt2", "causal", seed=4),
        "right": tiny.model("gpt2", "causal", seed=5),
    }.items():
        tiny.save(model, root / name, tokenizer)
    lines = [{"text": text, "label": part} for part in PARTS for text in texts_of(part, 60)]
    (root / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "plain.jsonl").write_text("".join(json.dumps({"text": line["text"]}) + "\n" for line in lines))
    for name in ("texts", "plain"):
        spec = CorpusSpec(source=str(root / f"{name}.jsonl"), tokenizer="one", length=48, heldout=0.3)
        corpus.prepare(spec, root / "one", root / "corpora" / name)
    return root


def measure(place, on, rows, tmp_path, data="texts", seeds=1, **spec):
    """The rows of an evaluate stage by name; `@` in a reference stands for the number of the seed."""
    contexts = [
        SimpleNamespace(
            model=lambda reference, seed=seed: place / reference.replace("@", str(seed)),
            corpus=lambda name: place / "corpora" / name,
            seed=seed,
        )
        for seed in range(seeds)
    ]
    spec = SimpleNamespace(rows=rows, on=on, data=data, teacher=None, **spec)
    return {row["name"]: row for row in evaluate.evaluate(spec, contexts, tmp_path)}


def value(row, metric):
    return row["metrics"][metric]["mean"]


# Embeddings


@pytest.mark.parametrize("family", POOLED)
def test_embeddings_do_not_depend_on_batches_or_padding(family):
    model, tokenizer = tiny.model(family, seed=1), tiny.tokenizer()
    texts = texts_of("alpha", 9)
    alone = torch.cat([encode(model, tokenizer, [text], 30) for text in texts])
    for tokens in (1, 70, 10_000):
        assert_close(encode(model, tokenizer, texts, 30, tokens), alone, atol=2e-5, rtol=1e-4)


def test_embeddings_are_the_mean_of_transformers_own_last_hidden_states():
    model, tokenizer = tiny.model("bert", seed=1), tiny.tokenizer()
    with torch.no_grad():
        plain = model(**tokenizer("men eat peas", return_tensors="pt")).last_hidden_state[0].mean(0)
    assert_close(encode(model, tokenizer, ["a", "men eat peas"], 30)[1], plain, atol=1e-5, rtol=1e-5)


# Agreement


def test_a_model_agrees_with_itself_and_less_with_another(place, tmp_path):
    rows = measure(place, ["agreement"], {"teacher": "one", "same": "one", "other": "other"}, tmp_path)
    assert value(rows["same"], "agreement") == pytest.approx(1, abs=1e-12)
    assert value(rows["other"], "agreement") < 0.9


def test_agreement_survives_rotation_scaling_and_another_width():
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    wider = torch.cat([3 * x @ turn, torch.zeros(40, 2)], dim=1)
    assert agreement(cosines(x), cosines(wider)).value == pytest.approx(1, abs=1e-12)


def test_the_standard_error_of_agreement_is_the_spread_over_samples_of_texts():
    def sample(seed):
        x = torch.randn(128, 5, generator=torch.Generator().manual_seed(seed))
        noise = torch.randn(128, 5, generator=torch.Generator().manual_seed(seed + 1000))
        return agreement(cosines(x), cosines(x + 0.7 * noise))

    scores = [sample(seed) for seed in range(40)]
    spread = torch.tensor([score.value for score in scores]).std().item()
    assert 0.6 < sum(score.error for score in scores) / 40 / spread < 1.7


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_that_of_scipy(ties):
    draw = random.Random(0)
    a = [draw.randint(0, 5) if ties else draw.random() for _ in range(200)]
    b = [x + draw.randint(0, 3) for x in a]
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_what_does_not_vary_ranks_nothing():
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0


# Probe


def planted(shuffled: bool):
    """600 items of 4 classes, one direction each, and a fold for each item."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 4
    x = torch.randn(600, 12, generator=generator) + 4 * torch.eye(12)[y]
    y = y[torch.randperm(600, generator=generator)] if shuffled else y
    return x, y, torch.randint(5, (600,), generator=generator)


def test_the_probe_finds_a_planted_label():
    assert correct(*planted(shuffled=False), ridge=0.03).double().mean() > 0.9


def test_the_probe_is_at_chance_on_shuffled_labels():
    share = correct(*planted(shuffled=True), ridge=0.03).double().mean().item()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 600)


def test_the_fit_ends_where_the_gradient_does():
    x, y, _ = planted(shuffled=False)
    w = fit(x.double(), y, 4, ridge=0.03).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() @ w[:-1] + w[-1], y) + 0.015 * w[:-1].square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-4


def test_the_probe_tells_parts_of_a_corpus_apart(place, tmp_path):
    row = measure(place, ["probe"], {"one": "one"}, tmp_path)["one"]
    assert value(row, "probe") > 0.6
    assert 0.01 < row["metrics"]["probe"]["error"] < 0.05


# Predictions


def flat(model):
    """A head that finds every token equally likely."""
    with torch.no_grad():
        for p in model.get_output_embeddings().parameters():
            p.zero_()
    return model


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_head_without_opinion_loses_log_v(place, tmp_path, family):
    tiny.save(flat(tiny.model(family, tiny.head(family), tie_word_embeddings=False)), place / f"flat-{family}",
              tiny.tokenizer())  # fmt: skip
    row = measure(place, ["heldout_loss"], {"flat": f"flat-{family}"}, tmp_path)["flat"]
    assert value(row, "heldout_loss") == pytest.approx(math.log(tiny.VOCAB), rel=1e-5)


def test_held_out_loss_is_left_out_where_there_is_no_head(place, tmp_path):
    rows = measure(place, ["heldout_loss"], {"bare": "bare", "one": "one"}, tmp_path)
    assert "heldout_loss" not in rows["bare"]["metrics"]
    assert value(rows["one"], "heldout_loss") > 1


def test_held_out_loss_is_left_out_for_another_vocabulary(place, tmp_path):
    tiny.save(tiny.model("bert", "mlm", vocab_size=59), place / "foreign", tiny.tokenizer(59))
    assert not measure(place, ["heldout_loss"], {"foreign": "foreign"}, tmp_path)["foreign"]["metrics"]


@pytest.mark.parametrize("teacher, other", [("one", "other"), ("left", "right")])
def test_kl_is_zero_for_the_teacher_and_positive_for_another(place, tmp_path, teacher, other):
    rows = measure(place, ["kl"], {"teacher": teacher, "other": other, "bare": "bare"}, tmp_path)
    assert value(rows["teacher"], "kl") == pytest.approx(0, abs=1e-6)
    assert value(rows["other"], "kl") > 0.01
    assert "kl" not in rows["bare"]["metrics"]


# Similarity, speed


def test_sts_is_the_rank_correlation_with_the_file(place, tmp_path):
    texts = texts_of("beta", 24, seed=9)
    embeddings = encode(tiny.model("bert", "mlm", seed=1).base_model, tiny.tokenizer(), texts, 48)
    cosine = torch.cosine_similarity(embeddings[:12], embeddings[12:]).tolist()
    gold = sorted(range(12), key=lambda i: cosine[i])
    pairs = [{"text_a": texts[i], "text_b": texts[i + 12], "score": place} for place, i in enumerate(gold)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    on = [{"sts": {"source": str(tmp_path / "pairs.jsonl")}}]
    rows = measure(place, on, {"one": "one", "untrained": "other"}, tmp_path)
    assert value(rows["one"], "sts") == pytest.approx(1)
    (told,) = json.loads((tmp_path / RESULT).read_text())["comparisons"]
    assert (told["row"], told["against"], told["measure"]) == ("one", "untrained", "STS")
    assert (told["items"], told["of"]) == (12, "pairs") and told["low"] < told["difference"] < told["high"]
    assert told["difference"] == pytest.approx(1 - value(rows["untrained"], "sts"))


@pytest.fixture
def hub(monkeypatch):
    """A hub of two data sets: one that is there, and one that cannot be reached."""
    import datasets

    rows = [{"sentence1": text, "sentence2": f"{text} so", "label": n} for n, text in enumerate(texts_of("beta", 8))]

    def load(name, configuration, split):
        if name == "away/pairs":
            raise ConnectionError("Couldn't reach 'away/pairs' on the Hub")
        assert (name, configuration) == ("here/pairs", "small")
        if split != "validation":
            raise ValueError(f"Unknown split {split!r}")
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_pairs_of_a_data_set_are_those_of_a_file(hub):
    pairs = sts.read("here/pairs:small", "validation")
    assert [score for *_, score in pairs] == list(range(8)) and pairs[0][1] == f"{pairs[0][0]} so"
    with pytest.raises(UserError, match="data set here/pairs:small: Unknown split 'dev'"):
        sts.read("here/pairs:small", "dev")


def test_an_optional_data_set_that_is_not_at_hand_leaves_its_column_empty(place, tmp_path, hub):
    on = [{"sts": {"source": "away/pairs", "optional": True}}]
    assert not measure(place, on, {"one": "one"}, tmp_path)["one"]["metrics"]
    said = json.loads((tmp_path / RESULT).read_text())["metrics"]["sts"]["note"]
    assert said.startswith("not measured: away/pairs is not at hand")
    with pytest.raises(UserError, match="away/pairs is not here and cannot be downloaded; a jsonl"):
        measure(place, [{"sts": {"source": "away/pairs"}}], {"one": "one"}, tmp_path)


def test_checkpoints_of_one_architecture_share_a_speed(place, tmp_path):
    rows = measure(place, ["speed"], {"a": "left", "b": "right", "c": "bare"}, tmp_path)
    assert value(rows["a"], "speed") == value(rows["b"], "speed") != value(rows["c"], "speed")


def test_where_nothing_is_held_out_speed_is_measured_and_the_rest_refused_before_training(place, tmp_path):
    spec = CorpusSpec(source=str(place / "texts.jsonl"), tokenizer="one", length=48, heldout=0.0)
    corpus.prepare(spec, place / "one", place / "corpora" / "whole")
    assert value(measure(place, ["speed"], {"one": "one"}, tmp_path, data="whole")["one"], "speed") > 0
    recipe = SimpleNamespace(models={"one": None}, corpora={"whole": spec})
    context = SimpleNamespace(recipe=recipe, model=place.joinpath, corpus=lambda name: place / "corpora" / name)
    for metric in ("probe", "agreement", "kl", "heldout_loss"):
        spec = SimpleNamespace(rows={"teacher": "one", "a": "a.start"}, on=[metric], data="whole", teacher=None)
        with pytest.raises(UserError, match="set `heldout`"):
            evaluate.foresee(spec, context)
    evaluate.foresee(SimpleNamespace(rows={"teacher": "stage"}, on=["kl"], data="whole", teacher=None), context)
    evaluate.foresee(SimpleNamespace(rows={"teacher": "one"}, on=["kl"], data="a stage", teacher=None), context)


# Stages


def test_a_second_run_gives_the_same_figures(place, tmp_path):
    on = ["probe", "agreement", "heldout_loss", "kl"]
    rows = {"teacher": "one", "student": "other"}
    assert measure(place, on, rows, tmp_path) == measure(place, on, rows, tmp_path)


def test_trained_rows_have_a_value_a_seed_and_a_fixed_model_has_one(place, tmp_path):
    for seed in range(3):
        tiny.save(tiny.model("bert", "mlm", seed=10 + seed), place / f"student{seed}", tiny.tokenizer())
    rows = measure(place, ["agreement"], {"teacher": "one", "student": "student@"}, tmp_path, seeds=3)
    assert len(rows["teacher"]["metrics"]["agreement"]["seeds"]) == 1
    student = rows["student"]["metrics"]["agreement"]
    assert len(set(student["seeds"])) == 3
    assert student["mean"] == pytest.approx(sum(student["seeds"]) / 3)


def test_each_seed_is_compared_with_its_own_teacher(place, tmp_path):
    for seed in range(2):
        tiny.save(tiny.model("bert", "mlm", seed=20 + seed), place / f"own{seed}", tiny.tokenizer())
    rows = {"teacher": "own@", "student": "other"}
    found = measure(place, ["kl", "agreement"], rows, tmp_path, seeds=2)["teacher"]["metrics"]
    assert found["kl"]["seeds"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert found["agreement"]["seeds"] == pytest.approx([1.0, 1.0])


def test_equal_checkpoints_are_measured_once(place):
    tiny.save(tiny.model("bert", "mlm", seed=1), place / "copy", tiny.tokenizer())
    subjects = bench.Subjects(place / "corpora" / "texts")
    assert subjects.at(place / "copy") is subjects.at(place / "one")
    assert len(subjects.all()) == 1


def test_parameters_are_counted_in_the_checkpoint(place, tmp_path):
    rows = measure(place, ["speed"], {"one": "one"}, tmp_path)
    assert rows["one"]["params"] == sum(p.numel() for p in tiny.model("bert", "mlm").parameters())


def test_the_result_names_machine_versions_and_command_but_no_place(place, tmp_path):
    measure(place, ["speed"], {"one": "one"}, tmp_path)
    result = json.loads((tmp_path / RESULT).read_text())
    assert set(result["machine"]) == {"cores", "cpu", "memory", "gpu"}
    assert {"python", "torch", "transformers"} <= set(result["versions"])
    assert str(place) not in (tmp_path / RESULT).read_text()


@pytest.mark.parametrize(
    "label, reference, found",
    [
        ("teacher", "minilm", "teacher"),
        ("big", "the_one", "teacher"),
        ("student", "student", "student"),
        ("halved", "student", "student"),
        ("cut", "student.start", "baseline"),
        ("alone", "twin", "scratch"),
        ("scratch", "s", "scratch"),
        ("assistant", "middle", "assistant"),
        ("student without a teacher", "alone", "scratch"),
    ],
)
def test_roles_come_from_labels_and_references(label, reference, found):
    assert role(label, reference, "the_one") == found


# What cannot be measured


@pytest.mark.parametrize(
    "on, rows, data, message",
    [
        (["probe"], {"one": "one"}, "plain", "fewer than 2 parts"),
        (["agreement"], {"one": "one"}, "texts", "call a row `teacher`"),
        (["kl"], {"teacher": "bare"}, "texts", "no language-model head"),
        (["sts"], {"one": "one"}, "texts", "needs a jsonl of"),
        ([{"sts": {"source": "nowhere.jsonl"}}], {"one": "one"}, "texts", "nowhere.jsonl does not exist"),
        (["prob"], {"one": "one"}, "texts", "did you mean 'probe'"),
        ([{"probe": {"fold": 3}}], {"one": "one"}, "texts", "did you mean 'folds'"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(place, tmp_path, monkeypatch, on, rows, data, message):
    monkeypatch.setattr(bench.models, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message):
        measure(place, on, rows, tmp_path, data=data)
    assert not (tmp_path / RESULT).exists()


@pytest.mark.parametrize("line", ["[1, 2]", '{"text_a": "x", "score": 1}', "{"])
def test_a_broken_pair_is_named_with_its_line(place, tmp_path, line):
    good = json.dumps({"text_a": "x", "text_b": "y", "score": 1})
    (tmp_path / "pairs.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=r"pairs\.jsonl:2"):
        measure(place, [{"sts": {"source": str(tmp_path / "pairs.jsonl")}}], {"one": "one"}, tmp_path)


def test_recipes_know_every_metric():
    for known in (evaluate.OF_TEXT, evaluate.OF_RANKERS):
        assert EvaluateSpec(rows={"a": "b"}, on=list(known), data="some").on == tuple(known)


def test_names_of_metrics_cost_no_torch():
    code = "import sys, distill.evaluate; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
