"""The command as people meet it: what it says, how it exits, how long it takes to say it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from tiny import model, save, tokenizer

from distill import launch, world
from distill.cli import main
from growth.errors import UserError

BROKEN = """\
recipe: broken
sede: 3
engine: {zero: 7}
stages:
- id: a
  train: {data: text, lr: 5e-4}
"""


def distill(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "distill.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def processor_seconds(*arguments, **options):
    """What it costs, at best of three: the wall time on a machine with nothing else to do."""
    costs = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        distill(*arguments, **options)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(costs)


def imported(code):
    """Modules of a fresh interpreter after `code`."""
    program = f"import sys; {code}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(found.stdout.split())


def test_help_answers_in_under_four_tenths_of_a_second():
    assert processor_seconds("--help") < 0.4


def test_a_broken_recipe_is_refused_within_a_second_with_every_mistake(tmp_path):
    (tmp_path / "broken.yaml").write_text(BROKEN)
    assert processor_seconds("run", "broken.yaml", cwd=tmp_path) < 1.0
    done = distill("run", "broken.yaml", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert [line.removeprefix("error: ").split(" (line")[0] for line in done.stderr.splitlines()] == [
        "broken.yaml: no key 'sede'; did you mean 'seed'?",
        "broken.yaml: engine.zero: 7 is not one of 0, 1, 2, 3",
        "broken.yaml: stages.a.train.lr: 5e-4 is text to some YAML readers; write 0.0005, or quote it if text is meant",
        "broken.yaml: stages.a.train: 'student' is needed",
        "broken.yaml: stages.a.train: 'loss' is needed",
        "broken.yaml: stages.a.train: 'optim' is needed",
        "broken.yaml: stages.a.train: 'stop' is needed",
        "broken.yaml: stages.a.train.data: no corpus or collection 'text'; known: none",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


def test_neither_help_nor_recipes_import_torch():
    heavy = {"torch", "transformers", "deepspeed", "datasets", "matplotlib"}
    assert not heavy & imported("import distill.cli")
    assert not heavy & imported(
        "import distill.stages, distill.listing; from distill import recipe; recipe.load('minilm')"
    )
    assert "pydantic" not in imported("import distill.cli")


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_itself_with_an_example(name):
    done = distill(name, "--help")
    assert done.returncode == 0 and f"distill {name}" in done.stdout
    assert all(option.help for option in main.commands[name].params if isinstance(option, click.Option))


def test_the_public_options_are_these():
    options = {name: sorted(o for p in command.params for o in p.opts) for name, command in main.commands.items()}
    check = ["--out", "--ranks", "overrides", "recipe"]
    run = ["--accept-changes", "--dry-run", "--fresh", "--from", "--out", "--ranks", "--rate", "overrides", "recipe"]
    assert options == {"run": run, "check": check, "list": [], "schema": [], "report": ["directory"]}


def test_list_names_recipes_objectives_metrics_and_sources():
    said = distill("list").stdout
    assert all(
        f"\n{word} " in said for word in ("minilm", "minilm_v1", "relation_kl", "ce", "probe", "speed", "stdlib")
    )


def test_schema_is_json():
    assert json.loads(distill("schema").stdout)["properties"]["stages"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "nope"], 2, "error: nope: no such file; packaged recipes are bert2bert, "),
        (["run", "minilm", "engine.zeroo=1"], 2, "command line: engine: no key 'zeroo'; did you mean 'zero'?"),
        (["run", "minilm", "seed"], 2, "error: seed: expected key.sub=value"),
        (["run", "minilm", "--from", "studnt"], 2, "--from studnt: no such stage; did you mean 'student'?"),
        (["run", "minilm", "--out", "full"], 2, "holds something that is not a run (first: thesis.tex)"),
        (["run", "minilm", "--out", "full/thesis.tex"], 2, "is a file; give a directory"),
        (["run", "minilm", "--out", "full/thesis.tex/x"], 1, "Not a directory"),
        (["run", "minilm", "--ranks", "0"], 2, "--ranks"),
        (["run", "minilm", "--rate", "4e14"], 2, "--rate is for --dry-run"),
        (["run", "minilm", "models.teacher.from=./none", "--out", "o"], 1, "model teacher: none of ./none is at hand"),
        (["report", "full"], 1, "is not a run directory"),
        (["runn"], 2, "No such command 'runn'"),
    ],
)
def test_a_mistake_of_the_user_is_a_line_and_an_exit_code(tmp_path, arguments, code, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    done = distill(*arguments, cwd=tmp_path)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["full", "full/thesis.tex"]


# What needs torch

TINY = """\
recipe: tiny
models: {teacher: teacher}
corpora: {text: {source: words.txt, tokenizer: teacher, length: 32}}
stages:
- id: student
  train:
    student: {cut: {from: teacher, layers: [1]}}
    data: text
    targets: {t: {from: teacher}}
    loss: [{relation_kl: {target: t, heads: 3}}]
    optim: {batch: 8}
    lr: 0.001
    stop: {steps: 10}
