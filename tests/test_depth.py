"""Laws of growth in depth, for every family: copies are copies to the byte, and what is promised holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from test_width import POST
from tiny_families import CONFIGS, load, logits, save

import growth
from growth.anatomy import dissect
from growth.cli import main
from growth.depth import evenly, parse_order
from growth.errors import UsageError, UserError
from growth.maps import Layers
from growth.operate import Output
from growth.reindex import reindex

# where a family's names carry the layer
LAYER = re.compile(r"((?:^|\.)(?:layers?|h|block)\.)(\d+)(?=\.)")
PRE_NORM = [kind for kind in CONFIGS if kind not in POST]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Checkpoints of every family, each made once."""
    home, made = tmp_path_factory.mktemp("sources"), {}

    def get(kind, **changes):
        key = f"{kind}-{len(changes)}-{'-'.join(changes)}"
        if key not in made:
            made[key] = save(home / key, kind, **changes)
        return made[key]

    return get


def data(checkpoint, name):
    entry = checkpoint[name]
    return entry.dtype, entry.shape, entry.file.read_bytes()[entry.start : entry.end]


def from_layer(name, order):
    """The tensor that a grown name must be a copy of; T5's first block keeps the position bias of all."""
    if "relative_attention_bias" in name:
        return name
    return LAYER.sub(lambda found: f"{found[1]}{order[int(found[2])]}", name, count=1)


def depth(path):
    anatomy = dissect(growth.open(path))
    return anatomy.sizes[anatomy.family.depth[0]]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("how", ["stack", "interleave", "1,0-1,0", "cut"])
def test_grown_and_cut_models_load_and_every_tensor_is_its_source(source, tmp_path, kind, how):
    # as deep as its encoder: one explicit order serves both stacks
    src = source(kind, **({"num_decoder_layers": 2} if kind == "t5" else {}))
    n = depth(src)
    orders = {"stack": [*range(n)] * 3, "interleave": [i for i in range(n) for _ in range(3)], "cut": [1]}
    order = orders.get(how, [1, 0, 1, 0])
    x = tmp_path / "x"
    path = growth.cut(src, x, order) if how == "cut" else growth.stack(src, x, factor=3, order=how)
    model, old, new = load(path), growth.open(src), growth.open(path)
    assert depth(path) == len(order) and logits(model).isfinite().all()
    copies = {name: from_layer(name, order) for name in new}
    made_up = {name for name, origin in copies.items() if origin not in old}
    assert all("attn_norm" in name for name in made_up) and (not made_up or kind == "modernbert")
    assert all(data(new, name) == data(old, origin) for name, origin in copies.items() if name not in made_up)
    assert all((new.tensor(name) == 1).all() for name in made_up)


@pytest.mark.parametrize("kind", CONFIGS)
def test_cutting_what_was_stacked_gives_the_source_back_byte_for_byte(source, tmp_path, kind):
    src = source(kind)
    growth.stack(src, tmp_path / "twice")
    if kind == "t5":  # its two stacks differ in depth: only a number fits both
        with pytest.raises(UserError, match="layer 2 is not there"):
            growth.cut(src, tmp_path / "no", [0, 1, 2])
        src = source(kind, num_decoder_layers=2)
        growth.stack(src, tmp_path / "twice", output=Output(overwrite=True))
    path = growth.cut(tmp_path / "twice", tmp_path / "back", list(range(depth(src))))
    assert (path / "model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()
    before, after = (json.loads((p / "config.json").read_text()) for p in (src, path))
    assert after == {**before, **{key: after[key] for key in ("layer_types", "num_decoder_layers") if key in after}}


@pytest.mark.parametrize("kind", PRE_NORM)
def test_inserted_blocks_are_the_identity_to_the_bit(source, tmp_path, kind):
    src = source(kind)
    path = growth.insert(src, tmp_path / "x", layers=1)
    assert torch.equal(logits(load(path)), logits(load(src)))
    stacked = growth.stack(src, tmp_path / "y", order="interleave")
    assert (logits(load(stacked)) - logits(load(src))).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox", "gpt2"])
def test_identity_blocks_may_stand_anywhere_and_biases_are_silenced_with_their_weights(source, tmp_path, kind):
    src = source(kind)
    path = growth.insert(src, tmp_path / "x", after=[0, 0, 1])
    assert torch.equal(logits(load(path)), logits(load(src)))
    assert json.loads((path / "growth.json").read_text())["new"] == {"layers": [1, 2, 4]}


def test_kinds_of_attention_follow_their_layer_and_are_not_made_anew_by_number(source, tmp_path):
    src = source("gemma2", sliding_window=3)
    path = growth.insert(src, tmp_path / "x", after=[0])
    config = json.loads((path / "config.json").read_text())
    sliding, full = "sliding_attention", "full_attention"
    assert config["layer_types"] == [sliding, sliding, full, sliding, full]
    assert torch.equal(logits(load(path)), logits(load(src)))
    by_number = {**config, "layer_types": [sliding, full, sliding, full, sliding]}
    (path / "config.json").write_text(json.dumps(by_number))
    assert (logits(load(path)) - logits(load(src))).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "modernbert", "qwen2"])
