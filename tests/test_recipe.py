"""Recipes: what is read, what is refused and in which words, what is written again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill import recipe as recipes
from distill import strict_yaml
from distill.schedules import Schedule
from growth.errors import UsageError

GOOD = """\
recipe: halved
models: {teacher: some/model}
corpora:
  text: {source: stdlib, tokenizer: teacher}
stages:
- id: student
  train:
    student: {cut: {from: teacher, layers: [0, 1]}}
    data: text
    targets: {t: {from: teacher}}
    loss: [{relation_kl: {target: t, heads: 12}}]
    optim: &adam {batch: 16}
    lr: 0.001
    stop: {steps: 10}
- id: twin
  train: {student: {new: {like: student}}, data: text, loss: [{ce: {}}], optim: *adam, lr: 0.001, stop: {epochs: 1}}
- id: report
  evaluate: {rows: {a: student, b: student.start}, on: [probe, speed]}
"""


@pytest.fixture
def load(tmp_path):
    def read(text, *overrides):
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return recipes.load(path, overrides)

    return read


@pytest.fixture
def said(load, tmp_path):
    """What the user is told, without the path of the file."""

    def tell(text, *overrides):
        with pytest.raises(UsageError) as refused:
            load(text, *overrides)
        assert refused.value.exit_code == 2
        return str(refused.value).replace(f"{tmp_path}/", "")

    return tell


@pytest.mark.parametrize("name", recipes.packaged())
def test_every_packaged_recipe_is_valid_and_survives_being_written(name, load):
    recipe = recipes.load(name)
    assert recipe.recipe == name and recipe.about
    assert load(recipes.dump(recipe)) == recipe


@pytest.mark.parametrize("path", sorted((Path(recipes.__file__).parent.parent / "recipes" / "paper").glob("*.yaml")))
def test_every_paper_twin_is_valid_and_has_a_runnable_twin(path):
    runnable = {"minilmv2_roberta_large": "minilm"}.get(path.stem, path.stem)
    assert recipes.load(path).recipe == f"{path.stem}_paper" and runnable in recipes.packaged()


def test_a_resolved_recipe_has_every_default_and_no_number_that_yaml_misreads(load):
    recipe = load(GOOD, "engine.deepspeed={bf16: {x: 0.00000001}, note: '5e-4'}")
    text = recipes.dump(recipe)
    assert "weight_decay: 0.01" in text and "precision: fp32" in text and "eps: 0.00000001" in text
    assert load(text) == recipe


def test_the_designs_words_mean_what_they_say(load):
    recipe = load(GOOD)
    student, twin, report = recipe.stages
    assert recipe.models["teacher"].from_ == ("some/model",)
    assert student.train.student.cut.layers == (0, 1) and student.train.student.new is None
    ((name, loss),) = student.train.objectives()
    assert name == "relation_kl" and loss.target == "t" and loss.weight == Schedule.constant(1)
    assert student.kind == "train" and report.kind == "evaluate" and recipe.stage("twin") is twin
    assert twin.train.optim == student.train.optim
    assert report.evaluate.on == ("probe", "speed") and report.evaluate.data == "text"


def test_two_places_that_share_an_anchor_do_not_share_an_override(load):
    recipe = load(GOOD, "student.train.optim.batch=8")
    assert [stage.train.optim.batch for stage in recipe.stages[:2]] == [8, 16]


def test_merge_keys_fill_in_what_is_not_given():
    document = strict_yaml.parse(b"a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, {y: 9, z: 4}]}")
    assert document.value["b"] == {"x": 1, "y": 3} and document.value["c"] == {"x": 1, "y": 2, "z": 4}


# What is refused: (found, replaced by, said)

CHANGES = [
    ("recipe: halved", "recipe: halved\nsede: 1", "no key 'sede'; did you mean 'seed'? (line 2)"),
    ("recipe: halved", "recipe: [a]", "recipe: expected text, found a list (line 1)"),
    ("recipe: halved", "recipe: a/b", "letters, digits"),
    ("recipe: halved", "recipe: halved\nseed: 1\nseed: 2", "seed: key 'seed' stands twice (line 3)"),
    ("recipe: halved", "recipe: halved\nseed: 5e-4", "seed: 5e-4 is text to some YAML readers; write 0.0005"),
    ("recipe: halved", "recipe: halved\nseed: '7'", "seed: expected a whole number, found text '7'; write 7 without"),
    ("recipe: halved", "recipe: halved\nseed: 1.5", "seed: expected a whole number, found 1.5"),
    ("recipe: halved", "recipe: halved\nseed: true", "seed: expected a whole number, found true"),
    ("recipe: halved", "recipe: halved\nabout: off", "about: off is false or true to some YAML readers"),
    ("recipe: halved", "recipe: halved\nabout: true", "about: expected text, found true; quote it: 'true'"),
    ("recipe: halved", "recipe: halved\nabout: 12", "about: expected text, found 12; quote it: '12'"),
    ("recipe: halved", "recipe: halved\nseeds: 0", "seeds: must be greater than 0, found 0"),
    ("recipe: halved", "recipe: halved\nequal: step", "equal: 'step' is not one of steps, tokens, flops, seconds; did"),
    ("recipe: halved", "recipe: halved\nengine: {zero: 4}", "engine.zero: 4 is not one of 0, 1, 2, 3"),
    ("recipe: halved", "recipe: halved\nengine: [1]", "engine: expected keys and values, found a list"),
    (
        "recipe: halved",
        "recipe: halved\nengine: {deepspeed: {zero_optimization: {stage: 3}}}",
        "engine.deepspeed: zero_optimization.stage is what engine.zero says",
    ),
    ("recipe: halved", "recipe: halved\n1: 2", "key '1' is not text"),
    ("some/model", "{from: []}", "models.teacher.from: at least 1 needed, found 0"),
    ("some/model", "{from: a, sha256: abc}", "64 hexadecimal digits"),
    ("tokenizer: teacher", "tokenizer: teachr", "corpora.text.tokenizer: no model 'teachr'; did you mean 'teacher'?"),
    ("tokenizer: teacher", "tokenizer: {train: {voc: 3}}", "no key 'voc'; did you mean 'vocab'?"),
    ("tokenizer: teacher", "tokenizer: teacher, heldout: 1.5", "corpora.text.heldout: must be less than 1, found 1.5"),
    ("tokenizer: teacher", "tokenizer: teacher, heldout: .nan", ".nan is not a plain finite decimal number"),
    ("tokenizer: teacher", "tokenizer: teacher, length: 010", "010 is not a plain finite decimal number"),
    ("data: text\n", "data: txt\n", "train.data: no corpus or collection 'txt'; did you mean 'text'? (line 9)"),
    ("{from: teacher, layers: [0, 1]}}", "{from: twin, layers: 2}}", "stage 'twin' is not finished before this one"),
    ("{from: teacher, layers: [0, 1]}}", "{from: report, layers: 2}}", "stage 'report' trains nothing"),
    (
        "{from: teacher, layers: [0, 1]}}",
        "{from: nobody, layers: 2}}",
        "no model or earlier stage 'nobody'; known: tea",
    ),
    ("layers: [0, 1]}", "layers: two}", "layers: expected a whole number or a list, found text 'two'"),
    ("layers: [0, 1]}", "layers: [0, 0.5]}", "cut.layers.1: expected a whole number, found 0.5"),
    ("layers: [0, 1]}", "layers: []}", "cut.layers: at least 1 needed, found 0"),
    (
        "layers: [0, 1]}}",
        "layers: [0]}, from: teacher}",
        "exactly one of new, from, cut, grow is needed, found from and cut",
    ),
    ("{cut: {from: teacher, layers: [0, 1]}}", "{}", "exactly one of new, from, cut, grow is needed, found none"),
    ("relation_kl:", "relation_k:", "loss.0: no key 'relation_k'; did you mean 'relation_kl'? (line 11)"),
    ("heads: 12", "head: 12", "stages.student.train.loss.0.relation_kl: no key 'head'; did you mean 'heads'?"),
    ("target: t,", "target: tt,", "relation_kl.target: no target 'tt'; did you mean 't'?"),
    ("heads: 12", "heads: {qq: x}", "relation_kl.heads.qq: expected a whole number, found text 'x'"),
    ("heads: 12", "heads: 0", "relation_kl.heads: must be greater than 0, found 0"),
    ("heads: 12", "heads: {qq: 0}", "relation_kl.heads.qq: must be greater than 0, found 0"),
    ("heads: 12", "heads: 12, weight: {points: []}", "weight: points: at least one"),
    ("heads: 12", "heads: 12, teacher_layer: first", "expected a whole number or last, found text 'first'"),
    ("optim: &adam {batch: 16}", "optim: &adam {name: adam, batch: 16}", "'adam' is not one of adamw; did you mean"),
    ("lr: 0.001\n", "lr: {points: [[0, 0.1], [9, -0.1]]}\n", "lr: a learning rate of -0.1 would climb the loss"),
    ("lr: 0.001\n", "lr: '1e-3'\n", "lr: expected a number or {unit:"),
    ("    lr: 0.001\n", "", "stages.student.train: 'lr' is needed"),
    (
        "stop: {steps: 10}",
        "stop: {steps: 10, tokens: 5}",
        "exactly one of steps, epochs, tokens, like is needed, found steps",
    ),
    ("stop: {steps: 10}", "stop: {step: 10}", "no key 'step'; did you mean 'steps'?"),
    ("on: [probe, speed]", "on: [prob]", "stages.report.evaluate.on.0: 'prob' is not one of probe"),
    ("on: [probe, speed]", "on: [{speed: {bach: 4}}]", "speed has no key 'bach'; did you mean 'batch'?"),
    ("rows: {a: student,", "rows: {a: studnt,", "rows.a: no model or earlier stage 'studnt'; did you mean 'student'?"),
    ("id: twin", "id: student", "stages.student.id: two stages are called 'student'"),
    ("id: twin", "id: teacher", "'teacher' is a model already"),
    ("id: twin", "id: corpora", "a directory of every run"),
    (
        "- id: twin",
        "- id: twin\n  evaluate: {rows: {a: student}, on: [speed]}",
        "exactly one of train, grow, data, evaluate is needed",
    ),
]


@pytest.mark.parametrize(("found", "put", "words"), CHANGES, ids=[words[:50] for _, _, words in CHANGES])
def test_a_mistake_is_named_with_its_place_and_what_would_work(said, found, put, words):
    assert GOOD.count(found) >= 1
    told = said(GOOD.replace(found, put, 1))
    assert words in told
    assert all(line.startswith("r.yaml: ") for line in told.splitlines())


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(said):
    text = GOOD.replace("recipe: halved", "recipe: halved\nsede: 3").replace("lr: 0.001", "lr: 1e-3", 1)
    told = said(text.replace("data: text\n", "data: txt\n").replace("[probe", "[prob")).splitlines()
    assert [line.split(": ")[1] for line in told] == [
        "no key 'sede'; did you mean 'seed'? (line 2)",
        "stages.student.train.data",
        "stages.student.train.lr",
        "stages.report.evaluate.on.0",
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "r.yaml: the file is empty"),
        (b"# nothing\n", "r.yaml: the file is empty"),
        (b"- a\n- b\n", "r.yaml: found a list at the top"),
        (b"just words", "r.yaml: found text 'just words' at the top"),
        (b"recipe:\n\tname: 1\n", "r.yaml: a tab at the start of the line; indent with spaces (line 2)"),
        (b"\xef\xbb\xbfrecipe: a\n", "byte order mark"),
        (b"recipe: a\nabout: \xff\n", "not UTF-8; save it as UTF-8 (line 2)"),
        (b"recipe: \x00\n", "control characters"),
        (b"recipe: [a\n", "r.yaml: not YAML"),
        (b"recipe: *nobody\n", "undefined alias"),
        (b"recipe: a\n---\nrecipe: b\n", "a second document"),
        (b"recipe: !!python/object/apply:os.system ['touch canary']\n", "tag !!python/object/apply:os.system"),
        (b"recipe: !secret x\n", "tag !secret"),
        (b"recipe: &a [*a]\n", "an alias that refers to what it stands in"),
        (b"[" * 400_000, "nested more than"),
        (b"{a: " * 100, "nested more than"),
        (b"a: 1\n" * 100_000, "more than 20000 values"),
        (b"#" * 1_000_001, "a recipe has at most 1000000"),
        (b"recipe: " + b"9" * 6000, "not a plain finite decimal number"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_recipe_is_refused_in_one_line(said, data, words, tmp_path):
    told = said(data)
    assert words in told
    assert not (tmp_path / "canary").exists()


@pytest.mark.timeout(30)
def test_an_alias_bomb_is_refused_before_it_grows(said):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "once aliases are followed" in said("\n".join(lines))


def test_a_missing_file_names_the_packaged_recipes(tmp_path):
    with pytest.raises(UsageError, match=r"no such file; packaged recipes are .*did you mean 'minilm'"):
        recipes.load("minilmm")
    with pytest.raises(UsageError, match="is not a file"):
        recipes.load(tmp_path)


# Overrides


@pytest.mark.parametrize(
    "override",
    ["stages.0.train.stop.steps=7", "stages.student.train.stop.steps=7", "student.train.stop.steps=7"],
)
def test_a_stage_is_addressed_by_number_or_name(load, override):
    assert load(GOOD, override).stages[0].train.stop.steps == 7


def test_overrides_are_yaml_and_the_last_one_wins(load):
    recipe = load(
        GOOD, "seed=1", "seed=2", "report.evaluate.on=[probe]", "engine={zero: 2}", "twin.train.loss.0.ce.mask=0.3"
    )
    assert recipe.seed == 2 and recipe.stages[2].evaluate.on == ("probe",) and recipe.engine.zero == 2
    assert recipe.stages[1].train.objectives()[0][1].mask == Schedule.constant(0.3)


def test_an_override_mends_a_mistake_of_the_file(load):
    assert load(GOOD.replace("lr: 0.001\n", "lr: 1e-3\n", 1), "student.train.lr=0.002").stages[0].train.lr.points == (
        (0, 0.002),
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "expected key.sub=value"),
        ("=3", "expected key.sub=value"),
        ("engine..zero=3", "expected key.sub=value"),
        ("engin.zero=2", "no key and no stage 'engin'; did you mean 'engine'?"),
        ("studen.train.lr=1", "did you mean 'student'?"),
        ("engine.zeroo=2", "command line: engine: no key 'zeroo'; did you mean 'zero'?"),
        ("student.train.lr=5e-4", "command line: stages.student.train.lr: 5e-4 is text"),
        ("student.train.stop.tokens=5", "exactly one of steps, epochs, tokens, like is needed, found steps and tokens"),
        ("stages.9.train.lr=1", "'9' is not one of the 3 places"),
        ("student.train.data.x=1", "stands below a plain value"),
        ("seed=[1", "seed=[1: not YAML"),
        ("seed=!!int 3", "tag !!int"),
    ],
)
def test_a_wrong_override_is_named(said, override, words):
    assert words in said(GOOD, override)


def test_a_mistake_of_the_command_line_is_not_blamed_on_the_file(said):
    assert said(GOOD, "student.train.stop.steps=0") == (
        "command line: stages.student.train.stop.steps: must be greater than 0, found 0"
    )


# Whatever stands there


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_recipe_however_broken_is_answered_with_anything_but_words(data, tmp_path_factory):
    lines = GOOD.splitlines()
    junk = st.sampled_from(["[]", "{}", "3", "x", "null", "true", "{x: 1}", "[x]", "-1", "", "*adam", "{id: [1]}"])
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[i].partition(":")
        lines[i] = data.draw(st.sampled_from(["", lines[i] + " x", f"{key}{colon} "])) + data.draw(junk)
    path = tmp_path_factory.mktemp("broken") / "r.yaml"
    path.write_text("\n".join(lines))
    try:
        recipe = recipes.load(path)
    except UsageError as refused:
        assert str(refused).strip()
        return
    path.write_text(recipes.dump(recipe))
    assert recipes.load(path) == recipe


SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(-1e300, 1e300) | st.text()
VALUES = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(min_size=1), below), max_leaves=8
)


@settings(max_examples=50, deadline=None)
@given(VALUES)
@example({"\x85": "\u2028 \x85"})
def test_what_is_written_is_read_back(value):
    document = strict_yaml.parse(strict_yaml.dump({"key": value}).encode())
    assert document.value == {"key": value} and not document.mistakes


def test_the_schema_knows_every_key_and_closes_every_object():
    schema = recipes.schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["properties"]) == set(recipes.Recipe.model_fields)
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values() if "properties" in part)
    assert {"relation_kl", "ce"} <= set(schema["$defs"]["Loss"]["properties"])
    assert "from" in schema["$defs"]["ModelSpec"]["properties"]
