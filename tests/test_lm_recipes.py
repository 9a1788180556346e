"""The distillation recipes of language models in small, by the command: what makes each of them that method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill import recipe
from growth.errors import UsageError

STAGES = {  # the stages that train, and what makes them small
    "logit_kd": ("teacher", "student", "twin"),
    "salt": ("teacher", "student", "twin"),
    "ensemble": ("first", "second", "third", "student", "pupil", "twin"),
    "truncation": ("teacher", "student", "taught", "twin"),
    "self_distillation": ("base", "teacher", "student", "longer"),
}
SMALL = {
    "ensemble": ("corpora.little.limit=60", "corpora.little.length=16"),
    "self_distillation": (
        *("corpora.code.limit=20", "corpora.code.heldout=0", "corpora.code.length=16"),
        *("corpora.prose.limit=60", "corpora.prose.length=16"),
        'report.evaluate.on=["heldout_loss"]',
    ),
    "salt": (
        "student.train.loss.0.ce.weight.points=[[0, 0.1], [2, 1.0]]",
        "student.train.loss.1.divergence.weight.points=[[0, 0.9], [2, 0.0]]",
        *(f"{stage}.train.evaluate_every=2" for stage in ("student", "twin")),
    ),
}
PROSE = ("corpora.prose.limit=60", "corpora.prose.length=16", "corpora.prose.heldout=0.3")
STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture
def ran(place, request):
    """A recipe of the package with a few steps a stage: its run directory; run once."""

    def run(name: str) -> Path:
        if not (place / name).exists():
            steps = [f"{stage}.train.stop.steps={STEPS}" for stage in STAGES[name]]
            small = (*SMALL.get(name, ()), *(PROSE if name not in ("ensemble", "self_distillation") else ()))
            command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", name, *small, *steps, "--out", name]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=250)
            assert done.returncode == 0, done.stderr
        return place / name

    return run


def metrics(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "stage.json").read_text())["metrics"]


def log(run: Path, stage: str) -> list[dict]:
    return [
        entry for line in (run / stage / "log.jsonl").read_text().splitlines() if (entry := json.loads(line))["step"]
    ]


def weights(run: Path, where: str) -> dict:
    return load_file(run / where / "model.safetensors")


def rows(run: Path) -> dict[str, dict]:
    report = json.loads((run / "report.json").read_text())
    return {row["name"]: row["metrics"] for row in report["rows"]}


def test_logit_kd_has_a_teacher_at_every_step_and_its_twin_has_none(ran):
    run = ran("logit_kd")
    assert all(entry["teacher_forwards"] == {"t": 1} for entry in log(run, "student"))
    assert metrics(run, "twin")["teacher_flops"] == 0 < metrics(run, "student")["teacher_flops"]
    student, twin = (log(run, stage) for stage in ("student", "twin"))
    assert [entry["tokens"] for entry in student] == [entry["tokens"] for entry in twin]
    start, same = (weights(run, f"{stage}/start") for stage in ("student", "twin"))
    assert all(start[name].equal(same[name]) for name in start)
    assert abs(rows(run)["teacher"]["kl"]["mean"]) < 1e-6 < rows(run)["student"]["kl"]["mean"]


def test_the_small_teacher_of_salt_stops_and_its_cost_with_it(ran):
    run = ran("salt")
    early, late = log(run, "student")[:2], log(run, "student")[2:]
    assert all(entry["teacher_forwards"] == {"t": 1} and len(entry["weights"]) == 2 for entry in early)
    assert all(entry["teacher_forwards"] == {"t": 0} and entry["weights"] == {"ce": 1.0} for entry in late)
    assert all(entry["teacher_share"] == 0 for entry in late)
    assert early[-1]["teacher_flops"] == late[-1]["teacher_flops"] > 0
    assert metrics(run, "student")["teacher_forwards"] == {"t": 2}
    small, large = (json.loads((run / f"{stage}/model/config.json").read_text()) for stage in ("teacher", "student"))
    assert small["hidden_size"] < large["hidden_size"] and small["num_hidden_layers"] < large["num_hidden_layers"]


def test_an_ensemble_is_of_models_that_began_and_read_differently(ran):
    run = ran("ensemble")
    starts = [weights(run, f"{stage}/start")["model.layers.0.mlp.up_proj.weight"] for stage in STAGES["ensemble"][:3]]
    assert not any(one.equal(other) for one, other in zip(starts, [*starts[1:], starts[0]], strict=True))
    assert len({log(run, stage)[0]["tokens"] for stage in STAGES["ensemble"][:3]}) > 1  # other rows: other padding
    assert [metrics(run, stage)["teacher_forwards"].get("t") for stage in STAGES["ensemble"][3:]] == [12, 4, None]
    assert all(set(entry["terms"]) == {"divergence.forward_kl"} for entry in log(run, "student"))


def test_a_truncated_student_starts_with_layers_of_its_teacher_and_never_runs_it(ran):
    run = ran("truncation")
    teacher, start = weights(run, "teacher/model"), weights(run, "student/start")
    for new, old in enumerate((0, 2, 5)):
        kept = {name: x for name, x in start.items() if f".layers.{new}." in name}
        assert len(kept) == 9 and all(teacher[name.replace(f".{new}.", f".{old}.")].equal(kept[name]) for name in kept)
    assert start["model.embed_tokens.weight"].equal(teacher["model.embed_tokens.weight"])
    assert metrics(run, "student")["teacher_flops"] == 0 < metrics(run, "taught")["teacher_flops"]
    taught = weights(run, "taught/start")
    assert all(start[name].equal(taught[name]) for name in start)


def test_in_self_distillation_the_student_is_what_its_teacher_was_and_reads_two_views(ran):
    run = ran("self_distillation")
    base, begun = weights(run, "base/model"), [weights(run, f"{stage}/start") for stage in ("teacher", "student")]
    assert all(base[name].equal(start[name]) for start in begun for name in base)
    assert all(set(entry["terms"]) == {"ce.mlm", "hidden.last"} for entry in log(run, "student"))
    # the first step's masked tokens are those of the teacher's first step: the same start, rows and masks
    assert log(run, "student")[0]["terms"]["ce.mlm"] == log(run, "teacher")[0]["terms"]["ce.mlm"]
    assert all(entry["teacher_forwards"] == {"t": 1} for entry in log(run, "student"))  # the plain view alone
    body = metrics(run, "student")["flops"] - metrics(run, "teacher")["flops"]
    assert body == 3 * metrics(run, "student")["teacher_flops"]  # a pass forward and backward is three forward


def test_a_stream_goes_on_only_in_the_order_of_its_seed():
    further = "twin.train.data={from: prose, after: student}"
    assert recipe.load("logit_kd", [further, "student.train.seed=5", "twin.train.seed=5"])
    with pytest.raises(UsageError, match="stage 'student' has another `seed`, so another order"):
        recipe.load("logit_kd", [further, "twin.train.seed=5"])


@pytest.mark.parametrize("name", STAGES)
def test_the_report_has_the_student_beside_one_without_the_method(ran, name):
    found = rows(ran(name))
    assert all("heldout_loss" in metrics for metrics in found.values())
    assert "student" in found and {"scratch", "twin"} & found.keys()


# Layer by layer (TinyBERT), and predictions with the last states (DistilBERT)

PUBLISHED = Path(__file__).parent.parent / "recipes/paper"


def losses(where, stage: str = "student") -> list[tuple[str, object]]:
    return recipe.load(where).stage(stage).train.objectives()


@pytest.mark.parametrize(
    ("where", "layers", "of", "maps"), [("tinybert", 3, 6, [False]), (PUBLISHED / "tinybert.yaml", 4, 12, [True, True])]
)
def test_tinybert_has_every_layer_one_of_the_teachers_evenly_spaced(where, layers, of, maps):
    """g(m) = m N / M, from m = 0, the embeddings; where the student is narrower their map is their own."""
    *hidden, scores = (loss for _, loss in losses(where))
    every = [(m - 1, m * of // layers - 1) for m in range(1, layers + 1)]
    assert [pair for loss in hidden for pair in loss.pairs] == [("embeddings", "embeddings"), *every]
    assert scores.pairs == every and [loss.project for loss in hidden] == maps
    assert all((loss.kind, loss.position) == ("mse", "all") for loss in hidden)


@pytest.mark.parametrize("where", ["distilbert", PUBLISHED / "distilbert.yaml"])
def test_distilbert_weighs_its_three_losses_as_published(where):
    found = {name: loss for name, loss in losses(where)}
    assert [(name, loss.weight.value) for name, loss in found.items()] == [("divergence", 5), ("ce", 2), ("hidden", 1)]
    soft, states = found["divergence"], found["hidden"]
    assert (soft.kind, soft.temperature.value, soft.temperature_squared) == ("forward_kl", 2, True)
    assert (states.kind, states.position, states.pairs) == ("cosine", "all", [("last", "last")])


@pytest.mark.parametrize(("name", "trainable"), [("tinybert", "14.4"), ("distilbert", "67.0")])
def test_their_published_settings_are_accepted_from_a_config_alone(name, trainable, tmp_path, monkeypatch, capsys):
    from transformers import BertConfig

    from distill import forecast

    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "teacher")
    published = recipe.load(PUBLISHED / f"{name}.yaml", ["models.teacher={from: ./teacher}"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    forecast.show(published, tmp_path / "out", ranks=8, rate=4e14)
    assert f" {trainable} M " in capsys.readouterr().out