def test_a_list_that_the_config_leaves_out_is_written_out_from_its_default(source, tmp_path, kind):
    src = tmp_path / "src"
    save(src, kind)
    config = json.loads((src / "config.json").read_text())
    kinds = config.pop("layer_types")
    (src / "config.json").write_text(json.dumps(config))
    path = growth.cut(src, tmp_path / "x", [1, 3])
    assert json.loads((path / "config.json").read_text())["layer_types"] == [kinds[1], kinds[3]]


@pytest.mark.parametrize("kind", POST)
def test_post_norm_models_cannot_have_identity_blocks_and_say_so(source, tmp_path, kind):
    for grow in (lambda: growth.insert(source(kind), tmp_path / "x", layers=1),
                 lambda: growth.stack(source(kind), tmp_path / "x", how="zero")):  # fmt: skip
        with pytest.raises(UserError, match=r"norms behind every residual sum.* --approximate. comes near"):
            grow()


@pytest.mark.parametrize("kind", POST)
def test_blocks_of_post_norm_models_come_near_the_identity_where_that_is_asked_for(source, tmp_path, kind):
    src = source(kind)
    path = growth.insert(src, tmp_path / "x", layers=2, approximate=True)
    made, old = growth.open(path), growth.open(src)
    own = {name: old.tensor(LAYER.sub(r"\g<1>1", name)) if ".2." in name and "orm" in name else made.tensor(name)
           for name in made}  # fmt: skip
    naive = growth.write(tmp_path / "naive", made.config, own.items())
    near, far, copied = (growth.verify(src, p).mean_abs for p in (
        *(path, naive), growth.stack(src, tmp_path / "y", order=",".join(map(str, made_order(path))))))  # fmt: skip
    assert growth.verify(src, path).promised == "approximate" and 1e-6 < near < far / 1.4 and near < copied / 3


def made_order(path):
    return json.loads((path / "growth.json").read_text())["maps"]["layers"]


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_they_are_the_identity_where_all_channels_have_one_gain_and_one_bias(source, tmp_path, kind):
    """Then the mean and the variance under the norm are the same for every token, epsilon aside."""
    old = growth.open(source(kind))
    flat = {"orm.weight": 0.7, "orm.bias": 0.2}
    fill = {n: next((v for end, v in flat.items() if n.endswith(end)), None) for n in old}
    tensors = {n: old.tensor(n) if v is None else torch.full_like(old.tensor(n), v) for n, v in fill.items()}
    src = growth.write(tmp_path / "flat", {**old.config, "layer_norm_eps": 1e-12}, tensors.items())
    found = growth.verify(src, growth.insert(src, tmp_path / "x", layers=2, approximate=True))
    assert found.max_abs < 1e-5 * found.largest


def test_layers_that_depend_on_their_number_stay_where_they_are(tmp_path):
    src = save(tmp_path / "src", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match="sets scale_attn_by_inverse_layer_idx"):
        growth.stack(src, tmp_path / "x")
    load(growth.cut(src, tmp_path / "first", [0]))


def test_unknown_lists_with_one_value_per_layer_are_refused(tmp_path):
    src = save(tmp_path / "src", "llama")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "my_windows": [1, 2, 3, 4]}))
    with pytest.raises(UserError, match="my_windows holds one value per layer"):
        growth.stack(src, tmp_path / "x")


