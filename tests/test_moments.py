"""A grown model with grown moments goes on as its source would have."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_width import FUSED, POST, RMS, source  # noqa: F401  (a fixture)
from tiny_families import load, logits

import growth
from growth.anatomy import dissect
from growth.cli import main
from growth.errors import UserError
from growth.verify import load as exact_load

LEARNING = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-30)  # an epsilon would have to be scaled as the gradient
KEYS = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def train(model, optimizer, steps):
    tokens = torch.arange(22).reshape(2, 11) * 5 % 50 + 2
    extra = {"decoder_input_ids": tokens.flip(0)} if model.config.is_encoder_decoder else {}
    for _ in range(steps):
        out = model(input_ids=tokens, **extra).logits.log_softmax(-1)  # [B, T, V]
        loss = -out[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def snapshot(model, optimizer, path):
    """As distill writes it."""
    path.mkdir()
    named = dict(model.named_parameters())
    files = {"master": named, **{key: {n: optimizer.state[p][key] for n, p in named.items()} for key in KEYS}}
    for key, tensors in files.items():
        mine = {f"student.{n}": t.detach().clone() for n, t in tensors.items()}
        save_file({**mine, "objective.projection": torch.ones(3)}, path / f"{key}.safetensors")
    (path / "manifest.json").write_text(json.dumps({"version": 1, "step": 5, "files": {}}))
    return path


def plain(path):
    """In float64 throughout, where transformers takes float32 for norms and routers."""
    checkpoint = growth.open(path)
    return exact_load(checkpoint, dissect(checkpoint), torch.float64)


def resumed(model, state, steps, scaled=True):
    """AdamW of a grown model that goes on from a grown snapshot."""
    rates = json.loads((state / "learning_rates.json").read_text())
    groups = [{"params": [p], "lr": LEARNING["lr"] * (rates.get(n, 1.0) if scaled else 1.0)}
              for n, p in model.named_parameters()]  # fmt: skip
    optimizer = torch.optim.Adam(groups, **LEARNING)
    files = {key: load_file(state / f"{key}.safetensors") for key in ("master", *KEYS)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(files["master"][f"student.{name}"])
            optimizer.state[p] = {"step": torch.tensor(float(steps)),
                                  **{key: files[key][f"student.{name}"].clone() for key in KEYS}}  # fmt: skip
    return optimizer


CASES = [
    ("gpt2", {"hidden": 60, "ffn": 82}),
    ("gpt_neox", {"hidden": 60, "ffn": 82}),
    ("bert", {"hidden": 60, "ffn": 82}),
    ("t5", {"hidden": 60, "ffn": 82}),
    ("llama", {"ffn": 82, "kv_heads": 6, "heads": 12, "hidden": 96}),
    ("mixtral", {"ffn": 82}),
]


@pytest.mark.parametrize(("kind", "asked"), CASES)
def test_a_widened_model_follows_the_path_of_its_source(source, tmp_path, kind, asked):  # noqa: F811
    model = plain(source(kind))
    optimizer = torch.optim.Adam(model.parameters(), **LEARNING)
    train(model, optimizer, 5)
    state = snapshot(model, optimizer, tmp_path / "state")
    model.save_pretrained(tmp_path / "trained")
    path = growth.widen(tmp_path / "trained", tmp_path / "wide", **asked, noise=0.0)
    grown = growth.moments(state, path, tmp_path / "grown")
    wide, hasty = plain(path), plain(path)
    train(wide, resumed(wide, grown, 5), 20)
    train(hasty, resumed(hasty, grown, 5, scaled=False), 20)
    train(model, optimizer, 20)
    assert (logits(wide) - logits(model)).abs().max() < 1e-10
    assert (logits(hasty) - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("how", ["copy", "zero", "random"])
def test_copied_layers_keep_their_moments_and_new_ones_have_none(source, tmp_path, how):  # noqa: F811
    model = load(source("llama"), dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), **LEARNING)
    train(model, optimizer, 2)
    state = snapshot(model, optimizer, tmp_path / "state")
    path = growth.stack(source("llama"), tmp_path / "deep", how=how)
    grown = growth.moments(state, path, tmp_path / "grown")
    old, new = load_file(state / "exp_avg.safetensors"), load_file(grown / "exp_avg.safetensors")
    name = "student.model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(new[name.format(1)], old[name.format(1)]) and torch.equal(
        new["objective.projection"], torch.ones(3)
    )
    assert torch.equal(new[name.format(5)], old[name.format(1)]) == (how == "copy")
    assert (new[name.format(5)] == 0).all() == (how != "copy")
    assert set(new) == {f"student.{n}" for n, _ in load(path).named_parameters()} | {"objective.projection"}
    assert json.loads((grown / "learning_rates.json").read_text()) == {}


def test_state_that_cannot_follow_is_refused(source, tmp_path):  # noqa: F811
    model = load(source("gpt2"), dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), **LEARNING)
    train(model, optimizer, 1)
    state = snapshot(model, optimizer, tmp_path / "state")
    with pytest.raises(UserError, match="was not made by stack"):
        growth.moments(state, source("gpt2"), tmp_path / "x")
    with pytest.raises(UserError, match="start the optimizer anew"):
        growth.moments(state, growth.widen(source("gpt2"), tmp_path / "aki", hidden=60, how="aki"), tmp_path / "x")
    with pytest.raises(UserError, match="not a snapshot"):
        growth.moments(tmp_path, growth.stack(source("gpt2"), tmp_path / "deep"), tmp_path / "x")
    with pytest.raises(UserError, match="which the source of the growth does not have"):
        growth.moments(state, growth.stack(source("llama"), tmp_path / "other"), tmp_path / "x")
    done = CliRunner().invoke(main, ["moments", str(state), str(tmp_path / "deep"), str(tmp_path / "made")])
    assert done.exit_code == 0 and "learning rates" in done.stderr


# the law that stands behind it: grown moments are those of the grown model's own gradients


def gathered(model, steps=3):
    """The moments of so many batches, with weights that stay."""
    optimizer = torch.optim.Adam(model.parameters(), **{**LEARNING, "lr": 0.0})
    train(model, optimizer, steps)
    return optimizer


LAW = [
    *((kind, {}, {"hidden": 60, "ffn": 82}) for kind in FUSED if kind not in POST),
    *((kind, {}, {"hidden": 60, "ffn": 82}) for kind in POST),
    *((kind, {}, {"hidden": 72, "ffn": 82, "kv_heads": 6, "heads": 12}) for kind in RMS),
    *((kind, {}, {"hidden": 96}) for kind in RMS),
    ("gpt_neox", {"tie_word_embeddings": True}, {"hidden": 60}),
    ("gpt2", {"tie_word_embeddings": False}, {"hidden": 60}),
    ("llama", {"tie_word_embeddings": True}, {"hidden": 72}),
    ("t5", {}, {"hidden": 45, "heads": 10, "ffn": 82}),
    ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}, {"hidden": 45}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "asked"), LAW)
def test_widened_moments_are_those_of_the_wider_models_own_gradients(source, tmp_path, kind, changes, asked):  # noqa: F811
    src = source(kind, **changes)
    path = growth.widen(src, tmp_path / "wide", **asked, noise=0.0)
    near(src, path, tmp_path)


def near(src, path, tmp_path, change=lambda model: None):
    """Grown moments against gathered ones, of every parameter of the grown model."""
    model, wide = plain(src), plain(path)
    change(wide)
    state = snapshot(model, gathered(model), tmp_path / "state")
    grown, own = growth.moments(state, path, tmp_path / "grown"), gathered(wide)
    for key in KEYS:
        made = load_file(grown / f"{key}.safetensors")
        expected = {f"student.{n}": own.state[p][key] for n, p in wide.named_parameters() if p in own.state}
        assert made.keys() - {"objective.projection"} == expected.keys()
        # the expert that says nothing yet starts without, though its last projection would have some
        for name, moment in ((n, m) for n, m in expected.items() if "shared_expert" not in n or "moe" in src.name):
            assert (made[name] - moment).abs().max() <= 1e-9 * moment.abs().max() + 1e-15, (key, name)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_moments_of_an_upcycled_model_are_its_own_where_every_expert_sees_every_token(source, tmp_path, kind):  # noqa: F811
    path = growth.upcycle(source(kind), tmp_path / "sparse", experts=4, top=4)

    def all_alike(model):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    p.zero_()

    near(source(kind), path, tmp_path, all_alike)
