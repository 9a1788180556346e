"""Laws of the accounting: what stages say is what the report adds up, and FLOPs that are modelled stand apart."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
import yaml

from distill import report
from distill.evaluate import RESULT
from distill.report import costs, figures, plots, words
from growth.bits import FILE, Mask, write_masks

TRAIN = {"data": "text", "loss": [{"ce": {"objective": "mlm"}}], "optim": {"batch": 4}, "lr": 0.1, "stop": {"steps": 9}}
LOW = {"rank": 2, "alpha": 2}
SPARSIFIED = {"grow": {"from": "dense.start", "ops": [{"sparsify": {"sparsity": 0.75}}]}}
RECIPE = {
    "recipe": "costly",
    "seeds": 2,
    "models": {"teacher": {"from": "someone/big-one"}},
    "corpora": {"text": {"source": "stdlib", "tokenizer": "teacher"}},
    "stages": [
        {"id": "dense", "train": {**TRAIN, "student": {"new": {"like": "teacher"}}}},
        {"id": "sparse", "train": {**TRAIN, "student": SPARSIFIED, "hooks": [{"mask": {}}]}},
        {"id": "whole", "grow": {"from": "sparse", "ops": ["densify"]}},
        {"id": "tuned", "train": {**TRAIN, "student": {"from": "whole"}}},
        {
            "id": "factors",
            "train": {**TRAIN, "student": {"new": {"like": "dense"}, "lowrank": LOW}},
        },
        {"id": "small", "train": {**TRAIN, "student": {"new": {"like": "teacher"}}}},
        {"id": "worth", "evaluate": {"rows": {"teacher": "teacher"}, "on": ["heldout_loss"], "data": "text"}},
        {"id": "more", "evaluate": {"rows": {"teacher": "teacher"}, "on": ["heldout_loss"], "data": "text"}},
    ],
}
G = 10**10
SPENT = {"flops": 800 * G, "teacher_flops": 0, "tokens": 300, "seconds": 20.0, "memory": 10**9}
MASKED = {"density": 0.25, "density_mean": 0.4, "flops_modelled": 500 * G, "executed_sparse": False}
STAGES = {
    "dense": SPENT,
    "sparse": {**SPENT, "sparsity": MASKED, "memory": 2 * 10**9},
    "tuned": {**SPENT, "flops": 200 * G, "tokens": 100, "seconds": 5.0},
    "factors": {**SPENT, "flops": 880 * G, "lowrank": {"held": 30, "whole": 60}},
    "small": {**SPENT, "flops": 500 * G},
}


def put(run, stage, metrics, seeds=(0, 1)):
    for seed in seeds:
        directory = run / f"{stage}@{seed}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "stage.json").write_text(json.dumps({"state": "done", "metrics": metrics}))


def row(name, reference):
    loss = {"mean": 3.0, "seeds": [2.9, 3.1], "better": "low", "error": 0.01}
    return {"name": name, "role": "student", "reference": reference, "params": 9, "metrics": {"heldout_loss": loss}}


def evaluated(run, stage, rows):
    facts = {"title": "held-out loss", "better": "low", "digits": 3, "quality": True, "note": "a note"}
    machine = {"cores": 2, "cpu": "a processor", "memory": 10**9, "gpu": None}
    result = {"metrics": {"heldout_loss": facts}, "rows": rows, "machine": machine, "versions": {}, "command": "run"}
    (run / stage).mkdir(exist_ok=True)
    (run / stage / RESULT).write_text(json.dumps(result))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda *_: {})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    for stage, metrics in STAGES.items():
        put(tmp_path, stage, metrics)
    for seed in (0, 1):
        (tmp_path / f"sparse@{seed}/model").mkdir()
        write_masks(tmp_path / f"sparse@{seed}/model" / FILE, {"w": Mask.of(torch.arange(8) < 2)})
    references = ("teacher", "dense", "sparse", "tuned", "tuned.start", "factors", "small")
    evaluated(tmp_path, "worth", [row(reference, reference) for reference in references])
    return tmp_path


def found(run):
    """reference -> cost, as report.json has it."""
    return {row["name"]: row["cost"] for row in report.rebuild(run)["rows"] if "cost" in row}


def lines(run):
    """name -> heading -> cell."""
    columns, rows = costs.table(figures.gather(run))
    return {cells[0]: dict(zip(columns, cells, strict=True)) for cells in rows}


def test_a_row_costs_all_the_stages_that_it_was_made_from(run):
    cost = found(run)
    assert {"teacher"} == {row["name"] for row in report.rebuild(run)["rows"]} - cost.keys()
    assert (cost["tuned"]["flops_executed"], cost["tuned"]["flops_modelled"]) == (1000 * G, 700 * G)
    assert (cost["tuned"]["seconds"], cost["tuned"]["memory"]) == (20 + 5, 2 * 10**9)
    before = {key: cost["sparse"][key] for key in cost["sparse"] if key not in ("density", "of_dense")}
    assert before == {key: cost["tuned.start"][key] for key in before}


def test_modelled_and_executed_flops_differ_where_masks_are_and_nowhere_else(run):
    differ = [name for name, cost in found(run).items() if cost["flops_modelled"] != cost["flops_executed"]]
    assert differ == ["sparse", "tuned", "tuned.start"]
    assert {cost["executed_sparse"] for cost in found(run).values()} == {"none"}


def test_the_density_is_averaged_over_tokens_and_the_final_one_is_that_of_the_checkpoint(run):
    told = {name: (cost["density_mean"], cost["density"]) for name, cost in found(run).items()}
    assert told == {
        "dense": (1, 1),
        "sparse": (0.4, 0.25),
        "tuned": (pytest.approx((300 * 0.4 + 100 * 1) / 400), 1),
        "tuned.start": (0.4, 1),
        "factors": (0.5, 0.5),
        "small": (1, 1),
    }


def test_a_small_dense_model_of_equal_flops_has_the_share_of_its_sparse_one(run):
    cost = found(run)
    assert cost["sparse"]["of_dense"] == cost["small"]["of_dense"] == 500 / 800
    assert cost["dense"]["of_dense"] == 1 and cost["factors"]["of_dense"] == 880 / 800


def test_what_seeds_spent_is_averaged(run):
    put(run, "dense", {**SPENT, "seconds": 40.0}, seeds=[1])
    assert found(run)["dense"]["seconds"] == 30


def test_json_markdown_and_terminal_tell_the_same(run):
    with contextlib.redirect_stdout(io.StringIO()) as terminal:
        cost = found(run)["tuned"]
    shown, written = terminal.getvalue(), (run / "report.md").read_text()
    cells = ["7.00e12", "0.88", "1.00e13", "0.55", "1.00", "25.0 s", "2.0 GB"]
    assert cells[:2] == [costs.flops(cost["flops_modelled"]), f"{cost['of_dense']:.2f}"]
    assert cells[2:5] == [costs.flops(cost["flops_executed"]), *(f"{cost[k]:.2f}" for k in ("density_mean", "density"))]
    assert f"| tuned | {' | '.join(cells)} |" in written
    line = [line for line in shown.splitlines() if line.startswith("tuned ")][1]
    assert [cell.strip() for cell in line.split("  ") if cell.strip()] == ["tuned", *cells]
    assert shown.index("what it cost") > shown.index("held-out loss") and "## What it cost" in written


def test_where_all_is_dense_a_row_is_short(run):
    evaluated(run, "worth", [row("dense", "dense"), row("small", "small")])
    assert lines(run)["dense"] == {"": "dense", "FLOPs": "8.00e12", "time": "20.0 s", "memory": "1.0 GB"}
    assert not any("modelled" in line for line in costs.legend(figures.gather(run)))


def test_teachers_are_counted_apart(run):
    put(run, "small", {**STAGES["small"], "teacher_flops": 4000 * G})
    assert (lines(run)["small"]["teachers"], lines(run)["dense"]["teachers"]) == ("4.00e13", "-")
    assert found(run)["small"]["flops_executed"] == 500 * G


def test_what_was_executed_sparse_is_told_with_the_flops(run):
    put(run, "sparse", {**STAGES["sparse"], "flops": 700 * G, "sparsity": {**MASKED, "executed_sparse": "2:4"}})
    assert lines(run)["sparse"]["executed"] == "7.00e12 (2:4)" and lines(run)["dense"]["executed"] == "8.00e12"
    assert found(run)["tuned"]["executed_sparse"] == "2:4"


def test_a_checkpoint_that_is_measured_twice_has_one_line(run):
    evaluated(run, "more", [row("dense", "dense"), row("tuned", "small")])
    assert [*lines(run)] == ["dense", "sparse", "tuned", "tuned.start", "factors", "small"]


def test_stages_of_a_time_before_the_accounting_have_no_line(run):
    put(run, "factors", {"steps": 9, "seconds": 4.0})
    put(run, "small", {key: value for key, value in STAGES["small"].items() if key != "memory"})
    assert "factors" not in lines(run) and lines(run)["small"]["memory"] == "-"
    for stage in STAGES:
        put(run, stage, {"steps": 9, "seconds": 4.0})
    report.rebuild(run)
    assert "What it cost" not in (run / "report.md").read_text() and not words.costs.gather(run, [row("d", "dense")])