def test_reindexing_twice_is_reindexing_by_the_composed_map(source, tmp_path):
    src = source("llama")
    one, two = Layers.of([0, 1, 1, 3], silent=[2]), Layers.of([3, 2, 2, 0])
    checkpoint = growth.open(src)
    config, stream = reindex(checkpoint, dissect(checkpoint), {"layers": one})
    between = growth.open(growth.write(tmp_path / "one", config, stream))
    config, stream = reindex(between, dissect(between), {"layers": two})
    twice = growth.open(growth.write(tmp_path / "two", config, stream))
    config, stream = reindex(checkpoint, dissect(checkpoint), {"layers": one.then(two)})
    assert growth.open(growth.write(tmp_path / "once", config, stream)).digest() == twice.digest()
    assert one.then(two).silent == {1, 2} and one.then(two).order == [3, 1, 1, 0]


def test_a_layer_may_be_a_weighted_sum_of_layers(source, tmp_path):
    checkpoint = growth.open(source("llama"))
    mean = Layers((((0, 0.5), (1, 0.5)), ((3, 1.0),)))
    config, stream = reindex(checkpoint, dissect(checkpoint), {"layers": mean})
    merged = growth.open(growth.write(tmp_path / "x", config, stream))
    name = "model.layers.{}.mlp.up_proj.weight"
    expected = (checkpoint.tensor(name.format(0)) + checkpoint.tensor(name.format(1))) / 2
    torch.testing.assert_close(merged.tensor(name.format(0)), expected, rtol=0, atol=1e-7)
    assert torch.equal(merged.tensor(name.format(1)), checkpoint.tensor(name.format(3)))


def test_lineage_says_what_is_new_where_it_came_from_and_what_is_preserved(source, tmp_path):
    src = source("llama")
    story = {}
    for name, path in {
        "stack": growth.stack(src, tmp_path / "a", order="0-3,2-3"),
        "insert": growth.insert(src, tmp_path / "b", layers=2),
        "cut": growth.cut(src, tmp_path / "c", 2),
        "all": growth.cut(src, tmp_path / "d", 4),
    }.items():
        story[name] = json.loads((path / "growth.json").read_text())
    assert story["stack"]["new"] == {"layers": [4, 5]} and story["insert"]["new"] == {"layers": [2, 5]}
    assert story["stack"]["maps"] == {"layers": [0, 1, 2, 3, 2, 3]} and story["cut"]["maps"] == {"layers": [1, 3]}
    assert {name: s["preserves"] for name, s in story.items()} == {
        **dict(stack="no", insert="exact", cut="no", all="exact")
    }
    assert story["cut"]["sources"][0]["path"] == str(src) and story["cut"]["sources"][0]["size"] > 0


def test_a_cut_is_even_and_always_keeps_the_last_layer():
    assert [evenly(12, n) for n in (6, 4, 3, 1)] == [[1, 3, 5, 7, 9, 11], [2, 5, 8, 11], [3, 7, 11], [11]]
    for n in range(1, 40):
        for m in range(1, n + 1):
            chosen = evenly(n, m)
            assert chosen[-1] == n - 1 and len(set(chosen)) == m and chosen == sorted(chosen) and chosen[0] >= 0


def test_orders_are_read_as_people_write_them():
    assert parse_order("0-2,1-2", 3) == [0, 1, 2, 1, 2]
    assert parse_order("2-0, 1", 3) == [2, 1, 0, 1]
    for text, said in {
        "0-3": "layer 3 is not there: the model has layers 0 to 2",
        "a": "neither",
        "": "neither",
    }.items():
        with pytest.raises(UserError, match=said):
            parse_order(text, 3)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([0, 4], "layer 4 is not there"),
        ([-5], "layer -5 is not there"),
        ([], "no layer is left"),
        ([1, 1], "listed twice"),
        (0, "0 layers cannot be kept"),
        (5, "5 layers cannot be kept: the model has 4"),
    ],
)
def test_layers_that_cannot_be_kept_are_refused(source, tmp_path, layers, said):
    with pytest.raises(UserError, match=said):
        growth.cut(source("llama"), tmp_path / "x", layers)
    assert list(tmp_path.iterdir()) == []


