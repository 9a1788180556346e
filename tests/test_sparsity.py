"""Laws of sparsity at rest: exact counts, masks that no order changes, weights that keep their bits, lies refused."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tiny_families
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import CONFIGS, LANGUAGE_MODELS

import growth
from growth import masks as reading
from growth import packing
from growth.anatomy import dissect
from growth.bits import FILE, KEY, Mask, packed, unpacked, write_masks
from growth.cli import main
from growth.errors import UsageError, UserError
from growth.masks import by_parameter, of_parameters, read
from growth.operate import Output

MATRICES = {  # what SPDF makes sparse of all blocks
    **dict.fromkeys(("bert", "roberta", "distilbert", "electra"), 3 * 6),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"), 4 * 7),
    **{"modernbert": 4 * 4, "gpt2": 2 * 4, "gpt_neox": 4 * 4, "phi3": 4 * 4, "t5": 2 * 6 + 3 * 10},
    **{"mixtral": 4 * (4 + 15), "qwen2_moe": 4 * (4 + 15 + 3)},
}
LIE = "model.layers.0.mlp.up_proj.weight"  # of a Llama, [41, 48]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Checkpoints of every family, each made once."""
    made: dict[str, Path] = {}

    def get(kind, dtype=torch.float32, **changes):
        key = f"{kind}{dtype}{sorted(changes.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp("sources") / kind
            made[key] = tiny_families.save(path, kind, dtype=dtype, **changes)
        return made[key]

    return get


