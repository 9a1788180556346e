"""`gstack` and `bert2bert` in small, by the command: what is grown, what scratch gets, what the report says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ("corpora.code.limit=60", "corpora.code.heldout=0.2", "corpora.code.length=32", "engine.precision=fp32")
STEPS = {
    "gstack": {"small": 4, "grown": 6},
    "bert2bert": {"small": 4, "submodels": 3, "grown": 5},
}


@pytest.fixture(scope="module", params=STEPS)
def ended(request, tmp_path_factory) -> tuple[str, Path]:
    """A recipe of the package with few steps, and its run directory."""
    place = tmp_path_factory.mktemp(request.param)
    steps = [f"{stage}.train.stop.steps={n}" for stage, n in STEPS[request.param].items()]
    often = [f"{stage}.train.evaluate_every=2" for stage in (*STEPS[request.param], "scratch")]
    command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", request.param, *SMALL, *steps, *often]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", "run"], cwd=place, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return request.param, place / "run"


def metrics(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "stage.json").read_text())["metrics"]


def test_scratch_spends_what_the_other_arm_spent_to_within_a_step(ended):
    name, run = ended
    grown, scratch = metrics(run, "grown"), metrics(run, "scratch")
    spent = sum(metrics(run, stage)["flops"] for stage in STEPS[name])
    assert grown["flops"] + grown["flops_before"] == pytest.approx(spent)
    assert 0 <= scratch["flops"] - spent < scratch["flops"] / scratch["steps"] and scratch["flops_before"] == 0


def test_the_report_compares_them_and_says_what_was_saved(ended):
    _, run = ended
    report = json.loads((run / "report.json").read_text())
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    assert "heldout_loss" in rows["grown"] and "heldout_loss" in rows["scratch"]
    assert rows["scratch"]["saving"]["mean"] == pytest.approx(0.0)
    said = (run / "report.md").read_text()
    assert "the loss of scratch" in said and (run / "saving.png").exists()
