"""The README tells the truth: its loop learns, and the commands it names are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_loop_runs_and_its_loss_falls():
    (loop,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    losses: list[float] = []
    told = loop.replace("    loss.backward()\n", "    loss.backward()\n    losses.append(loss.item())\n")
    assert told != loop
    exec(compile(told, "README.md", "exec"), {"losses": losses})
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]


def test_the_commands_exist():
    named = set(re.findall(r"^(distill|growth) ([a-z]+)", README, re.MULTILINE))
    assert len(named) > 6
    for program in ("distill", "growth"):
        command = [sys.executable, "-c", f"from {program}.cli import main; main()", "--help"]
        shown = subprocess.run(command, capture_output=True, text=True).stdout
        known = set(re.findall(r"^  ([a-z]+)  ", shown, re.MULTILINE))
        assert {command for name, command in named if name == program} <= known