def weights(path):
    return {
        name: tensor
        for file in sorted(Path(path).glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def rewrite(path: Path, name: str, change) -> None:
    """Another tensor in the place of one."""
    tensors = weights(path)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def masked(path: Path, change) -> Path:
    """The masks of a checkpoint changed; (bools by name) -> the same."""
    alive = change({name: mask.bools() for name, mask in reading.masks_of(growth.open(path)).items()})
    (path / FILE).unlink()
    write_masks(path / FILE, {name: Mask.of(bools) for name, bools in alive.items()})
    return path


# What is made sparse


@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_and_ffn_of_every_family_are_sparse_to_the_exact_count_and_nothing_else(source, tmp_path, kind):
    dst = growth.sparsify(source(kind), tmp_path / "sparse", sparsity=0.7)
    before, after, masks = weights(source(kind)), weights(dst), read(dst)
    assert len(masks) == MATRICES.get(kind, len(masks)) > 0
    for name, tensor in before.items():
        if name not in masks:
            assert torch.equal(tensor, after[name]), name
            continue
        alive = masks[name].bools()
        assert int(alive.sum()) == masks[name].kept == 3 * tensor.numel() // 10
        assert torch.equal(after[name][alive], tensor[alive]) and not after[name][~alive].any()
    assert not any(
        word in name for name in masks for word in ("norm", "embed", "bias", "head.", "gate.weight", "pooler")
    )
    told = json.loads((dst / "growth.json").read_text())
    assert told["operator"] == "sparsify" and told["preserves"] == "no"
    assert told["kept"] == {name: [mask.kept, mask.size] for name, mask in masks.items()}


@pytest.mark.parametrize("scope", [["attention"], ["ffn"]])
def test_a_scope_is_one_part_of_the_blocks(source, tmp_path, scope):
    dst = growth.sparsify(source("gpt2"), tmp_path / "sparse", scope=scope)
    parts = {"attention": "attn", "ffn": "mlp"}
    assert {name.split(".")[3] for name in read(dst)} == {parts[scope[0]]}


def test_a_decimal_is_what_it_says_though_no_binary_number_is(source, tmp_path):
    """In floating point (1 - 0.9) * 2700 is 269.99999999999994."""
    kept = read(growth.sparsify(source("gpt2"), tmp_path / "sparse", sparsity=0.9))[
        "transformer.h.0.attn.c_attn.weight"
    ]
    assert (kept.kept, int((1 - 0.9) * 2700)) == (270, 269)


def test_a_random_mask_is_random(source, tmp_path):
    """Rows, columns and the two layers share nothing beyond chance."""
    masks = read(growth.sparsify(source("gpt2", n_embd=120, n_inner=128), tmp_path / "sparse", sparsity=0.5))
    one, other = (masks[f"transformer.h.{i}.mlp.c_fc.weight"].bools().double() for i in (0, 1))
    for side in (0, 1):
        assert (one.mean(side) - 0.5).abs().max() < 6 * 0.5 / math.sqrt(one.shape[side])
    assert abs(float(((one - 0.5) * (other - 0.5)).mean())) < 6 * 0.25 / math.sqrt(one.numel())


def test_masks_depend_on_seed_and_name_alone(source, tmp_path):
    """Not on shards, on the type, on what else is sparse, or on a head; and the seed changes all of them."""
    src = source("bert")
    first = read(growth.sparsify(src, tmp_path / "first", sparsity=0.6, seed=3))
    growth.stack(src, tmp_path / "shards", order="0-2", output=Output(shard_size="20KB"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    some = read(growth.sparsify(tmp_path / "shards", tmp_path / "some", sparsity=0.6, seed=3, scope=["ffn"]))
    half = read(growth.sparsify(source("bert", torch.bfloat16), tmp_path / "half", sparsity=0.6, seed=3))
    bare = tiny_families.save(tmp_path / "bert", "bert", "BertModel")
    bare = {
        "bert." + name: mask for name, mask in read(growth.sparsify(bare, tmp_path / "b", sparsity=0.6, seed=3)).items()
    }
    for others in (some, half, bare):
        assert others and all(torch.equal(mask.bools(), first[name].bools()) for name, mask in others.items())
    again = read(growth.sparsify(src, tmp_path / "again", sparsity=0.6, seed=4))
    assert not any(torch.equal(again[name].bools(), mask.bools()) for name, mask in first.items())


def test_the_same_call_writes_the_same_bytes_in_shards_or_in_one(source, tmp_path):
    growth.sparsify(source("llama"), tmp_path / "one")
    growth.sparsify(source("llama"), tmp_path / "two", output=Output(shard_size="20KB"))
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_magnitude_keeps_the_largest_and_the_first_among_equals(source, tmp_path):
    src = shutil.copytree(source("llama"), tmp_path / "src")
    ties = "model.layers.0.mlp.up_proj.weight"
    rewrite(src, ties, lambda tensor: tensor.fill_(-0.5))
    dst = growth.sparsify(src, tmp_path / "sparse", sparsity=0.75, how="magnitude")
    for name, mask in read(dst).items():
        sizes, alive = weights(src)[name].abs(), mask.bools()
        assert sizes[alive].min() >= sizes[~alive].max()
    assert read(dst)[ties].bools().flatten().nonzero()[:, 0].tolist() == list(range(41 * 48 // 4))


@pytest.mark.parametrize(("kind", "dim"), [("llama", 1), ("gpt2", 0)])
@pytest.mark.parametrize("how", ["random", "magnitude"])
def test_patterns_hold_along_what_is_summed_over(source, tmp_path, kind, dim, how):
    """Columns of a Linear, rows of GPT-2's Conv1D; measured against the plain definition."""
    changes = {"n_embd": 40, "n_inner": 44} if kind == "gpt2" else {"intermediate_size": 44, "head_dim": 12}
    src = source(kind, **changes)
    dst = growth.sparsify(src, tmp_path / "sparse", pattern="1:4", how=how)
    masks = read(dst)
    name, mask = next((name, mask) for name, mask in masks.items() if "mlp" in name)
    alive = mask.bools() if dim else mask.bools().T
    assert (alive.reshape(alive.shape[0], -1, 4).sum(-1) == 1).all() and mask.kept * 4 == mask.size
    sizes = weights(src)[name].abs() if dim else weights(src)[name].abs().T
    largest = sizes.reshape(alive.shape[0], -1, 4).argmax(-1) == alive.reshape(alive.shape[0], -1, 4).int().argmax(-1)
    assert largest.all() if how == "magnitude" else 0.1 < largest.double().mean() < 0.5
    assert json.loads((dst / "growth.json").read_text())["arguments"]["sparsity"] == 0.75


def test_rescaling_keeps_the_deviation_of_outputs_and_the_default_halves_it(source, tmp_path):
    src = source("gpt2", n_embd=120, n_inner=512)
    x = torch.randn(400, 512, generator=torch.Generator().manual_seed(0))
    paths = {how: growth.sparsify(src, tmp_path / how, sparsity=0.75, rescale=how) for how in ("none", "sqrt_density")}
    name = "transformer.h.0.mlp.c_proj.weight"
    dense = (x @ weights(src)[name]).std()
    assert abs((x @ weights(paths["none"])[name]).std() / dense - 0.5) < 0.02
    assert abs((x @ weights(paths["sqrt_density"])[name]).std() / dense - 1) < 0.04
    read(paths["sqrt_density"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_survivors_keep_their_bits_in_every_type(source, tmp_path, dtype):
    src = source("llama", dtype)
    dst = growth.sparsify(src, tmp_path / "sparse")
    for name, mask in read(dst).items():
        assert torch.equal(weights(dst)[name], weights(src)[name].where(mask.bools(), 0.0))


def test_what_dies_is_zero_even_if_it_was_no_number(source, tmp_path):
    src = shutil.copytree(source("llama"), tmp_path / "src")
    rewrite(src, LIE, lambda tensor: tensor.fill_(float("inf")))
    dst = growth.sparsify(src, tmp_path / "sparse", sparsity=0.5)
    assert torch.equal(weights(dst)[LIE].isinf(), read(dst)[LIE].bools())


# The way back


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "t5"])
def test_densify_drops_the_masks_and_not_a_bit_of_the_weights(source, tmp_path, kind):
    sparse = growth.sparsify(source(kind), tmp_path / "sparse")
    dense = growth.densify(sparse, tmp_path / "dense")
    assert (dense / "model.safetensors").read_bytes() == (sparse / "model.safetensors").read_bytes()
    assert not (dense / FILE).exists() and growth.verify(sparse, dense).max_abs == 0
    assert json.loads((dense / "growth.json").read_text())["preserves"] == "exact"


def test_a_model_in_memory_is_sparse_as_a_checkpoint_is(source, tmp_path):
    path = source("mixtral")
    dst = growth.sparsify(path, tmp_path / "sparse", how="magnitude")
    model = growth.sparsify(tiny_families.load(path), how="magnitude")
    assert {n: m.bools().tolist() for n, m in model.masks.items()} == {
        n: m.bools().tolist() for n, m in read(dst).items()
    }
    named = dict(model.named_parameters())
    for name, alive in by_parameter(model.masks, dissect(growth.open(dst))).items():
        assert alive.shape == named[name].shape and not named[name][~alive].any() and named[name][alive].any()
    assert growth.densify(model).masks == {} and growth.densify(model).growth["preserves"] == "exact"


def test_masks_go_to_a_training_model_and_come_back(source, tmp_path):
    """In memory all experts of a layer are one parameter."""
    dst = growth.sparsify(source("qwen2_moe"), tmp_path / "sparse")
    anatomy, masks = dissect(growth.open(dst)), read(dst)
    alive = by_parameter(masks, anatomy)
    assert len(alive) == 4 * (4 + 2 + 3) and sum(int(a.sum()) for a in alive.values()) == sum(
        m.kept for m in masks.values()
    )
    back = of_parameters(alive, anatomy)
    assert back.keys() == masks.keys() and all(torch.equal(back[n].bools(), masks[n].bools()) for n in masks)


# What other operators make of masks


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_take_their_masks_along(source, tmp_path, kind):
    sparse = growth.sparsify(source(kind), tmp_path / "sparse", sparsity=0.6)
    before = Counter(tuple(mask.bools().flatten().tolist()) for mask in read(sparse).values())
    twice = growth.stack(sparse, tmp_path / "twice")
    both = Counter(tuple(mask.bools().flatten().tolist()) for mask in read(twice).values())
    assert both == before + before
    back = growth.cut(twice, tmp_path / "undone", list(range(2))) if kind == "gpt2" else None
    if back:
        assert {n: m.bools().tolist() for n, m in read(back).items()} == {
            n: m.bools().tolist() for n, m in read(sparse).items()
        }


def test_identity_blocks_and_new_tokens_and_experts_keep_what_is_dead_dead(source, tmp_path):
    sparse = growth.sparsify(source("llama"), tmp_path / "sparse", sparsity=0.6)
    masks = read(sparse)
    grown = read(growth.insert(sparse, tmp_path / "insert", after=[0]))
    assert torch.equal(
        grown["model.layers.1.mlp.up_proj.weight"].bools(), masks["model.layers.0.mlp.up_proj.weight"].bools()
    )
    assert len(grown) == len(masks) // 4 * 5
    assert read(growth.vocabulary(sparse, tmp_path / "words", size=60)).keys() == masks.keys()
    mixture = read(growth.upcycle(sparse, tmp_path / "mixture", experts=3))
    assert len(mixture) == 4 * (4 + 3 * 3)
    undone = read(growth.undo(tmp_path / "insert", tmp_path / "undone"))
    assert {n: m.bools().tolist() for n, m in undone.items()} == {n: m.bools().tolist() for n, m in masks.items()}


@pytest.mark.parametrize(
    "grow",
    [
        lambda src, dst: growth.widen(src, dst, ffn=50),
        lambda src, dst: growth.cut(src, dst, ffn=20),
        lambda src, dst: growth.cut(src, dst, layers=2, heads=3, kv_heads=3),
        lambda src, dst: growth.merge([src, src], dst),
        lambda src, dst: growth.upcycle(src, dst, noise=0.1),
        lambda src, dst: growth.stack(src, dst, how="random"),
        lambda src, dst: growth.learn(src, dst, factor=2, batches=iter(lambda: pytest.fail("it trained"), None)),
    ],
)
def test_what_would_break_a_mask_is_refused_with_what_would_work(source, tmp_path, grow):
    sparse = growth.sparsify(source("llama"), tmp_path / "sparse")
    with pytest.raises(UserError, match="growth densify"):
        grow(sparse, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


# What masks are


def test_bits_stand_from_the_lowest_of_the_first_byte(tmp_path):
    alive = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)
    assert packed(alive).tolist() == [1, 3] and torch.equal(unpacked(packed(alive), (4, 3)), alive)
    write_masks(tmp_path / FILE, {"x": Mask.of(alive)})
    with safe_open(tmp_path / FILE, "pt") as file:
        told = json.loads(file.metadata()[KEY])
        assert file.get_tensor("x").tolist() == [1, 3]
    assert told["tensors"] == {"x": {"shape": [4, 3], "kept": 3, "pattern": None}} and told["bit_order"] == "little"


def test_a_live_zero_is_alive_and_a_checkpoint_of_zeros_has_no_masks(source, tmp_path):
    """Masks are never told from zeros."""
    sparse = growth.sparsify(source("llama"), tmp_path / "sparse")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(sparse, name, lambda tensor: tensor.zero_())
    assert read(sparse)[name].kept == 492
    (sparse / FILE).unlink()
    with pytest.raises(UserError, match="nothing says which of its weights are dead"):
        read(sparse)


def revived(path):
    alive = read(path)[LIE].bools()
    rewrite(path, LIE, lambda tensor: tensor.masked_fill_(~alive & (torch.arange(48) == 5), 0.1))
    return path


def without(alive, name):
    return {other: bools for other, bools in alive.items() if other != name}


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (revived, f"weights of {LIE} are not zero although its mask says that they are dead"),
        (lambda p: masked(p, lambda a: {**a, LIE: ~a[LIE]}), f"weights of {LIE} are not zero"),
        (lambda p: masked(p, lambda a: {**without(a, LIE), "nowhere": a[LIE]}), "nowhere, which the checkpoint"),
        (lambda p: masked(p, lambda a: {**a, LIE: a[LIE].T.contiguous()}), f"{LIE} of shape [48, 41], but the tensor"),
        (lambda p: masked(p, lambda a: {**a, "model.embed_tokens.weight": torch.ones(53, 48, dtype=torch.bool)}),
         "model.embed_tokens.weight, which is tied to lm_head.weight"),
        (lambda p: masked(p, lambda a: {**a, "lm_head.weight": torch.ones(53, 48, dtype=torch.bool)}),
         "lm_head.weight, which is tied to model.embed_tokens.weight"),
        (lambda p: masked(p, lambda a: {**a, "model.norm.weight": torch.ones(48, dtype=torch.bool)}),
         "model.norm.weight, which is no matrix"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused_by_the_name_of_the_tensor(source, tmp_path, lie, words):
    sparse = growth.sparsify(source("llama", tie_word_embeddings=True), tmp_path / "sparse")
    read(sparse)
    lie(sparse)
    with pytest.raises(UserError) as refused:
        read(sparse)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: {**told, "version": 2}, "holds no masks of version 1"),
        (lambda told: {**told, "bit_order": "big"}, "holds no masks of version 1"),
        (lambda told: {**told, "tensors": []}, "holds no masks of version 1"),
        (lambda told: {**told, "tensors": {}}, "is only in its metadata, or only beside it"),
        (lambda told: with_(told, kept=3000), "which is no mask that keeps 3000"),
        (lambda told: with_(told, kept=491), f"keeps 492 weights of {LIE}, its metadata says 491"),
        (lambda told: with_(told, shape=[41, -48]), "which is no mask"),
        (lambda told: with_(told, shape="x"), "which is no mask"),
        (lambda told: with_(told, pattern="4:2"), "pattern '4:2': how many of how many"),
        (lambda told: with_(told, pattern="1:4"), f"the mask of {LIE} is not 1:4 along what is summed over"),
    ],
)
def test_a_damaged_mask_file_is_refused(source, tmp_path, change, words):
    sparse = growth.sparsify(source("llama"), tmp_path / "sparse")
    with safe_open(sparse / FILE, "pt") as file:
        told = json.loads(file.metadata()[KEY])
    bits = load_file(sparse / FILE)
    save_file(bits, sparse / FILE, metadata={"format": "pt", KEY: json.dumps(change(told))})
    with pytest.raises(UserError) as refused:
        read(sparse)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def with_(told, **facts):
    return {**told, "tensors": {**told["tensors"], LIE: {**told["tensors"][LIE], **facts}}}


def test_bits_behind_the_last_weight_are_refused(source, tmp_path):
    sparse = growth.sparsify(source("gpt2", n_embd=30, n_inner=41), tmp_path / "sparse")
    with safe_open(sparse / FILE, "pt") as file:
        told, bits = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "transformer.h.0.mlp.c_fc.weight"  # 1230 weights: 6 bits are left over
    bits[name][-1] |= 0x80
    save_file(bits, sparse / FILE, metadata=told)
    with pytest.raises(UserError, match=name):
        read(sparse)


# What is refused


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"sparsity": 1.0}, "below 1, at which nothing is left"),
        ({"sparsity": -0.1}, "a share from 0"),
        ({"sparsity": float("nan")}, "a share from 0"),
        ({"sparsity": 1e-400 + 2}, "a share from 0"),
        ({"sparsity": 0.9999}, "leaves nothing of model.layers.0"),
        ({"how": "magnitud"}, "did you mean 'magnitude'?"),
        ({"rescale": "yes"}, "one of none, sqrt_density"),
        ({"rescale": "sqrt_density", "how": "magnitude"}, "what magnitude leaves is larger"),
        ({"scope": []}, "a list of some of attention, ffn"),
        ({"scope": "ffn"}, "scope"),
        ({"scope": ["fnn"]}, "did you mean 'ffn'?"),
        ({"pattern": "4:2"}, "such as 2:4"),
        ({"pattern": "2/4"}, "such as 2:4"),
        ({"pattern": "2:4", "sparsity": 0.75}, "pattern 2:4 is a sparsity of 0.5, not 0.75"),
        ({"pattern": "2:4"}, "sums over 41 channels, which are no whole groups of the pattern 2:4"),
    ],
)
def test_what_cannot_be_is_refused_in_words_before_anything_is_written(source, tmp_path, asked, words):
    with pytest.raises(UserError) as refused:
        growth.sparsify(source("llama"), tmp_path / "dst", **asked)
    assert words in str(refused.value) and not list(tmp_path.iterdir())


