"""The order of a run, with training and evaluation replaced by functions that write a file: no torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distill import recipe as recipes
from distill import stages
from growth.errors import UsageError, UserError
from growth.files import locked

RECIPE = """
recipe: halved
models: {teacher: %s/teacher}
corpora: {text: {source: stdlib, tokenizer: teacher}}
stages:
- id: student
  train: &train
    student: {from: teacher}
    data: text
    loss: [{ce: {objective: mlm}}]
    optim: {batch: 4}
    lr: 0.1
    stop: {steps: 3}
- id: second
  train: {<<: *train, student: {from: student}}
- id: twin
  train: {<<: *train, student: {new: {like: teacher}}}
- id: report
  evaluate: {rows: {teacher: teacher, a: student.start, b: second}, on: [probe]}
"""


@dataclass
class Log:
    """Stands for the real work and remembers what was called."""

    ran: list[str] = field(default_factory=list)
    break_in: str = ""
    saves: bool = True

    def train(self, spec, context, directory):
        self.ran.append(directory.name)
        for part in ("start", "model"):
            (directory / part).mkdir(exist_ok=True)
        (directory / "kept").touch()
        if self.saves:
            (directory / "snapshots" / "step-1").mkdir(parents=True, exist_ok=True)
        if directory.name == self.break_in:
            raise KeyboardInterrupt
        context.model(spec.student.from_ or spec.student.new.like)
        return {"seed": context.seed}

    def evaluate(self, spec, contexts, directory):
        self.ran.append(directory.name)
        return [str(context.model(ref)) for ref in spec.rows.values() for context in contexts]

    def foresee(self, spec, context):
        if spec.on == ("kl",):
            raise UserError("no head")

    def prepare(self, spec, tokenizer, out):
        assert (tokenizer / "config.json").exists()
        out.mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").write_text('{"digest": "of the text"}')

    def work(self):
        return stages.Work(
            train=self.train,
            evaluate=self.evaluate,
            report=lambda out: self.ran.append("table"),
            prepare=self.prepare,
            resolve=lambda spec, name: Path(spec.from_[0]),
            check=lambda recipe, context: None,
            foresee=self.foresee,
        )


@dataclass
class Runs:
    root: Path

    @property
    def out(self):
        return self.root / "runs" / "halved"

    def recipe(self, *overrides, text=RECIPE):
        (self.root / "recipe.yaml").write_text(text % self.root)
        return recipes.load(self.root / "recipe.yaml", overrides)

    def __call__(self, *overrides, break_in="", saves=True, out=None, **options):
        log = Log(break_in=break_in, saves=saves)
        try:
            stages.run(self.recipe(*overrides), out or self.out, work=log.work(), **options)
        except KeyboardInterrupt:
            log.ran.append("interrupted")
        return log.ran

    def manifest(self, stage):
        return json.loads((self.out / stage / "stage.json").read_text())


@pytest.fixture
def runs(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    (teacher / "model.safetensors").write_bytes(b"weights")
    return Runs(tmp_path)


ALL = ["student", "second", "twin", "report", "table"]


def test_stages_run_in_order_and_say_what_they_were_made_from(runs):
    assert runs() == ALL
    manifest = runs.manifest("second")
    assert manifest["state"] == "done" and manifest["metrics"] == {"seed": 0} and manifest["seconds"] >= 0
    assert manifest["inputs"]["stop.steps"] == 3
    assert manifest["inputs"]["stages.student"] == runs.manifest("student")["inputs_digest"]
    assert "torch" in manifest["versions"]


def test_the_resolved_recipe_in_the_run_directory_loads_to_an_equal_one(runs):
    runs("student.train.lr={unit: fraction, points: [[0, 0.00005], [1, 0]]}")
    again = recipes.load(runs.out / "recipe.yaml")
    assert again == runs.recipe("student.train.lr={unit: fraction, points: [[0, 0.00005], [1, 0]]}")


def test_what_is_finished_and_unchanged_is_not_run_again(runs, capsys):
    runs()
    assert runs() == ["table"]
    assert "student: finished before and unchanged" in capsys.readouterr().err


@pytest.mark.parametrize("same", ["engine.zero=2", "student.train.save_every=2", "about=other words"])
def test_what_changes_nothing_in_the_result_makes_nothing_stale(runs, same):
    runs()
    assert runs(same) == ["table"]


def test_a_changed_stage_is_stale_with_all_that_follows_it_and_says_which_key(runs, capsys):
    runs()
    assert runs("second.train.stop.steps=5") == ["second", "twin", "report", "table"]
    said = capsys.readouterr().err
    assert "second: runs again (stop.steps 3 -> 5)" in said and "twin: runs again (follows second)" in said


@pytest.mark.parametrize("name", ["model.safetensors", "masks.safetensors", "config.json"])
def test_other_contents_of_a_model_make_its_stages_stale(runs, name):
    runs()
    (runs.root / "teacher" / name).write_bytes(b"{ }")
    assert runs() == ALL


def test_another_seed_makes_training_stale(runs):
    runs()
    assert runs("seed=1") == ALL


def test_an_interrupted_stage_goes_on_with_what_it_left(runs, capsys):
    assert runs(break_in="second") == ["student", "second", "interrupted"]
    assert runs.manifest("second")["state"] == "running" and (runs.out / "second" / "kept").exists()
    assert runs() == ["second", "twin", "report", "table"]
    assert "second: goes on" in capsys.readouterr().err


def test_an_interrupted_stage_does_not_go_on_with_another_recipe(runs):
    runs(break_in="second")
    with pytest.raises(UserError) as refused:
        runs("second.train.lr=0.2", "second.train.stop.steps=4")
    assert str(refused.value).splitlines() == [
        "second was interrupted and has changed since:",
        "  lr 0.1 -> 0.2",
        "  stop.steps 3 -> 4",
        "undo that, or go on all the same, which will be recorded, with --accept-changes, or begin it again with "
        "--from second",
    ]
    assert (runs.out / "second" / "kept").exists()
    assert runs("second.train.lr=0.2", start_from="second") == ["second", "twin", "report", "table"]


def test_a_change_that_is_accepted_lets_an_interrupted_stage_go_on_and_no_other(runs, capsys):
    runs(break_in="second")
    change = "second.train.lr=0.2"
    assert runs(change, "twin.train.lr=0.3", accept_changes=True) == ["second", "twin", "report", "table"]
    assert (runs.out / "second" / "kept").exists()
    said = capsys.readouterr().err
    assert "second: goes on where it was interrupted, changed since: lr 0.1 -> 0.2" in said
    assert runs.manifest("second")["inputs"]["lr"] == 0.2 and runs(change, "twin.train.lr=0.3") == ["table"]
    assert runs(accept_changes=True) == ["second", "twin", "report", "table"]  # finished: done again, not gone on with
    assert not (runs.out / "second" / "snapshots" / "old").exists()


def test_what_a_stage_started_as_cannot_be_changed_under_way(runs):
    runs(break_in="twin")
    with pytest.raises(UserError, match=r"(?s)student.new.like teacher -> nothing.*decides what it started as. undo"):
        runs("twin.train.student={from: teacher}", accept_changes=True)


def test_an_interrupted_stage_that_saved_nothing_yet_begins_again_with_the_new_recipe(runs, capsys):
    runs(break_in="second", saves=False)
    assert runs("second.train.lr=0.2") == ["second", "twin", "report", "table"]
    assert "second: runs again (lr 0.1 -> 0.2)" in capsys.readouterr().err


def test_a_redo_that_is_interrupted_leaves_what_follows_stale(runs):
    runs()
    assert runs(start_from="student", break_in="student") == ["student", "interrupted"]
    assert runs() == ALL


def test_a_stale_stage_behind_an_interrupted_one_is_simply_redone(runs):
    runs(break_in="twin")
    assert runs("student.train.lr=0.2") == ALL


def test_from_a_stage_redoes_it_and_what_follows(runs):
    runs()
    assert runs(start_from="twin") == ["twin", "report", "table"]
    with pytest.raises(UsageError, match="did you mean 'twin'"):
        runs(start_from="twim")


def test_fresh_redoes_everything_and_removes_only_stage_directories(runs):
    runs()
    (runs.out / "notes.txt").touch()
    (runs.out / "other").mkdir()
    assert runs(fresh=True) == ALL
    assert (runs.out / "notes.txt").exists() and (runs.out / "other").exists()


def test_seeds_fan_training_out_and_evaluation_sees_them_all(runs):
    ran = runs("seeds=2", "seed=5")
    assert ran == ["student@5", "student@6", "second@5", "second@6", "twin@5", "twin@6", "report", "table"]
    assert runs.manifest("second@6")["inputs"]["stages.student@6"]
    rows = [Path(row).relative_to(runs.root) for row in runs.manifest("report")["metrics"]]
    assert [str(row) for row in rows[2:]] == [
        f"runs/halved/{part}" for part in ("student@5/start", "student@6/start", "second@5/model", "second@6/model")
    ]
    assert runs("seeds=3", "seed=5") == ["student@7", "second@7", "twin@7", "report", "table"]


# What is refused


@pytest.mark.parametrize("place", ["teacher", "teacher/runs", "."])
def test_an_output_directory_that_is_or_holds_an_input_is_refused(runs, place):
    with pytest.raises(UsageError, match="model teacher"):
        runs(out=runs.root / place)
    assert sorted(path.name for path in (runs.root / "teacher").iterdir()) == ["config.json", "model.safetensors"]


def test_an_output_directory_with_something_else_in_it_is_refused(runs):
    runs.out.mkdir(parents=True)
    (runs.out / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"not a run \(first: thesis.tex\)"):
        runs()
    assert [path.name for path in runs.out.iterdir()] == ["thesis.tex"]


def test_the_run_of_another_recipe_is_refused(runs):
    runs("recipe=other")
    with pytest.raises(UsageError, match="'other'"):
        runs()


def test_a_file_as_output_is_refused(runs):
    (runs.root / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        runs(out=runs.root / "file")


def test_two_runs_on_one_directory_are_refused(runs):
    runs()
    with locked(runs.out), pytest.raises(UserError, match="in use by process"):
        runs()


def test_a_check_that_fails_leaves_nothing_behind(runs):
    def refuse(recipe, context):
        raise UsageError("heads")

    work = stages.Work(**{**vars(Log().work()), "check": refuse})
    with pytest.raises(UsageError, match="heads"):
        stages.run(runs.recipe(), runs.out, work=work)
    assert not runs.out.parent.exists()


def test_a_stage_directory_that_no_run_made_is_left_alone(runs):
    runs(break_in="student")
    (runs.out / "twin").mkdir()
    (runs.out / "twin" / "diary").touch()
    with pytest.raises(UserError, match="move it away"):
        runs()
    assert (runs.out / "twin" / "diary").exists()


def test_a_broken_manifest_is_named(runs):
    runs()
    (runs.out / "student" / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"student.stage\.json"):
        runs()


def test_an_evaluation_that_cannot_be_made_is_refused_before_anything_is_trained(runs):
    with pytest.raises(UserError, match="no head"):
        runs("stages.report.evaluate.on=[kl]")
    assert not (runs.out / "student").exists()
    assert runs() == ALL


def test_a_finished_stage_whose_model_was_removed_makes_it_again_and_nothing_else(runs, capsys):
    runs()
    shutil.rmtree(runs.out / "student" / "model")
    assert runs() == ["student", "table"]
    assert (runs.out / "student" / "kept").exists() and "its model is gone" in capsys.readouterr().err
    assert runs.manifest("student")["state"] == "done"
