"""Laws of merging, upcycling and resizing the vocabulary."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from test_width import EXACT, gap, source  # noqa: F401  (a fixture)
from tiny_families import CONFIGS, load, logits, save

import growth
from growth.anatomy import dissect
from growth.cli import main
from growth.errors import UsageError, UserError


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """Two models of one family and the base of both."""
    home = tmp_path_factory.mktemp("two")
    return lambda kind: [
        path if path.exists() else save(path, kind, seed=i, dtype=torch.float64)
        for i, path in enumerate(home / f"{kind}-{name}" for name in ("a", "b", "base"))
    ]


def values(path):
    checkpoint = growth.open(path)
    return {name: checkpoint.tensor(name) for name in checkpoint}


def close(a, b, tolerance=1e-12):
    a, b = values(a), values(b)
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)


# merge


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merge_is_what_its_formula_says_and_loads(two, tmp_path, kind):
    a, b, base = two(kind)
    mean = values(growth.merge([a, b], tmp_path / "mean"))
    task = values(growth.merge([a, b], tmp_path / "task", how="task", base=base, weights=[0.5, 2.0]))
    va, vb, v0 = values(a), values(b), values(base)
    for name in va:
        torch.testing.assert_close(mean[name], (va[name] + vb[name]) / 2)
        torch.testing.assert_close(task[name], v0[name] + 0.5 * (va[name] - v0[name]) + 2 * (vb[name] - v0[name]))
    assert logits(load(tmp_path / "mean")).isfinite().all()


def test_merging_a_model_with_itself_gives_it_back_in_every_way(two, tmp_path):
    a, _, base = two("llama")
    for how, more in {"linear": {}, "slerp": {}, "task": {"base": base, "weights": [0.25, 0.75]}}.items():
        assert close(growth.merge([a, a], tmp_path / how, how=how, **more), a)


def test_the_ends_of_a_slerp_are_its_sources_and_between_them_lengths_stay(two, tmp_path):
    a, b, _ = two("llama")
    assert close(growth.merge([a, b], tmp_path / "a", how="slerp", weights=[1, 0]), a)
    assert close(growth.merge([a, b], tmp_path / "b", how="slerp", weights=[0, 1]), b)
    between, one, other = (values(p) for p in (growth.merge([a, b], tmp_path / "m", how="slerp"), a, b))
    name = "model.layers.1.mlp.up_proj.weight"
    assert min(one[name].norm(), other[name].norm()) * 0.99 < between[name].norm()
    assert between[name].norm() > 1.2 * ((one[name] + other[name]) / 2).norm()


def test_lines_spares_the_first_layers_and_leaves_the_last_whole(two, tmp_path):
    a, _, base = two("llama")
    path = growth.merge([a], tmp_path / "x", how="task", base=base, lines=0.25)
    made, tuned, start = values(path), values(a), values(base)
    for layer, rise in ((0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(made[name] - start[name], rise * (tuned[name] - start[name]))
    torch.testing.assert_close(made["lm_head.weight"], tuned["lm_head.weight"])
    assert not close(path, growth.merge([a], tmp_path / "y", how="task", base=base), 1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(how="average"), UsageError, "one of linear"),
        (dict(weights=[1.0]), UsageError, "1 weights for 2"),
        (dict(how="task"), UsageError, "need the base"),
        (dict(lines=0.1), UsageError, "scales task vectors"),
    ],
)
def test_merges_that_make_no_sense_are_refused(two, tmp_path, arguments, error, said):
    with pytest.raises(error, match=said):
        growth.merge(two("llama")[:2], tmp_path / "x", **arguments)


def test_models_that_do_not_fit_are_both_named(two, tmp_path):
    a, *_ = two("llama")
    with pytest.raises(UserError, match=r"is Llama, .* is GPT-2"):
        growth.merge([a, two("gpt2")[0]], tmp_path / "x")
    with pytest.raises(UserError, match=r"ffn is 41 in .* and 50 in"):
        growth.merge([a, growth.widen(a, tmp_path / "w", ffn=50)], tmp_path / "x")


# upcycle


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("top", [1, 2])
def test_identical_experts_are_the_dense_model(source, tmp_path, kind, top):  # noqa: F811
    path = growth.upcycle(source(kind), tmp_path / "x", experts=5, top=top)
    assert gap(source(kind), path) <= EXACT and growth.inspect(path).sizes["experts"] == 5
    assert growth.verify(source(kind), path).kept


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_a_config_leaves_out_keeps_the_dense_meaning(source, tmp_path, kind):  # noqa: F811
    """The two families have other defaults: of epsilon, of the speed of rotation, of key-value heads."""
    src = save(
        tmp_path / "src", kind, dtype=torch.float64, rope_parameters={"rope_type": "default", "rope_theta": 77.0}
    )
    config = json.loads((src / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    for key in ("rms_norm_eps", "hidden_act", "max_position_embeddings"):
        del config[key]
    (src / "config.json").write_text(json.dumps(config))
    assert gap(src, growth.upcycle(src, tmp_path / "x", experts=3)) <= EXACT


def test_without_its_two_conditions_the_mixture_says_something_else(source, tmp_path):  # noqa: F811
    path = growth.upcycle(source("qwen2"), tmp_path / "x", experts=5)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "norm_topk_prob": False}))
    assert gap(source("qwen2"), path) > 0.1


def test_a_mixture_that_was_told_apart_is_called_approximate_and_a_model_gives_a_model(source, tmp_path):  # noqa: F811
    path = growth.upcycle(source("llama"), tmp_path / "x", experts=3, noise=0.1)
    assert json.loads((path / "growth.json").read_text())["preserves"] == "approximate"
    assert gap(source("llama"), path) > 1e-3
    model = growth.upcycle(load(source("llama"), dtype=torch.float64), experts=3)
    assert type(model).__name__ == "MixtralForCausalLM"
    model.save_pretrained(tmp_path / "m")
    assert close(tmp_path / "m", growth.upcycle(source("llama"), tmp_path / "y", experts=3), 0)


def test_what_cannot_be_upcycled_is_refused(source, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="GPT-2 cannot be upcycled"):
        growth.upcycle(source("gpt2"), tmp_path / "x")
    with pytest.raises(UserError, match="sets attention_bias"):
        growth.upcycle(source("llama", attention_bias=True), tmp_path / "x")
    with pytest.raises(UsageError):
        growth.upcycle(source("llama"), tmp_path / "x", experts=2, top=3)
    with pytest.raises(UserError, match="only a language model"):
        growth.upcycle(source("llama", "LlamaForSequenceClassification", pad_token_id=0), tmp_path / "x")


# vocabulary


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("how", ["mean", "normal", "multivariate"])
def test_more_tokens_leave_the_old_ones_as_they_were(source, tmp_path, kind, how):  # noqa: F811
    path = growth.vocabulary(source(kind), tmp_path / "x", size=60, how=how)
    assert gap(source(kind), path) <= EXACT
    old, new = values(source(kind)), values(path)
    for slot, name in dissect(growth.open(source(kind))).places.items():
        if slot.dims[0] == ("vocab",):
            fresh, mean = new[name][53:], old[name].mean(0)
            assert torch.equal(new[name][:53], old[name]) and (fresh[0] != fresh[1]).any() != (how == "mean")
            assert (fresh - mean).abs().max() <= {"mean": 1e-6, "normal": 9.0, "multivariate": 0.05}[how]


def aligned(path=None, seed=0):
    """Vectors of 53 old and 9 new tokens: three are old ones, one has no vector, one is an old one by another name."""
    draw = torch.Generator().manual_seed(seed)
    old = torch.randn(53, 16, generator=draw, dtype=torch.float64)
    old[[2, 11]] = 0  # without vectors: nobody's neighbours
    new = torch.cat([torch.randn(7, 16, generator=draw, dtype=torch.float64), torch.zeros(1, 16), 2 * old[20:21]])
    vectors = {"old": old, "new": new, "same": torch.tensor([5, 1, -1, -1, -1, -1, 2, -1, -1])}
    if path is not None:
        save_file(vectors, path)
    return path or vectors


def expected_rows(table, vectors, rank=None):
    """WECHSEL's and OFA's rows in float64, token by token."""
    table, old, new = (np.asarray(one, dtype=np.float64) for one in (table, vectors["old"], vectors["new"]))
    u, s, vh = np.linalg.svd(table, full_matrices=False)
    rank = rank or len(s)
    low = u[:, :rank] @ np.diag(s[:rank]) @ vh[:rank]
    rows = np.full((len(new), table.shape[1]), np.nan)  # nothing is known of what is drawn
    for i, (vector, same) in enumerate(zip(new, vectors["same"].tolist(), strict=True)):
        if same >= 0:
            rows[i] = table[same]
        elif vector.any():
            cosines = {j: vector @ o / np.linalg.norm(vector) / np.linalg.norm(o) for j, o in enumerate(old) if o.any()}
            nearest = sorted(cosines, key=cosines.get)[-10:]
            weight = np.exp(np.array([cosines[j] for j in nearest]) / 0.1)
            rows[i] = (weight / weight.sum()) @ low[nearest]
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "gpt_neox", "t5"])
@pytest.mark.parametrize(("how", "rank"), [("wechsel", None), ("ofa", 100), ("ofa", 7)])
def test_rows_are_transferred_by_aligned_vectors_in_every_table(source, tmp_path, kind, how, rank):  # noqa: F811
    path = growth.vocabulary(source(kind), tmp_path / "x", vectors=aligned(tmp_path / "v.safetensors"), how=how,
                             **({"rank": rank} if rank else {}))  # fmt: skip
    old, new, tables = values(source(kind)), values(path), 0
    for slot, name in dissect(growth.open(source(kind))).places.items():
        if slot.dims[0] == ("vocab",) and len(slot.dims) == 2:
            tables += 1
            expected = expected_rows(old[name], aligned(), rank if rank and rank < old[name].shape[1] else None)
            known = ~expected.isnan().any(1)
            assert known.tolist() == [True] * 7 + [False, True]
            torch.testing.assert_close(new[name][known], expected[known], rtol=0, atol=2e-6)  # cosines are float32's
            assert torch.equal(new[name][[0, 1, 6]], old[name][[5, 1, 2]])
            assert (new[name][7] - old[name].mean(0)).abs().max() < 6 * old[name].std(0).max()
    assert tables == {"llama": 2, "gpt_neox": 2}.get(kind, 1)
    assert load(path, dtype=torch.float64).config.vocab_size == 9


def test_the_ways_of_making_rows_are_told_apart(source, tmp_path):  # noqa: F811
    made = {how: values(growth.vocabulary(source("gpt2"), tmp_path / how, vectors=aligned(), how=how, rank=5))
            for how in ("wechsel", "ofa", "mean", "normal", "multivariate")}  # fmt: skip
    rows = [tables["transformer.wte.weight"] for tables in made.values()]
    assert all(torch.equal(row[[0, 1, 6]], rows[0][[0, 1, 6]]) for row in rows)
    assert all((a[2:6] - b[2:6]).abs().min() > 0 for i, a in enumerate(rows) for b in rows[:i])


def test_the_identity_of_a_vocabulary_is_the_model_itself_in_every_way(source, tmp_path):  # noqa: F811
    for how in ("wechsel", "ofa", "mean", "normal"):
        everything = {**aligned(), "new": aligned()["old"], "same": torch.arange(53)}
        assert close(source("gpt2"), growth.vocabulary(source("gpt2"), tmp_path / how, vectors=everything, how=how), 0)


def test_normal_rows_have_the_mean_and_the_deviation_of_the_tables_own(source, tmp_path):  # noqa: F811
    old = values(source("gpt2"))["transformer.wte.weight"]
    for how, spread in (("normal", old.std(0)), ("multivariate", 1e-5**0.5 * old.std(0))):
        path = growth.vocabulary(source("gpt2"), tmp_path / how, size=4053, how=how)
        new = values(path)["transformer.wte.weight"][53:]
        assert ((new.mean(0) - old.mean(0)).abs() < 5 * spread / 4000**0.5).all()
        assert ((new.std(0) / spread - 1).abs() < 0.1).all()
    covariance = torch.corrcoef((new - new.mean(0)).T) - torch.corrcoef(old.T)
    assert covariance.abs().max() < 0.1  # multivariate: channels go together as in the table


def test_vocabularies_that_cannot_be_are_refused(source, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="fewer than the source's 53"):
        growth.vocabulary(source("gpt2"), tmp_path / "x", size=40)
    with pytest.raises(UserError, match=r"`old` \[53, n\]"):
        growth.vocabulary(source("gpt2"), tmp_path / "x", vectors={"old": torch.zeros(9, 4), "new": torch.zeros(9, 4)})
    for asked, said in (({}, "either the size"), ({"size": 60, "how": "wechsel"}, "needs aligned vectors"),
                        ({"size": 60, "how": "magic"}, "one of mean")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            growth.vocabulary(source("gpt2"), tmp_path / "x", **asked)
    for change, said in (
        ({"same": torch.full((9,), 53)}, "0 to 52"),
        ({"new": torch.full((9, 16), torch.nan)}, "not finite"),
        ({"old": torch.zeros(53, 16)}, "every row of `old` is zero"),
    ):
        with pytest.raises(UserError, match=said):
            growth.vocabulary(source("gpt2"), tmp_path / "x", vectors={**aligned(), **change})


def test_the_commands_do_what_the_functions_do(two, tmp_path):
    a, b, base = two("llama")
    task = {"how": "task", "base": base, "weights": [0.5, 0.25], "lines": 0.1}
    for words, made in (
        (["merge", a, b, "--weights", "0.3,0.7"], lambda d: growth.merge([a, b], d, weights=[0.3, 0.7])),
        (["merge", a, b, "--how", "task", "--base", base, "--weights", "0.5,0.25", "--lines", "0.1"],
         lambda d: growth.merge([a, b], d, **task)),
        (["upcycle", a, "--experts", "3", "--top", "1"], lambda d: growth.upcycle(a, d, experts=3, top=1)),
        (["vocabulary", a, "--size", "60", "--how", "normal"],
         lambda d: growth.vocabulary(a, d, size=60, how="normal")),
        (["stack", a, "--how", "random"], lambda d: growth.stack(a, d, how="random")),
        (["widen", a, "--vocab-multiple", "64", "--head-size", "20"],
         lambda d: growth.widen(a, d, vocab=64, head_size=20)),
    ):  # fmt: skip
        name = f"{words[0]}-{len(words)}"
        paths = [*words[1 : 1 + (2 if words[0] == "merge" else 1)], tmp_path / name]
        done = CliRunner().invoke(main, [str(w) for w in (words[0], *paths, *words[len(paths) :])])
        assert done.exit_code == 0, done.output
        assert close(tmp_path / name, made(tmp_path / f"{name}-f"), 0)
