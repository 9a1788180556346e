"""Truncation after growth gives back the source; new layers of every kind; history and model cards."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from test_width import EXACT, FUSED, POST, RMS, gap, source  # noqa: F401  (a fixture)
from tiny_families import CONFIGS, load, logits

import growth
from growth.cli import main
from growth.errors import UsageError, UserError
from growth.maps import Layers
from growth.undo import undo


def values(path):
    checkpoint = growth.open(path)
    return {name: checkpoint.tensor(name) for name in checkpoint}


def difference(a, b):
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


WIDER = {
    **{kind: {"hidden": 60, "ffn": 57, "vocab": 64} for kind in (*FUSED, "t5")},
    **{kind: {"hidden": 72, "ffn": 57, "kv_heads": 6, "heads": 12, "head_size": 20, "vocab": 64} for kind in RMS},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_was_widened_gives_its_source_back_through_any_noise(source, tmp_path, kind):  # noqa: F811
    wide = growth.widen(source(kind), tmp_path / "wide", **WIDER[kind], noise=0.5)
    back = undo(wide, tmp_path / "back")
    assert difference(source(kind), back) <= EXACT and gap(source(kind), back) <= EXACT


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_was_made_deeper_gives_its_source_back_to_the_byte(source, tmp_path, kind):  # noqa: F811
    for name in ("stack", "interleave"):
        deep = growth.stack(source(kind), tmp_path / name, order=name, factor=3)
        assert difference(source(kind), undo(deep, tmp_path / f"{name}-back")) == 0


def test_copies_that_were_trained_apart_are_averaged(source, tmp_path):  # noqa: F811
    wide = growth.widen(load(source("llama"), dtype=torch.float64), hidden=96, noise=0.0)
    table = wide.model.embed_tokens.weight
    with torch.no_grad():
        table[:, 48:] += 2.0
    back = undo(wide)
    torch.testing.assert_close(back.model.embed_tokens.weight, table[:, :48] + 1.0)


def test_what_cannot_be_undone_is_refused(source, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="nothing to undo"):
        undo(source("llama"), tmp_path / "x")
    mixed = growth.widen(source("llama"), tmp_path / "aki", hidden=72, how="aki")
    with pytest.raises(UserError, match="nothing to undo"):
        undo(mixed, tmp_path / "x")
    with pytest.raises(UserError, match="left out some layers"):
        undo(growth.stack(source("llama"), tmp_path / "order", order=[1, 3, 3]), tmp_path / "x")


@pytest.mark.parametrize("kind", CONFIGS)
def test_new_layers_may_be_silent_or_as_a_new_model_starts(source, tmp_path, kind):  # noqa: F811
    src = source(kind)
    if kind in POST:
        with pytest.raises(UserError, match="no inserted block can be the identity"):
            growth.stack(src, tmp_path / "zero", how="zero")
    else:
        path = growth.stack(src, tmp_path / "zero", how="zero")
        assert gap(src, path) == 0 and json.loads((path / "growth.json").read_text())["preserves"] == "exact"
    path = growth.stack(src, tmp_path / "random", how="random")
    assert json.loads((path / "growth.json").read_text())["preserves"] == "no" and gap(src, path) > 1e-3
    assert difference(src, undo(path, tmp_path / "back")) == 0 and logits(load(path)).isfinite().all()
    again = growth.stack(src, tmp_path / "again", how="random")
    assert difference(path, again) == 0


def test_random_layers_are_drawn_one_by_one_with_the_deviation_of_the_config(source, tmp_path):  # noqa: F811
    made = values(growth.stack(source("llama"), tmp_path / "x", how="random"))
    up = [made[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(8)]
    assert all(abs(w.std() - 0.02) < 1e-3 for w in up[4:]) and not torch.equal(up[4], up[5])
    assert (made["model.layers.6.input_layernorm.weight"] == 1).all()
    with pytest.raises(UsageError, match="one of copy, zero, random"):
        growth.stack(source("llama"), tmp_path / "y", how="learn")


def test_maps_with_new_layers_compose():
    one = Layers.of([0, 1, 0], silent=[1], random=[2])
    two = one.then(Layers.of([2, 1, 0, 0]))
    assert two.random == {0} and two.silent == {1} and one.new == [1, 2] and two.new == [0, 1, 3]


def test_history_and_model_card_are_carried(source, tmp_path):  # noqa: F811
    src = growth.cut(source("gpt2"), tmp_path / "one", 1)
    (src / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    growth.widen(growth.stack(src, tmp_path / "two"), tmp_path / "three", ffn=50)
    steps = growth.inspect(tmp_path / "three").history
    assert [step["operator"] for step in steps] == ["widen", "stack", "cut"]
    card = (tmp_path / "three" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# A model\n") and "`growth stack`" in card
    assert "does not compute the same" in card and "computes the same" in card.rpartition("## Changed")[2]
    said = CliRunner().invoke(main, ["inspect", str(tmp_path / "three")]).output
    assert "stack of" in said and "cut of" in said and "layers [1]" in said
    done = CliRunner().invoke(main, ["cut", str(tmp_path / "three"), str(tmp_path / "back"), "--undo"])
    assert done.exit_code == 0 and difference(tmp_path / "two", tmp_path / "back") <= EXACT
