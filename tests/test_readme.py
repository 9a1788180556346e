"""The README tells the truth: its loop learns, and the commands it names are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


LOOP, TRAINER, DIVERGENCE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loop_runs_and_its_loss_falls():
    losses: list[float] = []
    told = LOOP.replace("    loss.backward()\n", "    loss.backward()\n    losses.append(loss.item())\n")
    assert told != LOOP
    exec(compile(told, "README.md", "exec"), {"losses": losses})
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]


def test_a_trainer_learns_by_the_same_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(LOOP.partition("for step in")[0] + TRAINER, "README.md", "exec"), names)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 24 and losses[-1] < 0.9 * losses[0]


def test_the_divergence_of_hidden_states_is_that_of_their_logits():
    names: dict = {}
    exec(compile(DIVERGENCE, "README.md", "exec"), names)
    hidden, taught = names["hidden"], names["taught"]
    logits = [names[head](x) for head, x in (("head", hidden), ("its_head", taught))]
    plain = names["divergence"](*logits, "jsd", beta=0.5, temperature=2.0)
    assert abs(float(plain.detach() - names["loss"].detach())) < 1e-6 and hidden.grad.abs().sum() > 0


def test_the_commands_exist():
    named = set(re.findall(r"^(distill|growth) ([a-z]+)", README, re.MULTILINE))
    assert len(named) > 6
    for program in ("distill", "growth"):
        command = [sys.executable, "-c", f"from {program}.cli import main; main()", "--help"]
        shown = subprocess.run(command, capture_output=True, text=True).stdout
        known = set(re.findall(r"^  ([a-z]+)  ", shown, re.MULTILINE))
        assert {command for name, command in named if name == program} <= known
