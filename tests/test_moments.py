"""A grown model with grown moments goes on as its source would have."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_width import source  # noqa: F401  (a fixture)
from tiny_families import load, logits

import growth
from growth.cli import main
from growth.errors import UserError

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
    ("bert", {"hidden": 60, "ffn": 82}),
    ("t5", {"hidden": 60, "ffn": 82}),
    ("llama", {"ffn": 82}),
    ("llama", {"ffn": 82, "kv_heads": 6, "heads": 12, "hidden": 96}),
]


@pytest.mark.parametrize(("kind", "asked"), CASES)
def test_a_widened_model_follows_the_path_of_its_source(source, tmp_path, kind, asked):  # noqa: F811
    model = load(source(kind), dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), **LEARNING)
    train(model, optimizer, 5)
    state = snapshot(model, optimizer, tmp_path / "state")
    model.save_pretrained(tmp_path / "trained")
    path = growth.widen(tmp_path / "trained", tmp_path / "wide", **asked, noise=0.0)
    grown = growth.moments(state, path, tmp_path / "grown")
    wide, plain = load(path, dtype=torch.float64), load(path, dtype=torch.float64)
    train(wide, resumed(wide, grown, 5), 10)
    train(plain, resumed(plain, grown, 5, scaled=False), 10)
    train(model, optimizer, 10)
    # float32 norms and rotations of transformers leave some millionths where scales are no powers of two
    near = 1e-9 if kind in ("gpt2", "bert") else 1e-3
    assert (logits(wide) - logits(model)).abs().max() < near
    assert (logits(plain) - logits(model)).abs().max() > 20 * near


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