def test_a_number_that_is_none_has_no_largest_weights(source, tmp_path):
    src = shutil.copytree(source("llama"), tmp_path / "src")
    rewrite(src, LIE, lambda tensor: tensor.fill_(float("nan")))
    with pytest.raises(UserError, match=f"{LIE} is not finite"):
        growth.sparsify(src, tmp_path / "dst", how="magnitude")
    assert not (tmp_path / "dst").exists()


def test_sparse_twice_and_dense_twice_are_mistakes(source, tmp_path):
    sparse = growth.sparsify(source("llama"), tmp_path / "sparse")
    with pytest.raises(UserError, match="has masks already"):
        growth.sparsify(sparse, tmp_path / "dst")
    with pytest.raises(UserError, match="dense already"):
        growth.densify(source("llama"), tmp_path / "dst")
    with pytest.raises(UsageError):
        growth.sparsify(source("llama"), tmp_path / "dst", how="n_m")


# The commands


def test_the_commands_are_the_functions_and_say_what_is_alive(source, tmp_path):
    src, dst = source("gpt2"), tmp_path / "sparse"
    done = CliRunner().invoke(
        main, ["sparsify", str(src), str(dst), "--sparsity", "0.75", "--scope", "ffn", "--seed", "5"]
    )
    assert done.exit_code == 0 and "train it" in done.output
    growth.sparsify(src, tmp_path / "by-hand", sparsity=0.75, scope=["ffn"], seed=5)
    assert (dst / FILE).read_bytes() == (tmp_path / "by-hand" / FILE).read_bytes()
    shown = CliRunner().invoke(main, ["inspect", str(dst)]).output
    assert "24.96% of 4.9 k weights in 4 tensors are alive" in shown
    told = CliRunner().invoke(main, ["masks", str(dst), "--length", "32"]).output
    assert "h.{layers}.mlp.c_fc" in told and "saves no second" in told and "modelled FLOPs" in told
    assert CliRunner().invoke(main, ["densify", str(dst), str(tmp_path / "dense")]).exit_code == 0
    assert not (tmp_path / "dense" / FILE).exists()
    wrong = CliRunner().invoke(main, ["sparsify", str(src), str(tmp_path / "x"), "--sparsity", "1.5"])
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: sparsity 1.5")


