"""The moving average of a student as its teacher, and a step of two views, on every ZeRO stage that has them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from average_cases import BATCH, Rows, parts
from launch import launch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.testing import assert_close

from distill import projections
from distill.kinds import TargetSpec
from distill.lesson import Data, freeze_unreachable
from distill.schedules import Progress, Schedule
from distill.teachers.targets import Average

CELLS = [(0, 1), (1, 2), (2, 1), (3, 2)]  # ZeRO stage, ranks
every_cell = pytest.mark.parametrize(
    ("stage", "ranks", "precision"), [(*c, p) for c in CELLS[:3] for p in ("fp32", "bf16")]
)


@functools.cache
def results(stage: int, ranks: int) -> dict:
    return launch("average_cases.py", stage, ranks=ranks)[0]


@functools.cache
def plain() -> torch.Tensor:
    """The gradient of the whole batch at once, without an engine."""
    lesson, targets = parts()
    data, named = Data(Rows(), BATCH, BATCH, True, torch.device("cpu")), lesson.objectives
    freeze_unreachable(lesson, targets, data)
    (batch,) = data(0)
    counts = {f"{name}.{term}": float(n) for name, o in named.items() for term, n in o.count(batch).items()}
    terms = lesson(batch, targets(batch, named), named)
    trained = [p for p in lesson.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(value / counts[key] for key, value in terms.items()), trained)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize(("stage", "ranks"), CELLS)
def test_a_step_of_two_views_has_the_gradient_of_plain_torch(stage, ranks):
    for found in results(stage, ranks)["gradients"]:
        assert (torch.tensor(found) - plain()).norm() / plain().norm() <= 1e-6


@every_cell
def test_after_some_steps_the_average_is_the_sum_written_out(stage, ranks, precision):
    assert results(stage, ranks)[precision]["closed"] <= 1e-6


@every_cell
def test_a_stopped_run_with_an_average_goes_on_bit_for_bit(stage, ranks, precision):
    assert results(stage, ranks)[precision]["resumes"]


@every_cell
def test_without_memory_the_average_is_the_student_and_teaches_nothing(stage, ranks, precision):
    assert results(stage, ranks)[precision]["itself"] == pytest.approx([0.0] * 6, abs=1e-6)


def test_in_low_precision_the_average_keeps_all_digits_and_frequencies_of_positions_too():
    student = tiny.model("llama", "causal")
    average = Average(student, Schedule.constant(0.9), torch.bfloat16)
    engine = SimpleNamespace(names=["student.model.norm.weight"])
    engine.masters = lambda names: [(engine.names[0], student.model.norm.weight + 0.001)]
    average.moved(engine, Progress(0))
    (found,) = average.state().values()
    assert_close(found, student.model.norm.weight + 0.0001, rtol=0, atol=1e-7)
    (model,) = average.models
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(one.equal(other) for one, other in zip(model.buffers(), student.buffers(), strict=True))


def test_a_decay_is_a_share_and_may_be_a_schedule():
    assert TargetSpec(ema=0.99).ema.value == 0.99
    assert TargetSpec(ema={"unit": "fraction", "points": [[0, 0.9], [1, 1.0]]}).models == ()
    for decay in (-0.1, 1.0, 1.1, "0.9"):
        with pytest.raises(ValidationError):
            TargetSpec(ema=decay)


# A whole run

RECIPE = {
    "recipe": "averaged",
    "models": {"model": {"from": "model"}},
    "corpora": {"text": {"source": "synthetic", "tokenizer": "model", "length": 32, "heldout": 0.1, "limit": 200}},
    "stages": [
        {
            "id": "student",
            "train": {
                "student": {"from": "model"},
                "data": "text",
                "targets": {"t": {"ema": {"unit": "fraction", "points": [[0, 0.5], [1, 0.9]]}}},
                "loss": [
                    {"ce": {}},
                    {"hidden": {"target": "t", "position": "mean", "view": "plain"}},
                    {"hidden": {"target": "t", "project": True, "student_layer": [0, 1], "teacher_layer": [1, 3]}},
                ],
                "optim": {"batch": 4},
                "lr": 0.003,
                "stop": {"steps": 6},
                "save_every": 2,
            },
        }
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("averaged")
    tiny.save(tiny.model("bert", head="mlm"), path / "model", tiny.tokenizer())
    (path / "r.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def run(place, out: str, *more: str, fault: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", "r.yaml", "--out", out, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=250)


def test_a_killed_run_with_an_average_ends_as_the_one_left_in_peace(place):
    assert run(place, "hard", fault="train.step:kill:4").returncode == -9
    (kept,) = (place / "hard/student/snapshots").glob("*/average-t.safetensors")
    assert load_file(kept)
    for out in ("hard", "whole"):
        ended = run(place, out)
        assert ended.returncode == 0, ended.stderr
    for file in ("model/model.safetensors", projections.FILE):  # the map of the second loss is not in the model
        hard, whole = (load_file(place / out / "student" / file) for out in ("hard", "whole"))
        assert all(hard[name].equal(whole[name]) for name in whole)
        assert [name for name in whole if "hidden_2" in name] == ["hidden_2.weight"] * (file == projections.FILE)
    terms = [[json.loads(x)["terms"] for x in (place / out / "student/log.jsonl").open()] for out in ("hard", "whole")]
    assert terms[0] == terms[1] and terms[0][0]["hidden.last"] == 0 < terms[0][-1]["hidden.last"]


def test_zero_3_has_no_average_and_it_is_said_before_anything_runs(place):
    refused = run(place, "three", "engine.zero=3")
    assert refused.returncode == 2 and not (place / "three/student").exists()
    said = "stages.student.train: targets.t.ema: on ZeRO 3 no rank has all of the student to average"
    assert said in refused.stderr and "Traceback" not in refused.stderr
