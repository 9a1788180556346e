"""Laws of the report: the same figures everywhere, sentences that follow from them, readable cards and pictures."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import socket

import pytest
import yaml

from distill import report
from distill.evaluate import RESULT
from distill.report import card, figures, plots, words
from growth.errors import UserError

TRAINED = {"data": "text", "optim": {"batch": 4}, "lr": 0.1, "stop": {"steps": 40}}
RECIPE = {
    "recipe": "halved",
    "about": "a model halved",
    "seed": 0,
    "seeds": 3,
    "equal": "steps",
    "models": {"teacher": {"from": ["someone/big-one", "package:big/model"]}},
    "corpora": {"text": {"source": "stdlib", "tokenizer": "teacher"}},
    "stages": [
        {
            "id": "student",
            "train": {
                **TRAINED,
                "student": {"cut": {"from": "teacher", "layers": [0, 1, 5]}},
                "targets": {"t": {"from": "teacher"}},
                "loss": [{"relation_kl": {"target": "t", "heads": 12}}],
            },
        },
        {
            "id": "twin",
            "train": {
                **TRAINED,
                "student": {"new": {"like": "student"}},
                "targets": {},
                "loss": [{"relation_kl": None, "ce": {"objective": "mlm"}}],
            },
        },
        {"id": "worth", "evaluate": {"rows": {"teacher": "teacher"}, "on": ["probe"]}},
    ],
}
METRICS = {
    "probe": {"title": "probe", "better": "high", "digits": 3, "quality": True, "note": "a note on the probe"},
    "heldout_loss": {"title": "held-out loss", "better": "low", "digits": 3, "quality": True, "note": "a note on it"},
    "speed": {"title": "tokens/s", "better": "high", "digits": 0, "quality": False, "note": "a note on speed"},
}


def metric(better, *seeds, error=None):
    return {"mean": sum(seeds) / len(seeds), "seeds": list(seeds), "better": better, "error": error}


def row(name, role, params, probe, speed, loss=()):
    """A row as the evaluation writes it; probe, speed and loss are lists, one value a seed."""
    metrics = {"probe": metric("high", *probe, error=0.01), "speed": metric("high", *speed)}
    if loss:
        metrics["heldout_loss"] = metric("low", *loss, error=0.05)
    return {"name": name, "role": role, "reference": name, "params": params, "metrics": metrics}


RESULTS = {
    "metrics": METRICS,
    "rows": [
        row("teacher", "teacher", 22_700_000, [0.694], [6500]),
        row("student", "student", 17_400_000, [0.71, 0.7, 0.72], [12500] * 3, [7.5, 7.6, 7.7]),
        row("baseline", "baseline", 17_400_000, [0.679], [12500]),
        row("scratch", "scratch", 17_500_000, [0.4, 0.71, 0.3], [12500] * 3, [7.0, 7.1, 7.2]),
    ],
    "machine": {"cores": 2, "cpu": "a processor", "memory": 24_000_000_000, "gpu": None},
    "versions": {"python": "3.11", "torch": "2.13"},
    "command": "distill run halved",
    "seconds": 40.0,
}


def entry(step, **changes):
    return {"step": step, "tokens": step * 2048, "lr": 0.0003 * (1 - step / 100), "grad_norm": 1 + 1 / step,
            "terms": {"relation_kl.qq": 0.4 / step, "relation_kl.vv": 0.6 / step}, "tokens_per_second": 9000.0,
            "seconds": 0.2, "teacher_share": 0.4, "memory": 10**9} | changes  # fmt: skip


def make_run(tmp_path):
    """A run directory of three seeds as the stages leave it."""
    (tmp_path / "recipe.yaml").write_text("# torch 2.13\n" + yaml.safe_dump(RECIPE, sort_keys=False))
    write(tmp_path / "worth" / RESULT, RESULTS)
    write(tmp_path / "corpora" / "text" / "manifest.json", {"digest": "d1d2d3"})
    for stage in ("student", "twin"):
        for seed in range(3):
            directory = tmp_path / f"{stage}@{seed}"
            write(directory / "model" / "config.json", {"architectures": ["BertForMaskedLM"]})
            write(directory / "stage.json", {"metrics": {"steps": 40, "seconds": 61.0, "frozen": ["layer.2.output"]}})
            (directory / "log.jsonl").write_text("".join(json.dumps(entry(s)) + "\n" for s in range(1, 41)))
    return tmp_path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """To be changed; without pictures, which take longest."""
    monkeypatch.setattr(plots, "draw", lambda *_: {})
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """(run directory with its report, what the terminal showed); only to be read."""
    run, terminal = make_run(tmp_path_factory.mktemp("reported")), io.StringIO()
    with contextlib.redirect_stdout(terminal):
        report.rebuild(run)
    return run, terminal.getvalue()


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def changed(**rows):
    """The gathered report with other values of the probe in some rows."""
    results = copy.deepcopy(RESULTS)
    for found in results["rows"]:
        if found["name"] in rows:
            found["metrics"]["probe"] = metric("high", *rows[found["name"]], error=0.01)
    return {
        **results,
        "rows": [{**found, "on": []} for found in results["rows"]],
        "runners": [],
        "overridden": [],
        "comparisons": [],
        "costs": {},
        **{key: RECIPE[key] for key in ("recipe", "about", "equal", "seeds", "models", "corpora")},
    }


def numbers(text):
    return re.findall(r"\d[\d,]*\.?\d*", text)


# The figures


def test_report_json_has_the_documented_form(reported):
    run, _ = reported
    found = json.loads((run / "report.json").read_text())
    assert set(found) == {"recipe", "equal", "rows", "machine", "versions", "command"}
    assert set(found["machine"]) == {"cores", "cpu", "memory", "gpu"}
    for row in found["rows"]:
        assert set(row) == {"name", "role", "params", "metrics"}
        for name, values in row["metrics"].items():
            assert set(values) == {"mean", "seeds", "better"} and name in METRICS
            assert values["mean"] == pytest.approx(sum(values["seeds"]) / len(values["seeds"]))
    assert socket.gethostname() not in (run / "report.json").read_text()


def test_what_is_compared_item_by_item_has_a_sentence_of_its_own():
    report = changed()
    rows = [row["name"] for row in report["rows"] if row["role"] in ("student", "baseline")][:2]
    student, other = sorted(rows, key=lambda name: name != "student")
    told = {"row": student, "against": other, "measure": "probe", "difference": 0.25, "p": 0.001, "low": 0.125,
            "high": 0.375, "items": 70, "of": "pairs"}  # fmt: skip
    plain, paired = (words.sentences(report | {"comparisons": found}) for found in ([], [told]))
    assert f"against {other}: probe" in plain[0] and f"against {other}: probe" not in paired[0]
    assert f"{student} against {other}: probe +0.250 (95% interval +0.125 to +0.375; p 0.001; 70 pairs)." in paired


def test_json_markdown_and_terminal_show_the_same_numbers(reported):
    run, terminal = reported
    found, terminal = json.loads((run / "report.json").read_text()), terminal.splitlines()
    markdown = (run / "report.md").read_text().splitlines()
    for row in found["rows"]:
        shown = numbers(next(line for line in terminal if line.startswith(row["name"])))
        written = numbers(next(line for line in markdown if line.startswith(f"| {row['name']}")))
        assert shown == written
        for name, values in row["metrics"].items():
            assert f"{values['mean']:,.{METRICS[name]['digits']}f}" in shown


def test_a_second_report_is_the_first_one(reported, tmp_path):
    report.rebuild(make_run(tmp_path))
    first, second = ({f.name: f.read_bytes() for f in run.iterdir() if f.is_file()} for run in (reported[0], tmp_path))
    assert first == second


def test_where_nobody_teaches_the_mark_says_no_teacher():
    for role, said in (("teacher", "best below the teacher"), ("student", "best")):
        assert words._marked({"rows": [{"role": "baseline"}, {"role": role}]}) == said


def test_the_best_value_below_the_teacher_is_marked():
    def marked(found):
        _, rows = words.table(found, mark="*")
        return [cells[0] for cells in rows if cells[2].startswith("*")]

    assert marked(changed()) == ["student"]
    assert marked(changed(baseline=[0.9])) == ["baseline"]
    assert marked(changed(teacher=[0.99])) == ["student"]


def test_equal_values_are_not_marked():
    columns, rows = words.table(changed(), mark="*")
    assert not any("*" in cells[columns.index("tokens/s ↑")] for cells in rows)


def test_a_lower_loss_is_the_better_one():
    columns, rows = words.table(changed(), mark="*")
    assert [c[0] for c in rows if c[columns.index("held-out loss ↓")].startswith("*")] == ["scratch"]


def test_what_was_not_measured_is_a_dash():
    columns, rows = words.table(changed(), mark="*")
    assert [cells[columns.index("held-out loss ↓")] for cells in rows][::2] == ["-", "-"]


# The sentence


def test_the_sentence_follows_from_the_figures():
    (sentence,) = words.sentences(changed())
    assert "77% of the teacher's parameters at 1.9 times its speed, keeps 102.3% of its probe" in sentence
    assert "against baseline: probe +0.031 (better in 3 of 3 seeds)" in sentence
    assert "held-out loss +0.500 (better in 0 of 3 seeds)" in sentence


def test_a_student_that_lost_is_said_to_have_lost():
    (sentence,) = words.sentences(changed(student=[0.5, 0.6, 0.7]))
    assert "against baseline: probe -0.079 (better in 1 of 3 seeds)" in sentence


def test_a_difference_within_the_noise_is_called_that():
    (sentence,) = words.sentences(changed(student=[0.68, 0.69, 0.7]))
    assert "probe +0.011 (better in 3 of 3 seeds, within the noise)" in sentence


def test_without_a_student_nothing_is_claimed():
    found = changed()
    assert words.sentences({**found, "rows": found["rows"][:1]}) == []


@pytest.mark.parametrize(
    "better, mine, theirs, won",
    [
        ("high", [1, 2, 3], [2], (1, 3)),
        ("low", [1, 2, 3], [2], (1, 3)),
        ("high", [1, 2, 3], [0, 2, 4], (1, 3)),
        ("high", [5], [4], (1, 1)),
    ],
)
def test_seeds_are_won_pair_by_pair(better, mine, theirs, won):
    assert words.wins(metric(better, *mine), metric(better, *theirs)) == won


# Several stages, missing pieces


def test_rows_of_two_evaluations_stand_together(run):
    recipe = copy.deepcopy(RECIPE)
    recipe["stages"].append({"id": "later", "evaluate": {"rows": {"teacher": "teacher"}, "on": ["probe"]}})
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write(run / "later" / RESULT, {**RESULTS, "rows": [RESULTS["rows"][0], {**RESULTS["rows"][1], "name": "small"}]})
    names = [found["name"] for found in report.rebuild(run)["rows"]]
    assert names == ["worth/teacher", "student", "baseline", "scratch", "later/teacher", "small"]


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        report.rebuild(tmp_path)


def test_a_run_without_evaluation_says_so_and_writes_nothing(run):
    (run / "worth" / RESULT).unlink()
    with pytest.raises(UserError, match="nothing was evaluated yet"):
        report.rebuild(run)
    assert not (run / "report.md").exists()


def test_a_stage_without_log_has_no_picture(run):
    for log in run.glob("twin@*/log.jsonl"):
        log.unlink()
    assert list(figures.training_logs(run, figures.gather(run)["stages"])) == ["student"]


def test_the_unfinished_last_line_of_a_log_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(entry(1)) + "\n" + json.dumps(entry(2))[:20])
    assert figures.read_log(tmp_path / "log.jsonl") == [entry(1)]


# Pictures


def test_pictures_are_png_files_that_the_report_links(reported):
    run, _ = reported
    linked = re.findall(r"!\[.+\]\((.+)\)", (run / "report.md").read_text())
    assert linked == ["quality.png", "training-student.png", "training-twin.png"]
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in linked)


def test_every_term_of_a_loss_has_a_look_of_its_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_line", lambda panel, log, value, *look, **_: drawn.append(look))
    monkeypatch.setattr(plots, "_legend", lambda panel: None)
    log = [entry(step, terms={f"hidden.layer_{n}": 1.0 for n in range(9)}) for step in (1, 2)]
    plots.training(tmp_path / "x.png", "stage", [log])
    assert len({(colour, *dash) for colour, label, *dash in drawn if "hidden" in label}) == 9


@pytest.mark.parametrize(("small", "scale"), [(0.5, "linear"), (0.01, "log"), (0.0, "linear")])
def test_terms_far_apart_are_drawn_on_a_logarithmic_axis(small, scale):
    log = [entry(step, terms={"hidden": small, "attention_mse": 2.0}) for step in (1, 2)]
    assert plots._far_apart(log) == (scale == "log")


# Model cards


def front_matter(path):
    _, matter, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(matter), text


def test_every_exported_model_has_a_card(reported):
    run, _ = reported
    matter, text = front_matter(run / "student@1" / "model" / "README.md")
    assert matter["base_model"] == ["someone/big-one"]
    assert matter["library_name"] == "transformers" and matter["pipeline_tag"] == "fill-mask"
    for told in ("halved-student@1", "layers 0, 1, 5 of `teacher`", "d1d2d3", "`layer.2.output`", "heads: 12",
                 "BertForMaskedLM.from_pretrained", "licence", "0.710"):  # fmt: skip
        assert told in text


def test_a_model_without_a_teacher_names_no_base_model(reported):
    run, _ = reported
    matter, text = front_matter(run / "twin@0" / "model" / "README.md")
    assert "base_model" not in matter
    assert "trained without a teacher" in text and "random weights in the architecture of `student`" in text


@pytest.mark.parametrize("source", ["package:big/model", "./models/one", "/models/one", "plain"])
def test_only_hub_ids_are_base_models(source):
    assert not card.HUB_ID.fullmatch(source)