def test_inspecting_reads_headers_only_and_refuses_masks_of_another_checkpoint(source, tmp_path):
    sparse = growth.sparsify(source("gpt2"), tmp_path / "sparse")
    growth.sparsify(source("llama"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / FILE, sparse / FILE)
    with pytest.raises(UserError, match="which the checkpoint does not have"):
        growth.inspect(sparse)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_transformers_reads_a_sparse_checkpoint_as_any_other(source, tmp_path, kind):
    dst = growth.sparsify(source(kind), tmp_path / "sparse")
    assert tiny_families.logits(tiny_families.load(dst, LANGUAGE_MODELS[kind])).isfinite().all()


# Less room on the disk


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_unpacking_gives_every_byte_of_every_file_back(source, tmp_path, kind, dtype):
    src = source(kind, torch.bfloat16)
    if dtype.itemsize == 1:
        src = shutil.copytree(src, tmp_path / "src")
        eight = {name: tensor.to(dtype) for name, tensor in weights(src).items()}
        save_file(eight, src / "model.safetensors", metadata={"format": "pt"})
    sparse = growth.sparsify(src, tmp_path / "sparse", output=Output(shard_size="20KB"))
    packing.pack(sparse, tmp_path / "packed")
    back = packing.unpack(tmp_path / "packed", tmp_path / "back", output=Output(shard_size="20KB"))
    files = sorted(path.name for path in sparse.iterdir())
    assert files == sorted(path.name for path in back.iterdir())
    assert all((sparse / name).read_bytes() == (back / name).read_bytes() for name in files)
    masked = sum(mask.size for mask in read(sparse).values())
    saved = packing.stored(sparse) - packing.stored(tmp_path / "packed")
    assert saved == pytest.approx(0.75 * masked * dtype.itemsize, rel=0.1)


def test_what_is_packed_is_opened_by_nobody_else_and_says_so(source, tmp_path):
    sparse = growth.sparsify(source("gpt2"), tmp_path / "sparse")
    packed = packing.pack(sparse, tmp_path / "packed")
    with pytest.raises(UserError, match="is packed: `growth unpack`"):
        growth.open(packed)
    with pytest.raises(OSError, match="no file named"):
        tiny_families.load(packed)
    with pytest.raises(UserError, match=r"masks\.safetensors"):
        packing.pack(source("gpt2"), tmp_path / "dense")
    with pytest.raises(UserError, match=r"has neither packed\.safetensors"):
        packing.unpack(sparse, tmp_path / "x")
    shutil.copy(growth.sparsify(source("gpt2"), tmp_path / "half", sparsity=0.5) / FILE, packed / FILE)
    with pytest.raises(UserError, match=r"c_attn\.weight holds \[675\] weights, its mask keeps 1350"):
        packing.unpack(packed, tmp_path / "x")
    done = CliRunner().invoke(main, ["pack", str(sparse), str(tmp_path / "again")])
    assert done.exit_code == 0 and "kB for the" in done.output
