"""Growth inside a run: what the commands do, in its place among the stages, planned before anything is done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import tiny
import yaml
from safetensors.torch import load_file

import growth
from distill import corpus, growing, models, preflight, stages
from distill import recipe as recipes
from distill.context import Context
from distill.kinds import GrowthSpec, StudentSpec
from distill.operators import LEARNED, OPERATORS, Given
from growth.errors import UsageError, UserError
from growth.sizes import Sizes

OPS = [{"widen": {"ffn": 57, "how": "fpi"}}, {"stack": {"factor": 2}}]
TRAIN = {
    "data": "text",
    "loss": [{"ce": {"objective": "causal"}}],
    "optim": {"batch": 2},
    "lr": 0.01,
    "stop": {"steps": 1},
}
RECIPE = {
    "recipe": "tall",
    "models": {"small": "small"},
    "corpora": {"text": {"source": "synthetic", "tokenizer": "small", "length": 32, "limit": 300}},
    "stages": [
        {"id": "grown", "grow": {"from": "small", "ops": OPS}},
        {"id": "full", "train": {"student": {"from": "grown"}, **TRAIN}},
        {"id": "again", "grow": {"from": "full", "ops": ["stack"]}},
    ],
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.save(tiny.model("llama", head="causal"), tmp_path / "small", tiny.tokenizer())
    return tmp_path


def load(*overrides: str, changed: dict | None = None) -> recipes.Recipe:
    Path("tall.yaml").write_text(yaml.safe_dump({**RECIPE, **(changed or {})}, sort_keys=False))
    return recipes.load("tall.yaml", overrides)


def train(spec, context, directory) -> dict:
    """Stands for training: the student as it starts."""
    start, model = directory / "start", directory / "model"
    if not model.exists():
        models.seed_checkpoint(spec.student, context.model, start, "causal", context.seed)
        models.export(start, {}, model)
    return {"flops": 7}


def run(*overrides: str, changed: dict | None = None, **options) -> list[str]:
    """What was done, as the directories of stages."""
    done: list[str] = []

    def told(work):
        return lambda spec, context, directory: done.append(directory.name) or work(spec, context, directory)

    def prepare(spec, tokenizer, out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").write_text('{"digest": "of the text"}')

    work = stages.Work(train=told(train), grow=told(growing.grow), prepare=prepare)
    stages.run(load(*overrides, changed=changed), Path("out"), work=work, **options)
    return done


def same(one: Path, other: Path, but: tuple[str, ...] = ()) -> bool:
    """Whether two directories hold the same files, byte for byte."""
    names = {path.name for path in Path(one).iterdir()} - set(but)
    assert names == {path.name for path in Path(other).iterdir()} - set(but)
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def told(path: Path | str) -> dict:
    return json.loads((Path(path) / "growth.json").read_text())


# A stage is the commands


def test_fields_of_an_operator_are_the_keys_of_its_function():
    for name, kind in OPERATORS.items():
        function = getattr(growth, name)
        keys = {key: p.default for key, p in signature(function).parameters.items() if key not in ("src", "dst")}
        fields = {(field.alias or key): field for key, field in kind.model_fields.items()}
        more = {"merge": {"with"}, "widen": {*vars(Sizes())}, "learn": {*LEARNED, "batch"}}.get(name, set())
        assert ({*keys} | more) ^ set(fields) <= {"output", "vectors", "rank", "sources", "sizes", "batches"}, name
        for key in fields.keys() & keys.keys() - {"seed"}:
            same = fields[key].default == keys[key] or (name, key) == ("vocabulary", "how")  # None: mean, of a size
            assert fields[key].is_required() or same, f"{name}.{key}"
        assert all(field.description for field in fields.values()), name


def test_a_stage_of_one_operator_is_the_command_to_the_byte(place):
    only = [{"id": "grown", "grow": {"from": "small", "ops": OPS[:1]}}]
    assert run(changed={"stages": only}) == ["grown"]
    growth.widen("small", "by-hand", ffn=57, how="fpi", seed=0)
    assert same(place / "out" / "grown" / "model", place / "by-hand")


def test_operators_in_a_row_are_the_commands_in_a_row(place):
    run()
    growth.widen("small", "wide", ffn=57, how="fpi", seed=0)
    growth.stack("wide", "by-hand", factor=2)
    made = place / "out" / "grown" / "model"
    assert same(made, place / "by-hand", but=("growth.json",))
    story = told(made)
    assert [step["operator"] for step in story["steps"]] == ["widen", "stack"]
    assert story["sources"] == told("wide")["sources"] and story["preserves"] == "no"
    assert story["new"] == {**told("wide")["new"], **told("by-hand")["new"]} and story["new"]["layers"] == [4, 5, 6, 7]
    assert sorted(path.name for path in (place / "out" / "grown").iterdir()) == ["model", "stage.json"]


def test_what_is_new_is_followed_through_later_operators(place):
    ops = GrowthSpec(
        **{"from": "small", "ops": [{"stack": {}}, {"cut": {"layers": [0, 2, 5, 7]}}, {"insert": {"after": [0]}}]}
    ).operators()
    growing.apply(ops, Path("small"), Path("made"), Given(0, Path))
    assert told("made")["new"] == {"layers": [1, 3, 4]}  # the identity behind 0, then what were layers 5 and 7


def test_every_operator_is_applied_as_it_is_planned(place):
    tiny.save(tiny.model("llama", head="causal", seed=1), place / "other")
    asked = {
        "stack": {"order": [0, 1, 2, 3, 3]},
        "insert": {"layers": 2},
        "widen": {"hidden": 96, "heads": 12, "kv_heads": 6},
        "cut": {"layers": 2, "ffn": 30, "heads": 2, "kv_heads": 1, "vocab": 50},
        "upcycle": {"experts": 3},
        "merge": {"with": ["other"]},
        "vocabulary": {"size": 70},
        "learn": {"factor": 2, "hidden": 60, "ffn": 57, "steps": 2, "batch": 2},
        "sparsify": {"sparsity": 0.5, "how": "magnitude"},
        "densify": {},
    }
    assert asked.keys() == OPERATORS.keys()
    read = load(changed={"models": {"small": "small", "other": "other"}})
    planned = preflight.Planned(read, Context(read, Path("out"), 0))
    corpus.prepare(read.corpora["text"], Path("small"), Path("text"))
    for name, fields in asked.items():
        first = [{"sparsify": {}}] if name == "densify" else []
        spec = GrowthSpec(**{"from": "small", "ops": [*first, {name: fields}]})
        growing.apply(spec.operators(), Path("small"), Path(name), Given(0, Path, lambda: Path("text")))
        plan = planned.grown(spec)
        assert plan.num_parameters() == models.load(Path(name), "causal").num_parameters(), name
        assert plan.growth["preserves"] == told(name)["preserves"] and plan.growth["new"] == told(name)["new"], name
        assert models.facts(plan.config.to_dict()) == models.facts(Path(name)), name


def test_the_inline_form_is_the_stage_and_the_short_form_of_cut(place):
    run()
    inline = StudentSpec.model_validate({"grow": {"from": "small", "ops": OPS}})
    models.seed_checkpoint(inline, Path, Path("inline"), "causal", 0)
    assert same(place / "inline", place / "out" / "full" / "start")
    short = StudentSpec.model_validate({"cut": {"from": "small", "layers": [0, 3]}})
    long = StudentSpec.model_validate({"grow": {"from": "small", "ops": [{"cut": {"layers": [0, 3]}}]}})
    for name, spec in {"short": short, "long": long}.items():
        models.seed_checkpoint(spec, Path, Path(name), None, 0)
    assert same(place / "short", place / "long")


# Among other stages


def test_a_finished_growth_is_kept_and_a_changed_one_is_stale_with_all_that_follows(place, capsys):
    assert run() == ["grown", "full", "again"]
    assert run() == []
    assert run("grown.grow.ops.1.stack.factor=3") == ["grown", "full", "again"]
    assert "grown: runs again (ops.1.stack.factor 2 -> 3)" in capsys.readouterr().err
    same = "grown.grow.ops.1.stack.factor=3"
    assert run(same, "again.grow.ops=[{stack: {factor: 3}}]") == ["again"]
    assert run(same, start_from="again") == ["again"]


def test_a_stage_says_what_it_made_and_what_was_spent_before(place):
    run()
    metrics = [
        json.loads((place / "out" / stage / "stage.json").read_text())["metrics"] for stage in ("grown", "again")
    ]
    sizes = [growth.inspect(place / "out" / stage / "model").parameters for stage in ("grown", "again")]
    assert [m["parameters"] for m in metrics] == sizes and sizes[1] > sizes[0]
    assert [(m["preserves"], m["flops_before"]) for m in metrics] == [("no", 0), ("no", 7)]


def test_a_growth_whose_model_was_removed_is_made_again_and_nothing_else(place):
    run()
    before = (place / "out" / "grown" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(place / "out" / "grown" / "model")
    assert run() == ["grown"]
    assert (place / "out" / "grown" / "model" / "model.safetensors").read_bytes() == before


def test_every_seed_grows_for_itself_unless_the_recipe_says_how(place):
    assert run("seeds=2", "seed=3")[:2] == ["grown@3", "grown@4"]
    growth.widen("small", "wide", ffn=57, how="fpi", seed=4)
    growth.stack("wide", "by-hand")
    made = [load_file(place / "out" / f"grown@{seed}" / "model" / "model.safetensors") for seed in (3, 4)]
    by_hand = load_file("by-hand/model.safetensors")
    assert all(made[1][name].equal(by_hand[name]) for name in by_hand)
    assert not all(made[0][name].equal(by_hand[name]) for name in by_hand)
    run("seeds=2", "grown.grow.ops.0.widen.seed=4", start_from="grown")
    given = [load_file(place / "out" / f"grown@{seed}" / "model" / "model.safetensors") for seed in (0, 1)]
    assert all(one[name].equal(by_hand[name]) for one in given for name in by_hand)


def test_lineage_travels_through_training_but_its_promise_does_not(place):
    ops = [{"insert": {"layers": 2}}]
    run(changed={"stages": [{"id": "grown", "grow": {"from": "small", "ops": ops}}, *RECIPE["stages"][1:]]})
    story = told(place / "out" / "grown" / "model")
    assert story["preserves"] == "exact" and told(place / "out" / "full" / "start") == story
    assert told(place / "out" / "full" / "model") == {**story, "preserves": "no"}
    steps = growth.inspect(place / "out" / "again" / "model").history
    assert [step["operator"] for step in steps] == ["stack", "insert"]


def test_a_kill_in_the_middle_leaves_no_model_and_the_run_goes_on(place):
    only = {"stages": RECIPE["stages"][:1], "corpora": {}}
    load(changed=only)
    command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", "tall.yaml", "--out", "out"]
    broken = os.environ | {"FAULT": "commit.before_rename:kill:2", "OMP_NUM_THREADS": "1"}  # in the second operator
    killed = subprocess.run(command, env=broken, timeout=120)
    left = sorted(path.name for path in (place / "out" / "grown").iterdir())
    assert killed.returncode == -9 and left == ["model.growing", "stage.json"]
    assert run(changed=only) == ["grown"]
    assert sorted(path.name for path in (place / "out" / "grown").iterdir()) == ["model", "stage.json"]


def test_a_disk_that_fills_up_leaves_no_model(place, monkeypatch):
    monkeypatch.setenv("FAULT", "commit.before_rename:enospc")
    monkeypatch.setattr(growth.files, "_passed", {})
    with pytest.raises(UserError, match="disk full"):
        run()
    assert [path.name for path in (place / "out" / "grown").iterdir()] == ["stage.json"]


# What is refused


@pytest.mark.parametrize(
    ("ops", "words"),
    [
        ("[{widn: {ffn: 57}}]", "grown.grow.ops.0: no key 'widn'; did you mean 'widen'?"),
        (
            "[upcicle]",
            "grown.grow.ops.0: 'upcicle' is not one of stack, upcycle, sparsify, densify; did you mean 'upcycle'?",
        ),
        ("[widen]", "'widen' is not one of stack, upcycle, sparsify, densify"),
        ("[{widen: {fnn: 57}}]", "grown.grow.ops.0.widen: no key 'fnn'; did you mean 'ffn'?"),
        ("[{widen: {how: exact}}]", "at least one of hidden, heads, kv_heads, head_size, ffn, vocab, vocab_multiple"),
        ("[{insert: {layers: 1, after: [0]}}]", "exactly one of layers, after is needed, found layers and after"),
        ("[{stack: {how: zeroo}}]", "'zeroo' is not one of copy, zero, random; did you mean 'zero'?"),
        ("[{stack: {factor: 2}, cut: {layers: 2}}]", "exactly one of stack, insert"),
        ("[]", "ops: at least 1 needed"),
        ("[{merge: {with: [full]}}]", "stage 'full' is not finished before this one"),
    ],
)
def test_a_mistake_in_an_operator_is_named_with_what_would_work(place, ops, words):
    with pytest.raises(UsageError) as refused:
        load(f"grown.grow.ops={ops}")
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("full.train.student.from=grown.start", "stage 'grown' does not train, so it has no start"),
        ("again.grow.from=again", "stage 'again' is not finished before this one"),
        ("again.grow.from=grwn", "no model or earlier stage 'grwn'; did you mean 'grown'?"),
        ("again.grow.ops=[{learn: {factor: 2}}]", "stages.again.grow: 'data' is needed: learn reads text"),
        ("again.grow.data=text", "data: none of these operators reads text"),
    ],
)
def test_a_wrong_reference_is_named(place, override, words):
    with pytest.raises(UsageError) as refused:
        load(override)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grown.grow.ops=[{widen: {heads: 8}}]", "stages.grown.grow: widen: 8 heads cannot share 3 key-value heads"),
        ("grown.grow.ops=[{widen: {hidden: 40}}]", "widen: hidden 40 is less than the source's 48"),
        ("grown.grow.ops=[stack, {stack: {order: 0-8}}]", "layer 8 is not there: the model has layers 0 to 7"),
        ("again.grow.ops=[{cut: {layers: 9}}]", "stages.again.grow: cut: 9 layers cannot be kept: the model has 8"),
        ("full.train.student={grow: {from: grown, ops: [{cut: {layers: 9}}]}}", "stages.full.train.student: cut: 9"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_done(place, override, words):
    with pytest.raises(UserError) as refused:
        run(override)
    assert words in str(refused.value) and "\n" not in str(refused.value) and not (place / "out").exists()


@pytest.mark.parametrize(
    ("hooks", "ops", "words"),
    [
        ("[{mask: {}}]", "[densify, {widen: {ffn: 57}}]", None),
        ("[{mask: {}}]", "[{widen: {ffn: 57}}]", "stages.again.grow: widen: the model in memory is sparse"),
        ("[{mask: {}}]", "[sparsify]", "stages.again.grow: sparsify: the model in memory has masks already"),
        ("[]", "[densify]", "nothing keeps its masks while it trains"),
    ],
)
def test_masks_of_stages_that_are_yet_to_be_trained_are_known(place, hooks, ops, words):
    read = load("grown.grow.ops=[stack, sparsify]", f"full.train.hooks={hooks}", f"again.grow.ops={ops}")
    context = Context(read, Path("out"), 0)
    if words is None:
        preflight.check(read, context)
        return
    with pytest.raises(UserError) as refused:
        preflight.check(read, context)
    assert words in str(refused.value)


def test_the_nearest_width_that_works_is_named_for_a_student_that_is_yet_to_be_trained(place):
    config = {"model_type": "bert", **tiny.ENCODER, "num_hidden_layers": 2}
    chain = [
        {"id": "little", "train": {**TRAIN, "student": {"new": {"config": config}}, "loss": [{"ce": {}}]}},
        {"id": "grown", "grow": {"from": "little", "ops": [{"widen": {"hidden": 64, "ffn": 57}}]}},
        {"id": "full", "train": {**TRAIN, "student": {"from": "grown"}, "loss": [{"ce": {}}]}},
    ]
    with pytest.raises(UserError) as refused:
        run(changed={"stages": chain})
    assert "only multiples of 48 keep the function: 48 or 96" in str(refused.value) and not (place / "out").exists()
    chain[1]["grow"]["ops"] = [{"widen": {"hidden": 96, "ffn": 57}}]
    read = load(changed={"stages": chain})
    planned = preflight.Planned(read, Context(read, Path("out"), 0))
    preflight.check(read, planned.context)
    facts = planned.student_facts("full")
    assert (facts.layers, facts.widths["hidden"], facts.heads) == (2, 96, 12)
    assert planned.config("full")["architectures"] == ["BertForMaskedLM"]


def test_a_dry_run_shows_what_grows_and_what_its_training_costs(place, capsys):
    from distill.forecast import show

    show(load(), Path("out"), 1)
    said = capsys.readouterr().out
    assert "what grows" in said and "llama 8 x 48" in said and "widen, stack" in said and "llama 16 x 48" in said
    assert not (place / "out").exists()
