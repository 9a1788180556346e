"""A whole run through the command: what it leaves behind, and that no accident on the way changes it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from safetensors.torch import load_file

from distill import snapshot
from growth.files import sha256

STEPS = 8
RECIPE = {
    "recipe": "small",
    "engine": {"zero": 1, "precision": "bf16", "micro_batch": 2},
    "models": {"teacher": {"from": "teacher"}},
    "corpora": {"text": {"source": "synthetic", "tokenizer": "teacher", "length": 64, "heldout": 0.1, "limit": 800}},
    "stages": [
        {
            "id": "student",
            "train": {
                "student": {"cut": {"from": "teacher", "layers": [0, 3]}},
                "data": "text",
                "targets": {"t": {"from": "teacher"}},
                "loss": [
                    {"relation_kl": {"target": "t", "heads": 6, "relations": ["qq", "vv"]}},
                    {"ce": {"weight": {"points": [[0, 1.0], [6, 0.0]]}}},
                ],
                "optim": {"batch": 4},
                "lr": 0.01,
                "stop": {"steps": STEPS},
                "save_every": 2,
            },
        },
        {
            "id": "report",
            "evaluate": {
                "rows": {"teacher": "teacher", "student": "student", "baseline": "student.start"},
                "on": [{"probe": {"parts": 4, "documents": 20}}, "agreement", "heldout_loss"],
            },
        },
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a teacher and a recipe."""
    path = tmp_path_factory.mktemp("place")
    tiny.save(tiny.model("bert", head="mlm"), path / "teacher", tiny.tokenizer())
    (path / "small.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def run(place: Path, out: str, *more: str, fault: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", "small.yaml", "--out", out, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=250)