- id: deeper
  train:
    student: {new: {like: student}}
    data: text
    loss: [{ce: {}}]
    optim: {batch: 8}
    lr: 0.001
    stop: {epochs: 2}
"""
BERT = {
    "vocab_size": 101,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 52,
    "max_position_embeddings": 40,
}


@pytest.fixture
def tiny(tmp_path):
    save(model("bert", head="mlm", **BERT), tmp_path / "teacher", tokenizer(BERT["vocab_size"]))
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "words.txt").write_text("a few words " * 200)
    return tmp_path


def test_a_dry_run_tells_the_cost_and_writes_nothing(tiny):
    before = sorted(tiny.rglob("*"))
    done = distill("run", "tiny.yaml", "--dry-run", "--ranks", "2", cwd=tiny)
    assert done.returncode == 0, done.stderr
    assert sorted(tiny.rglob("*")) == before
    costs = [line.split() for line in done.stdout.splitlines() if line.startswith("student  bert")]
    assert [cost[1:4] for cost in costs] == [["bert", "1", "x"]]
    assert "forecast" in done.stdout and "6 N T + 12 A T T" in done.stdout and "2 N T + 4 A T T" in done.stdout


def test_a_dry_run_needs_no_more_than_a_config_and_a_run_says_what_is_missing(tiny):
    whole = distill("run", "tiny.yaml", "--dry-run", "--rate", "2e14", cwd=tiny).stdout
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tiny / "teacher" / file).unlink()
    assert [path.name for path in (tiny / "teacher").iterdir()] == ["config.json"]
    assert distill("run", "tiny.yaml", "--dry-run", "--rate", "2e14", cwd=tiny).stdout == whole
    done = distill("run", "tiny.yaml", "--out", "out", cwd=tiny)
    assert done.returncode == 1 and "model teacher: teacher has no *.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("name", "trainable"), [("minilm", "22.7"), ("minilm_v1", "22.7"), ("minilmv2_roberta_large", "40.9")]
)
def test_published_minilm_is_forecast_for_eight_gpus_from_configs_alone(name, trainable, tmp_path, monkeypatch, capsys):
    from transformers import BertConfig, RobertaConfig

    from distill import forecast
    from distill.recipe import load

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    teacher = RobertaConfig(vocab_size=50265, max_position_embeddings=514, **large) if "large" in name else BertConfig()
    teacher.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    published = load(Path(__file__).parent.parent / f"recipes/paper/{name}.yaml", ["models.teacher={from: ./teacher}"])
    monkeypatch.chdir(tmp_path)
    forecast.show(published, tmp_path / "out", ranks=8, rate=4e14)
    (student,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("student ")][:1]
    assert student[5:8] == [trainable, "M", "400000"]


def test_the_time_of_a_forecast_follows_the_rate_and_the_ranks(tiny):
    def times(*options):
        lines = distill("run", "tiny.yaml", "--dry-run", *options, "student.train.stop.steps=8000", cwd=tiny).stdout
        return next(line for line in lines.splitlines() if line.startswith("student ")).split()[-2:]

    assert times("--rate", "1e9") == times("--rate", "5e8", "--ranks", "2") != times("--rate", "5e8")


def test_a_check_tries_what_can_begin_on_a_real_batch_and_keeps_nothing(tiny):
    before = sorted(tiny.rglob("*"))
    done = distill("check", "tiny.yaml", "corpora.text.heldout=0", "engine.zero=3", cwd=tiny)
    assert done.returncode == 0, done.stderr
    assert sorted(tiny.rglob("*")) == before
    told = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines() if "  " in line)
    assert told["batch"].startswith("8 rows") and told["target t"] == "in eval mode, frozen"
    assert all(float(told[what].split()[-1]) < 1e-5 for what in ("cut in halves", "documents apart"))
    learns, of = re.match(r"([\d.]+) k of ([\d.]+) k ", told["learns"]).groups()
    assert 0 < float(learns) < float(of)
    assert "no loss reaches encoder.layer.0" in told["learns"] and told["to expect"].endswith(" for 10 steps")
    assert "deeper: needs student" in done.stderr


def test_a_check_finds_terms_that_differ_and_teachers_that_drop_out():
    from distill.trial import Trial

    engine = SimpleNamespace(precision="fp32")
    trial = SimpleNamespace(context=SimpleNamespace(recipe=SimpleNamespace(engine=engine)), targets=SimpleNamespace())
    assert Trial._compared(trial, "cut", {"a": 1.0}, {"a": 1.00001}).good
    assert not Trial._compared(trial, "cut", {"a": 1.0}, {"a": 1.01}).good
    teacher = model("bert", head="mlm", **BERT)
    trial.targets.sources = {"t": SimpleNamespace(models=(teacher,))}
    assert [found.good for found in Trial._teachers(trial)] == [False]
    teacher.eval().requires_grad_(False)
    assert [found.good for found in Trial._teachers(trial)] == [True]


def test_flops_are_those_of_matrices_and_attention_and_sharding_divides_what_its_stage_says(tiny, monkeypatch):
    from distill import forecast
    from distill.context import Context
    from distill.preflight import Planned
    from distill.recipe import load

    monkeypatch.chdir(tiny)

    def cost(ranks, *overrides):
        recipe = load("tiny.yaml", overrides)
        return forecast.forecast(recipe.stages[0], Planned(recipe, Context(recipe, tiny / "runs", 0)), ranks)

    # BERT by hand; relations need no head, so none runs
    matrices, rows = 4 * 24 * 24 + 2 * 24 * 52, 10 * 8
    forward = 2 * 32 * matrices + 4 * 32**2 * 24  # of a layer and a row: matrices, and attention between all pairs
    assert (cost(1).flops, cost(1).teacher_flops) == (rows * 3 * forward, rows * 2 * forward)
    embeddings, biases, head = (101 + 40 + 2) * 24 + 48, 4 * 24 + 52 + 24 + 96, 24 * 24 + 24 + 48 + 101
    n = embeddings + matrices + biases + head
    whole, sharded = cost(1).memory, [cost(2, f"engine.zero={stage}").memory for stage in (1, 2, 3)]
    assert (whole["optimizer"], whole["gradients"], whole["weights"]) == (8 * n, 4 * n, 4 * n)
    assert [m["optimizer"] for m in sharded] == [12 * n / 2] * 3
    assert [m["gradients"] for m in sharded] == [4 * n, 2 * n, 2 * n]
    assert [m["weights"] for m in sharded] == [4 * n, 4 * n, 2 * n]
    assert all(m["activations"] == whole["activations"] / 2 for m in sharded)
    again = cost(1, "engine.checkpointing=true")  # of one layer: what goes into it, and once its inside, in 4 bytes
    assert again.memory["activations"] == 8 * 32 * 24 * (2 + 34) * 2
    assert (cost(1).again, again.again) == (0, again.flops / 3)


def test_epochs_are_exact_once_the_corpus_is_prepared(tiny, monkeypatch):
    from distill import forecast
    from distill.context import Context
    from distill.preflight import Planned
    from distill.recipe import load

    monkeypatch.chdir(tiny)
    recipe = load("tiny.yaml")
    planned = Planned(recipe, Context(recipe, tiny / "runs", 0))
    assert not forecast.forecast(recipe.stages[1], planned, 1).exact
    (tiny / "runs" / "corpora" / "text").mkdir(parents=True)
    (tiny / "runs" / "corpora" / "text" / "manifest.json").write_text('{"rows": {"train": 21}}')
    known = forecast.forecast(recipe.stages[1], planned, 1)
    assert known.exact and known.steps == 6  # two epochs of 21 rows, 8 a step


def test_a_relation_head_count_that_does_not_divide_is_refused_before_any_data_is_read(tiny):
    (tiny / "words.txt").unlink()
    done = distill("run", "tiny.yaml", "student.train.loss.0.relation_kl.heads=7", cwd=tiny)
    assert done.returncode == 2 and "heads=7 does not divide the student's width 24" in done.stderr
    assert not (tiny / "runs").exists()


# Many ranks: the launcher alone, with a small program in place of the training

CHILD = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == "2" and os.environ["LOCAL_RANK"] == str(rank) and os.environ["DISTILL_STORE"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
{body}
"""

