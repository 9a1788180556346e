"""`spdf`, `gradual` and `sltrain` in small, by the command: what is sparse when, and what each is compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import recipes as package
from distill import recipe
from growth import factored, masks
from growth.accounting import matched
from growth.bits import FILE
from growth.gradual import Gradual

pytestmark = pytest.mark.timeout(900)  # whole runs, on machines that do other things too

HERE = Path(package.__file__).parent
PROSE = ("corpora.prose.limit=150", "corpora.prose.length=16", "corpora.prose.heldout=0.3")
TUNED = ("dense", "half", "quarter", "small_half", "small_quarter")
STAGES = {  # the stages that train, and what makes them small
    "spdf": (*TUNED, *(f"{name}_tuned" for name in TUNED), "quarter_kept", "alone"),
    "gradual": ("dense", "gradual", "static", "small"),
    "sltrain": ("full", "student", "lowrank", "small"),
}
SMALL = {
    "spdf": ("corpora.reference.limit=60", "corpora.reference.length=16", "corpora.reference.heldout=0.3"),
    "gradual": ("gradual.train.hooks.0.sparsify.every=1",),
    "sltrain": (),
}
STEPS = {"spdf": 3, "gradual": 12, "sltrain": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture
def ran(place):
    """A recipe of the package with a few steps a stage: its run directory; run once."""

    def run(name: str) -> Path:
        if not (place / name).exists():
            steps = [f"{stage}.train.stop.steps={STEPS[name]}" for stage in STAGES[name]]
            command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", name, *PROSE, *SMALL[name], *steps]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, "--out", name], cwd=place, env=environment, capture_output=True, text=True, timeout=800
            )
            assert done.returncode == 0, done.stderr
        return place / name

    return run


def metrics(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "stage.json").read_text())["metrics"]


def spent(run: Path, *stages: str) -> dict:
    """What their logs add up to."""
    logs = [[json.loads(line) for line in (run / s / "log.jsonl").read_text().splitlines()] for s in stages]
    return {
        "flops_executed": sum(log[-1]["flops"] for log in logs),
        "flops_modelled": sum(
            sum(entry["step_flops_modelled"] for entry in log) if "density" in log[0] else log[-1]["flops"]
            for log in logs
        ),
        "memory": max(entry["memory"] for log in logs for entry in log),
    }


def weights(run: Path, where: str) -> dict:
    return load_file(run / where / "model.safetensors")


def rows(run: Path) -> dict[str, dict]:
    found = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    assert all("heldout_loss" in row["metrics"] for row in found.values())
    return found


@pytest.mark.parametrize(("stage", "density"), [("half", 0.5), ("quarter", 0.25)])
def test_spdf_is_sparse_from_its_first_step_to_the_last_and_then_learns_with_all_weights(ran, stage, density):
    run = ran("spdf")
    begun, start, end = (weights(run, where) for where in ("dense/start", f"{stage}/start", f"{stage}/model"))
    revived, tuned = (weights(run, f"{stage}_tuned/{where}") for where in ("start", "model"))
    kept = masks.read(run / stage / "model")
    assert len(kept) == 4 * 7 and all(mask.kept == int(density * mask.size) for mask in kept.values())
    for name, mask in kept.items():
        alive = mask.bools()
        assert (begun[name] * alive).equal(start[name])  # the same random weights as the dense model's
        assert not end[name][~alive].any() and end[name].equal(revived[name])
        assert (tuned[name][~alive] != 0).float().mean() > 0.9
    assert not (run / f"{stage}_tuned/model" / FILE).exists()


def test_spdf_compares_with_smaller_models_and_with_masks_that_stay(ran):
    run = ran("spdf")
    assert {"tuned/dense twin", "pretrained/baseline as 75 %", "task alone"} <= rows(run).keys()
    dense, *sparse = (metrics(run, stage) for stage in ("dense", "half", "quarter"))
    for found, stage in zip(sparse, ("half", "quarter"), strict=True):
        assert found["sparsity"]["flops_modelled"] < found["flops"] == dense["flops"]  # nothing sparse is executed
        assert metrics(run, f"small_{stage}")["flops"] < dense["flops"]
    for name, stages in {"tuned/75 % sparse": ("quarter", "quarter_tuned"), "task alone": ("alone",)}.items():
        wanted = spent(run, *stages)
        assert {key: rows(run)[name]["cost"][key] for key in wanted} == wanted
    before, after = (masks.read(run / where) for where in ("quarter/model", "quarter_kept/model"))
    assert all(mask.bools().equal(after[name].bools()) for name, mask in before.items())


def test_gradual_ends_at_a_fifth_and_static_has_its_average(ran):
    run = ran("gradual")
    gradual, static = (metrics(run, stage)["sparsity"] for stage in ("gradual", "static"))
    assert gradual["density"] == pytest.approx(0.2, abs=1e-4)
    assert gradual["density_mean"] == pytest.approx(Gradual(0.8, STEPS["gradual"], 1).average, abs=1e-4)
    assert static["density_mean"] == pytest.approx(0.4, abs=1e-4)
    dense, begun = weights(run, "dense/start"), weights(run, "gradual/start")
    assert all(dense[name].equal(begun[name]) for name in dense)
    pruned = masks.read(run / "pruned/model").values()
    assert sum(m.kept for m in pruned) / sum(m.size for m in pruned) == pytest.approx(0.2, abs=1e-3)
    costs = {name: row["cost"] for name, row in rows(run).items()}
    assert costs["gradual"]["density_mean"] == gradual["density_mean"] and len(costs) == 5
    assert [costs[name]["density"] for name in ("gradual", "pruned at once")] == pytest.approx([0.2, 0.2], abs=1e-3)
    assert costs["pruned at once"]["flops_modelled"] == costs["dense twin"]["flops_executed"]  # it was trained dense


def test_sltrain_exports_ordinary_models_with_their_factors_beside(ran):
    run = ran("sltrain")
    assert len({row["params"] for name, row in rows(run).items() if name != "small baseline"}) == 1
    held = metrics(run, "student")["lowrank"]
    cost = rows(run)["student"]["cost"]
    assert cost["density"] == cost["density_mean"] == held["held"] / held["whole"] < 0.5
    assert cost["flops_modelled"] == cost["flops_executed"] == metrics(run, "student")["flops"]
    student, alone = (factored.read(run / f"{stage}/model").values() for stage in ("student", "lowrank"))
    assert len(student) == len(alone) == 4 * 7
    assert all(f.indices.numel() > 0 for f in student) and all(f.indices.numel() == 0 for f in alone)


# The small dense models of equal FLOPs


def config(read: recipe.Recipe, stage: str) -> dict:
    return read.stage(stage).train.student.new.config


@pytest.mark.parametrize("name", ["spdf", "paper/spdf"])
def test_small_models_of_spdf_have_the_flops_of_the_sparse_ones(name):
    read = recipe.load(HERE / f"{name}.yaml")
    length = read.text(read.stage("dense").train.corpus).length
    for stage, density in (("half", 0.5), ("quarter", 0.25)):
        assert matched(config(read, "dense"), length, density) == config(read, f"small_{stage}")


@pytest.mark.parametrize("name", ["gradual", "paper/gradual"])
def test_the_small_model_of_gradual_has_the_flops_of_its_average_density(name):
    read = recipe.load(HERE / f"{name}.yaml")
    train = read.stage("gradual").train
    hook, length = train.hook_values()[0], read.text(train.corpus).length
    average = Gradual(hook.sparsity, train.stop.steps, hook.every, *hook.compute).average
    whole = config(read, "dense" if name == "gradual" else "gradual")
    assert matched(whole, length, average) == config(read, "small")
    assert average == pytest.approx(0.4, abs=0.01)  # that of `static`