def weights(place: Path, out: str) -> dict[str, str]:
    return {path.name: sha256(path) for path in (place / out / "student" / "model").glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(place) -> subprocess.CompletedProcess:
    """The run to which nothing happens."""
    ended = run(place, "whole")
    assert ended.returncode == 0, ended.stderr
    return ended


def test_a_run_ends_in_a_model_that_transformers_loads_and_a_report(place, whole):
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(
        place / "whole/student/model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.num_hidden_layers == 2
    report = json.loads((place / "whole/report.json").read_text())
    assert [row["role"] for row in report["rows"]] == ["teacher", "student", "baseline"]
    assert "student" in whole.stdout and (place / "whole/report.md").read_text()


def test_what_the_losses_cannot_reach_is_left_as_it_was_and_named(place, whole):
    before, after = (load_file(place / f"whole/student/{d}/model.safetensors") for d in ("start", "model"))
    frozen = json.loads((place / "whole/student/stage.json").read_text())["metrics"]["frozen"]
    card = (place / "whole/student/model/README.md").read_text()
    assert all(name in card for name in frozen)
    assert {name for name in before if before[name].equal(after[name])} == set(frozen)


def test_a_finished_run_is_not_done_again(place, whole):
    before = sha256(place / "whole/student/log.jsonl")
    again = run(place, "whole")
    assert again.returncode == 0 and "not run again" in again.stderr
    assert sha256(place / "whole/student/log.jsonl") == before


def test_nothing_that_happens_on_the_way_changes_the_outcome(place, whole):
    """Killed in a step, killed in a save, a full disk, SIGTERM: the weights are those of the run left in peace."""
    assert run(place, "hard", fault="train.step:kill:4").returncode == -9
    assert run(place, "hard", fault="snapshot.before_manifest:kill:1").returncode == -9
    full = run(place, "hard", fault="snapshot.after_file:enospc:2")
    assert full.returncode == 1 and full.stderr.strip().splitlines()[-1].startswith("error: disk full")
    assert [p.name for p in (place / "hard/student/snapshots").iterdir()] == ["step-00000002"]
    assert run(place, "hard", fault="train.step:term:3").returncode == 143
    ended = run(place, "hard")
    assert ended.returncode == 0 and "resumed from" in ended.stderr, ended.stderr
    assert weights(place, "hard") == weights(place, "whole")
    logs = [(place / out / "student/log.jsonl").read_text().splitlines() for out in ("hard", "whole")]
    seen = [[(e["step"], e["tokens"], e["terms"], e["grad_norm"]) for e in map(json.loads, log)] for log in logs]
    assert seen[0] == seen[1] and len(seen[0]) == STEPS


def test_a_rank_that_finds_the_disk_full_says_for_which_file():
    """Its own one of a local snapshot; the first rank, which owns the directory, says more."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        snapshot._write_file(Path("/dev/full"), {"a": (3,)}, [torch.ones(3)])


def test_two_ranks_on_another_stage_make_the_same_student(place, whole):
    """In float32, to rounding, of which Adam makes the steps of key biases, that softmax does not feel; a monitor of
    DeepSpeed hears what the log holds."""
    watched = "engine.deepspeed={csv_monitor: {enabled: true, output_path: watched, job_name: %s}}"
    settings = ("engine.precision=fp32", "stages.student.train.stop.steps=3")
    for out, more in {"one": (), "two": ("engine.zero=3", "--ranks", "2")}.items():
        ended = run(place, out, *settings, watched % out, *more)
        assert ended.returncode == 0, ended.stderr
        entries = map(json.loads, (place / out / "student/log.jsonl").read_text().splitlines())
        heard = (place / f"watched/{out}/distill_grad_norm.csv").read_text().split()[1:]
        assert heard == [f"{entry['step']},{entry['grad_norm']}" for entry in entries]
    one, two = (load_file(place / out / "student/model/model.safetensors") for out in ("one", "two"))
    felt = [name for name in one if not name.endswith("key.bias")]
    assert max(float((one[name] - two[name]).abs().max()) for name in felt) < 1e-5


def test_a_snapshot_with_a_flipped_bit_is_refused(place, whole):
    assert run(place, "spoilt", fault="train.step:kill:4").returncode == -9
    (file,) = (place / "spoilt/student/snapshots").glob("*/master.safetensors")
    whole_file = file.read_bytes()
    file.write_bytes(whole_file[:-1] + bytes([whole_file[-1] ^ 1]))
    refused = run(place, "spoilt")
    assert refused.returncode == 1 and str(file.relative_to(place)) in refused.stderr
    assert "Traceback" not in refused.stderr
    file.write_bytes(whole_file)


def test_an_interrupted_run_goes_on_with_another_recipe_when_told_to_and_the_report_says_so(place):
    """Goes on where the one before has stopped, after two steps."""
    change, said = "student.train.optim.weight_decay=0.5", "optim.weight_decay 0.01 -> 0.5"
    refused = run(place, "spoilt", change)
    assert refused.returncode == 1
    assert f"has changed since:\n  {said}\nundo that, or go on all the same" in refused.stderr
    assert run(place, "spoilt", change, "--accept-changes", fault="train.step:kill:2").returncode == -9
    ended = run(place, "spoilt", change)  # what was accepted once is what it is made from
    assert ended.returncode == 0 and "resumed from" in ended.stderr, ended.stderr
    told = f"student was changed after step 2: {said}."
    assert told in (place / "spoilt/report.md").read_text() and told in ended.stderr
    assert told in (place / "spoilt/student/model/README.md").read_text()
    metrics = json.loads((place / "spoilt/student/stage.json").read_text())["metrics"]
    assert metrics["overridden"] == [{"step": 2, "changes": [said]}]


@pytest.mark.timeout(600)
def test_a_rank_that_hangs_is_named_by_the_one_that_waits_and_the_job_ends(place):
    settings = ["student.train.stop.steps=5000", "engine.timeout=5"]
    command = [sys.executable, "-m", "distill.cli", "run", "small.yaml", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen([*command, "--ranks", "2", "--out", "left"], cwd=place, env=environment, **pipes)
    until = time.monotonic() + 150
    while not list(place.glob("left/student/snapshots/step-*[0-9]")) and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGSTOP)
    said = started.communicate(timeout=150)[1]
    first = next(line for line in said.splitlines() if "error: " in line)
    assert re.match(r"error: rank 1 \(student, [^)]*step \d+\) did nothing for 5 s and rank 0 waits", first), said
    assert started.returncode in (1, 137) and "Traceback" not in said and "Warning" not in said


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("point", "how", "code", "words"),
    [
        ("train.save", "raise", 1, "rank 1: [rank1]: RuntimeError: fault at train.save\n"),
        ("train.export", "kill", 137, "error: rank 1 was ended by SIGKILL\n"),
    ],
)
def test_a_rank_that_fails_is_heard_first_and_the_job_ends_within_a_minute(place, point, how, code, words):
    """Where the others wait for it: for its part of a snapshot, of the trained weights."""
    command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", "small.yaml", "student.train.stop.steps=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": f"{point}:{how}", "FAULT_RANK": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    out = place / f"failing-{point}"
    started = subprocess.Popen([*command, "--ranks", "2", "--out", out.name], cwd=place, env=environment, **pipes)
    heard = next(line for line in started.stderr if "Error: " in line or "error: " in line)
    since = time.monotonic()
    rest = started.communicate(timeout=120)[1]
    assert time.monotonic() - since < 60 and started.returncode == code
    assert heard == words and "Traceback" not in rest
    kept = [path.name for path in (out / "student").glob("snapshots/*")]
    assert kept == (["step-00000002"] if point == "train.export" else [])
    assert not (out / "student/model").exists()