PARENT = """
import subprocess, sys
from distill import launch
launch.command = lambda arguments: [sys.executable, "-c", {child!r}]
print(launch.launch(2, []))
"""


def launched(body, **environment):
    program = PARENT.format(child=CHILD.format(body=body))
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ranks_get_their_places_and_threads():
    job = launched("print('threads', os.environ['OMP_NUM_THREADS'], file=sys.stderr)", OMP_NUM_THREADS="5")
    said, errors = job.communicate(timeout=90)
    assert said == "0\n" and sorted(errors.splitlines()) == ["rank 1: threads 5", "threads 5"]


def test_when_one_rank_fails_the_others_end_and_its_message_comes_first():
    began = time.monotonic()
    body = "print('error: stopped: another rank failed, its message', file=sys.stderr) if rank == 0 else None\n"
    body += "time.sleep(60) if rank == 0 else sys.exit('error: disk full')"
    said, errors = launched(body).communicate(timeout=90)
    assert said == "1\n" and errors == "rank 1: error: disk full\n"
    assert time.monotonic() - began < 10


def test_who_did_not_fail_speaks_after_the_one_that_did(monkeypatch):
    """Under launchers that pass everything on as it comes."""
    slept = []
    monkeypatch.setattr(world, "agree", lambda *values: [1.0])
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(KeyError):
        world.raise_together(KeyError())
    assert not slept
    with pytest.raises(UserError, match=launch.ECHO.removeprefix("error: ")):
        world.raise_together(None)
    assert slept == [world.SPEAKS]


def test_a_rank_that_was_killed_is_named():
    said, errors = launched("time.sleep(60) if rank == 0 else os.kill(os.getpid(), 9)").communicate(timeout=90)
    assert said == "137\n" and "rank 1 was ended by SIGKILL" in errors


def test_a_signal_reaches_every_rank():
    job = launched("print('up', file=sys.stderr, flush=True); time.sleep(60)")
    assert {job.stderr.readline(), job.stderr.readline()} == {"up\n", "rank 1: up\n"}
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=90)[0] == "143\n"


def test_ranks_that_a_launcher_started_are_counted_not_started(tmp_path):
    done = distill("run", "minilm", "--ranks", "3", cwd=tmp_path, RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2 and "the launcher started 2 ranks" in done.stderr
