"""How the code is cut: which way imports run, what costs nothing to import, what the public surface is."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import click
import pytest

import distill
import growth

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("distill", "growth")
    for path in (ROOT / package).rglob("*.py")
}
WALLS = {"deepspeed": {"distill.engine"}}  # giant -> the only modules that import it
LIGHT = ["growth.cli", "distill.cli", "distill.recipe", "distill.objectives", "distill.evaluate", "distill.stages"]


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that a file names in an import, inside functions too."""
    tree, named = ast.parse(FILES[module].read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not _for_types(tree, node):
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(named)


def _for_types(tree: ast.Module, node: ast.ImportFrom) -> bool:
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return any(node in guard.body for guard in guards)


def test_every_directory_of_modules_is_a_package():
    """`find:` installs nothing else."""
    assert not [path for path in FILES.values() if not (path.parent / "__init__.py").is_file()]


def test_growth_does_not_know_distill():
    assert not [m for m in FILES if m.startswith("growth") and any(n.startswith("distill") for n in imports(m))]


def test_giants_stay_behind_their_walls():
    for giant, walls in WALLS.items():
        assert {m for m in FILES if any(n.split(".")[0] == giant for n in imports(m))} == walls


def test_no_module_needs_itself():
    """Imports run one way, the late ones inside functions too; a package's front door is free to collect."""
    doors = {m for m, path in FILES.items() if path.name == "__init__.py"}
    graph = {m: (imports(m) & FILES.keys()) - doors for m in FILES if m not in doors}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


@pytest.mark.parametrize("module", LIGHT)
def test_what_a_command_needs_before_it_works_brings_no_torch(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_public_surface_grows_by_decision():
    from growth.cli import main

    assert set(distill.NAMES) == {"tap", "trace", "Tap"}
    assert set(growth.__all__) >= {"open", "write", "cut", "stack", "insert", "widen", "verify", "inspect", "plan"}
    options = {
        name: {o for p in command.params if isinstance(p, click.Option) for o in p.opts if len(o) > 2}
        for name, command in main.commands.items()
    }
    assert options["cut"] >= {"--layers"} and options["stack"] >= {"--factor", "--order"}
