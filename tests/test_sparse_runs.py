"""A student that is trained sparse, from its start through a kill to its export; and what is refused beforehand."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_families
import torch
import yaml
from safetensors.torch import load_file, save_file

import growth
from distill import loading, models, preflight, recipe
from distill.context import Context
from distill.cost import Cost
from distill.kinds import StudentSpec
from distill.sparsity import stored
from distill.sparsity.choosing import Groups
from growth import masks
from growth.errors import UserError
from growth.gradual import Gradual

pytestmark = pytest.mark.timeout(900)  # whole runs, on machines that do other things too

TRAIN = {
    "data": "text",
    "loss": [{"ce": {}}],
    "optim": {"batch": 4},
    "lr": 0.01,
    "stop": {"steps": 6},
    "save_every": 2,
}
RECIPE = {
    "recipe": "sparse",
    "engine": {"micro_batch": 2, "zero": 1, "precision": "bf16"},
    "models": {"m": "m"},
    "corpora": {"text": {"source": "synthetic", "tokenizer": "m", "length": 32, "heldout": 0.2, "limit": 100}},
    "stages": [
        {"id": "init", "grow": {"from": "m", "ops": [{"sparsify": {"pattern": "2:4"}}]}},
        {"id": "kept", "train": TRAIN | {"student": {"from": "init"}, "hooks": [{"mask": {"from": "init"}}]}},
        {"id": "moved", "train": TRAIN | {"student": {"from": "kept"}, "stop": {"steps": 7}, "hooks": [
            {"sparsify": {"how": "rigl", "every": 2, "check_every": 1, "hold": "bits"}}]}},
        {"id": "fewer", "train": TRAIN | {"student": {"from": "m"}, "stop": {"steps": 12},
                                          "hooks": [{"sparsify": {"sparsity": 0.8, "every": 2}}]}},
        {"id": "dense", "grow": {"from": "moved", "ops": ["densify"]}},
        {"id": "tuned", "train": TRAIN | {"student": {"from": "dense"}, "stop": {"steps": 1}}},
    ],
}  # fmt: skip


def run(place: Path, out: str, fault: str = "", ranks: int = 1) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", "r.yaml", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse")
    tiny.save(tiny.model("bert", head="mlm"), path / "m", tiny.tokenizer())
    (path / "r.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def place(written):
    ended = run(written, "whole")
    assert ended.returncode == 0, ended.stderr
    return written


def log(place: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (place / stage / "log.jsonl").read_text().splitlines()]


def metrics(place: Path, stage: str) -> dict:
    return json.loads((place / stage / "stage.json").read_text())["metrics"]


def alive(directory: Path) -> dict[str, torch.Tensor]:
    """Compared with the weights as it is read."""
    return {name: mask.bools() for name, mask in masks.read(directory).items()}


def test_static_masks_go_with_the_student_to_the_bit(place):
    init, start, model = (alive(place / "whole" / d) for d in ("init/model", "kept/start", "kept/model"))
    assert init.keys() == start.keys() == model.keys() and len(init) == 6 * tiny.LAYERS
    assert all(torch.equal(init[name], start[name]) and torch.equal(init[name], model[name]) for name in init)
    before, after = (load_file(place / "whole" / d / "model.safetensors") for d in ("kept/start", "kept/model"))
    assert all((before[n] != after[n])[init[n]].any() for n in init)


def test_rewired_masks_keep_the_pattern_and_the_number_of_weights(place):
    before, after = masks.read(place / "whole/moved/start"), masks.read(place / "whole/moved/model")
    assert {mask.pattern for mask in after.values()} == {"2:4"}
    assert {name: mask.kept for name, mask in after.items()} == {name: mask.kept for name, mask in before.items()}
    assert all(not torch.equal(before[name].bools(), after[name].bools()) for name in before)


def test_gradual_pruning_follows_its_plan_and_never_brings_a_weight_back(place):
    plan, entries = Gradual(0.8, 12, 2), log(place, "whole/fewer")
    assert [entry["density"] for entry in entries] == pytest.approx([plan.density(s) for s in range(12)], abs=1e-4)
    final = alive(place / "whole/fewer/model")
    assert sum(int(m.sum()) for m in final.values()) == round(0.2 * sum(m.numel() for m in final.values()))
    assert len({round(m.float().mean().item(), 3) for m in final.values()}) > 1  # one threshold for all


def test_what_is_modelled_is_told_apart_from_what_is_executed(place):
    bert = models.facts(place / "m")
    step = Cost(bert, True, {}, frozenset(), ((4, 32),)).step()
    masked = sum(mask.numel() for mask in alive(place / "whole/kept/model").values())
    assert {entry["step_flops_modelled"] for entry in log(place, "whole/kept")} == {step - 6 * 128 * masked // 2}
    listening = [entry["step_flops_modelled"] - (step - 6 * 128 * masked // 2) for entry in log(place, "whole/moved")]
    assert listening == [0, 2 * 128 * masked // 2, 0, 2 * 128 * masked // 2, 0, 0, 0]
    kept = metrics(place, "whole/kept")
    assert kept["flops"] == 6 * step and kept["sparsity"] == {
        "density": 0.5,
        "density_all": pytest.approx(1 - masked / 2 / bert.parameters),
        "density_mean": 0.5,
        "flops_modelled": 6 * (step - 6 * 128 * masked // 2),
        "executed_sparse": False,
    }
    assert "sparsity" not in metrics(place, "whole/tuned") and "density" not in log(place, "whole/tuned")[0]


def test_what_was_dead_comes_to_life_once_the_masks_are_dropped(place):
    dead = {name: ~mask for name, mask in alive(place / "whole/moved/model").items()}
    start, model = (load_file(place / "whole/tuned" / d / "model.safetensors") for d in ("start", "model"))
    assert not (place / "whole/tuned/model/masks.safetensors").exists()
    assert all(not start[name][dead[name]].any() for name in dead)
    grown = [(model[name][dead[name]] != 0).float().mean() for name in dead]
    assert min(grown) > 0.9 and all(tensor.isfinite().all() for tensor in model.values())


def test_a_run_killed_between_changes_ends_as_the_one_left_in_peace(place):
    for stage, step in (("moved", 12), ("fewer", 9)):  # of those that a process makes
        assert run(place, "hard", fault=f"train.step:kill:{step}").returncode == -9
        (snapshot,) = (place / "hard" / stage / "snapshots").glob("step-*")
        bits = load_file(snapshot / "masks.safetensors")
        assert all(tensor.dtype == torch.uint8 for tensor in bits.values()) and len(bits) == 6 * tiny.LAYERS
    ended = run(place, "hard")
    assert ended.returncode == 0 and "resumed from" in ended.stderr, ended.stderr
    for stage in ("moved", "fewer"):
        ours, theirs = (load_file(place / out / stage / "model/model.safetensors") for out in ("hard", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        ours, theirs = (alive(place / out / stage / "model") for out in ("hard", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert [e["terms"] for e in log(place, f"hard/{stage}")] == [e["terms"] for e in log(place, f"whole/{stage}")]


# Refused before anything runs


def said(place: Path, monkeypatch, train: dict, ops: list | None = None, engine: dict | None = None) -> str:
    monkeypatch.chdir(place)
    written = copy.deepcopy(RECIPE)
    written["engine"] |= engine or {}
    written["stages"] = [written["stages"][0], {"id": "s", "train": {**TRAIN, "student": {"from": "init"}, **train}}]
    written["stages"][0]["grow"]["ops"] += ops or []
    Path("other.yaml").write_text(yaml.safe_dump(written))
    read = recipe.load("other.yaml")
    with pytest.raises(UserError) as caught:
        preflight.check(read, Context(read, Path("out"), 0), 1)
    return str(caught.value)


KEPT, SKIPS = ({"hooks": [{"mask": keys}]} for keys in ({}, {"execute": "2:4"}))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"train": {}},
            "student: init is sparse, and nothing keeps its masks while it trains: hooks: [{mask: {}}] keeps",
        ),
        ({"train": {"student": {"from": "m"}} | KEPT}, "hooks.mask: the student has no masks"),
        ({"train": KEPT, "ops": ["densify"]}, "hooks.mask: the student has no masks"),
        ({"train": {"hooks": [{"mask": {"from": "m"}}]}}, "hooks.mask.from: m has no masks"),
        ({"train": {"hooks": [{"mask": {}}, {"sparsify": {"how": "set"}}]}}, "leave mask out"),
        ({"train": {"student": {"from": "m"}, "hooks": [{"sparsify": {"how": "set"}}]}}, "this one is dense"),
        ({"train": {"student": {"from": "m"}, "hooks": [{"sparsify": {"sparsity": 0.5}}]}}, "6 steps leave no time to"),
        ({"train": {"hooks": [{"mask": {}}, {"submodel": {"depths": [2, 4], "train_top": 1}}]}}, "as if they ran"),
        ({"train": SKIPS, "ops": ["densify", {"sparsify": {}}]}, "execute: masks are without a pattern, and kernels"),
        ({"train": SKIPS, "engine": {"precision": "fp32"}}, "execute: kernels for 2:4 are those of 16 bits; engine.pr"),
        ({"train": KEPT, "engine": {"deepspeed": {"optimizer": {"type": "Muon"}}}}, "cannot be kept with Muon: its up"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_what_can(written, monkeypatch, given, words):
    assert words in said(written, monkeypatch, **given)


def test_weights_that_are_not_zero_where_their_mask_says_so_are_refused_by_name(place, tmp_path):
    source = growth.open(place / "whole/init/model")
    name = next(iter(masks.read(source.path)))
    tensors = load_file(place / "whole/init/model/model.safetensors")
    tensors[name][~masks.read(source.path)[name].bools()] = 0.5
    for file in (place / "whole/init/model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"weights of {name} are not zero although"):
        stored.read(tmp_path)


# Masks and names


@pytest.mark.parametrize(
    ("family", "sizes"), [("gpt2", {"n_embd": 40, "n_inner": 44}), ("mixtral", {"intermediate_size": 40})]
)
def test_masks_are_written_as_they_were_read_whatever_parameters_are_called_in_memory(family, sizes, tmp_path):
    """GPT-2 stores its matrices the other way round, and Mixtral holds all experts of a layer in one tensor."""
    source = tiny_families.save(tmp_path / "m", family, **sizes)
    growth.sparsify(source, tmp_path / "sparse", pattern="2:4")
    held, student = stored.read(tmp_path / "sparse"), models.load(tmp_path / "sparse", "causal")
    named = {loading.inside(name, student): p for name, p in student.named_parameters()}
    assert all(not named[name][~one.alive].any() and one.alive.shape == named[name].shape for name, one in held.items())
    for one in held.values():
        assert set(Groups(one.dim, 4).rows(one.alive).sum(1).tolist()) == {2}
    models.save(student, tmp_path / "again", carry=None, masks=tmp_path / "sparse")
    before, after = alive(tmp_path / "sparse"), alive(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_masks_of_another_model_are_laid_over_a_dense_student_and_must_fit(place, tmp_path):
    spec, refs = StudentSpec(**{"from": "m"}), {"m": place / "m"}
    start = models.seed_checkpoint(spec, refs.get, tmp_path / "start", "mlm", 0, masks=place / "whole/init/model")
    assert all(torch.equal(mask, alive(place / "whole/init/model")[name]) for name, mask in alive(start).items())
    tiny.save(tiny.model("bert", head="mlm", intermediate_size=36), tmp_path / "other", tiny.tokenizer())
    refs["m"] = tmp_path / "other"
    with pytest.raises(
        UserError, match=r"masks encoder.layer.0.intermediate.dense.weight \[40, 48\]; the student has \[36"
    ):
        models.seed_checkpoint(spec, refs.get, tmp_path / "start2", "mlm", 0, masks=place / "whole/init/model")
    assert not (tmp_path / "start2").exists()