def test_layers_may_be_counted_from_the_end(source, tmp_path):
    a = growth.cut(source("llama"), tmp_path / "a", [0, -1])
    assert growth.open(a).digest() == growth.open(growth.cut(source("llama"), tmp_path / "b", [0, 3])).digest()


def test_inserting_nothing_or_twice_is_a_usage_error(source, tmp_path):
    for asked in ({}, {"layers": 0}, {"layers": 1, "after": [0]}):
        with pytest.raises(UsageError):
            growth.insert(source("llama"), tmp_path / "x", **asked)


def test_values_are_checked_on_request(tmp_path):
    src = save(tmp_path / "src", "llama")
    bad = {name: growth.open(src).tensor(name).clone() for name in growth.open(src)}
    bad["model.norm.weight"][0] = float("nan")
    path = growth.write(tmp_path / "bad", growth.open(src).config, bad.items())
    growth.cut(path, tmp_path / "x", 2)
    with pytest.raises(UserError, match=r"model\.norm\.weight not finite"):
        growth.cut(path, tmp_path / "y", 2, output=Output(check=True))


def test_buffers_of_old_versions_are_left_behind(tmp_path):
    src = save(tmp_path / "src", "bert", cls="BertModel")
    old = {name: growth.open(src).tensor(name) for name in growth.open(src)}
    old["embeddings.position_ids"] = torch.arange(37)[None]
    path = growth.write(tmp_path / "old", growth.open(src).config, old.items())
    load(growth.cut(path, tmp_path / "x", 1), cls="BertModel")


# the command line


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands_do_what_the_functions_do(source, tmp_path):
    src = source("llama")
    assert run("stack", src, tmp_path / "a", "--order", "interleave").exit_code == 0
    assert run("cut", src, tmp_path / "b", "--layers", "0,-1").exit_code == 0
    done = run("insert", src, tmp_path / "c", "--after", "1")
    assert done.exit_code == 0 and "computes the same as before" in done.stderr
    for path, made in {
        "a": growth.stack(src, tmp_path / "fa", order="interleave"),
        "b": growth.cut(src, tmp_path / "fb", [0, 3]),
        "c": growth.insert(src, tmp_path / "fc", after=[1]),
    }.items():
        assert growth.open(tmp_path / path).digest() == growth.open(made).digest()


def test_stack_without_paths_writes_beside_the_directory_it_is_called_in(tmp_path, monkeypatch):
    save(tmp_path / "small", "llama")
    monkeypatch.chdir(tmp_path / "small")
    assert run("stack").exit_code == 0 and depth(tmp_path / "small-x2") == 8
    done = run("stack")
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and "--overwrite" in done.stderr
    assert run("stack", "--overwrite").exit_code == 0


def test_inspect_says_what_a_checkpoint_is(source, tmp_path):
    growth.stack(source("gpt2"), tmp_path / "x")
    said = run("inspect", tmp_path / "x").output
    for words in (
        "GPT-2 (GPT2LMHeadModel)",
        "layers 4",
        "ffn 41",
        "lm_head.weight = transformer.wte.weight",
        "stack of",
    ):
        assert words in said
    found = growth.inspect(tmp_path / "x")
    assert found.parameters == sum(p.numel() for p in load(tmp_path / "x").parameters())


def test_mistakes_on_the_command_line_are_one_line(tmp_path, source):
    for arguments, code, said in (
        (("inspect", tmp_path), 1, "config.json does not exist"),
        (("cut", source("llama"), tmp_path / "x", "--layers", "a,b"), 2, "numbers with commas"),
        (("stack", source("llama"), tmp_path / "x", "--factor", "0"), 2, "at least 1"),
        (("stack", source("llama"), source("llama")), 1, "must not lie in each other"),
    ):
        done = run(*arguments)
        assert done.exit_code == code and said in done.stderr and done.stderr.count("\n") == 1


def test_no_command_of_bytes_imports_torch(source, tmp_path):
    code = """
import sys
from growth.cli import main
for words in (["--help"], ["inspect", src], ["stack", src, dst], ["cut", dst, dst + "2", "--layers", "2"]):
    main(words, standalone_mode=False)
assert not {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules), "slow imports"
"""
    code = f"src, dst = {str(source('llama'))!r}, {str(tmp_path / 'x')!r}\n{code}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, stdout=subprocess.DEVNULL)
