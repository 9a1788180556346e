"""Training state on disk: pickle-free, whole or absent.

A snapshot is a directory `step-00000120` with one safetensors file for the float32 masters and one for each moment
(name -> full tensor): canonical, the same for every ZeRO stage, number of ranks and precision. A local one has a file a
rank instead, with what that rank keeps, and goes on under the same three alone: nothing is gathered, ranks write at
once. Files of the same kind lie beside (masks, a moving average of the student), and `manifest.json` says what it is of
and the digest of every file. Randomness needs no state of its own: data order, masks and dropout are functions of
(seed, step, micro-batch).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import world
from distill.changes import changes
from distill.engine import KEYS, Engine, Phases
from growth.console import say
from growth.errors import UserError
from growth.files import committed, ensure_space, fault, read_json, sha256, write_json

VERSION = 2

DTYPES = {torch.float32: ("F32", 4), torch.uint8: ("U8", 1)}

Beside = Mapping[str, Mapping[str, Tensor]]  # file -> name -> tensor, all of one of these types, the same on every rank
Shapes = Mapping[str, tuple[int, ...]]


def save(
    parent: Path,
    step: int,
    engine: Engine,
    of: dict[str, Any],
    about: dict[str, Any],
    keep: int = 1,
    beside: Beside | None = None,
    local: bool = False,
) -> Path:
    """Write `step-<step>` below `parent`; all ranks take part. Older ones go after it stands.

    `of`: what this state is of, by keys that `restore` compares; `about`: what else its manifest says. ZeRO 0 shards
    nothing, so that its snapshots are never local. Raises UserError on a full disk, with those before it intact.
    """
    final, local = parent / f"step-{step:08d}", local and engine.stage > 0
    manifest = {"version": VERSION, "step": step, **about, **_settings(engine), "local": local, "of": of}
    (_save_shards if local else _save_whole)(final, engine, manifest, beside or {})
    world.first(lambda: _retire(parent, keep))
    return final


def _settings(engine: Engine) -> dict[str, Any]:
    return {"stage": engine.stage, "ranks": world.size(), "precision": engine.precision}


def _save_whole(final: Path, engine: Engine, manifest: dict, beside: Beside) -> None:
    """Rank 0 writes what all ranks gather, one tensor at a time."""
    stream, failure = (tensor for key in KEYS for _, tensor in engine.state(key)), None
    if world.rank() == 0:
        try:
            _write_whole(final, engine.shapes(), stream, manifest, beside)
        except BaseException as error:
            failure = error
    for _ in stream:  # gathers are collective: the other ranks, and a rank 0 whose disk is full, go through them all
        pass
    world.raise_together(failure)


def _write_whole(final: Path, shapes: Shapes, stream: Iterator[Tensor], manifest: dict, beside: Beside) -> None:
    with _unfinished(final, shapes, manifest, beside) as (directory, facts):
        for file in _names(KEYS):
            facts[file] = _write_file(directory / file, shapes, (next(stream) for _ in shapes))
            fault("snapshot.after_file")


def _save_shards(final: Path, engine: Engine, manifest: dict, beside: Beside) -> None:
    """Every rank writes what it keeps."""
    with ExitStack() as held:
        begun = world.first(lambda: held.enter_context(_unfinished(final, engine.shapes(), manifest, beside)))
        directory, facts = world.told(begun)
        failure = mine = None
        try:
            shard = dict(engine.shard())
            mine = _write_file(directory / _of_rank(world.rank()), _shapes(shard), shard.values())
            fault("snapshot.after_file")
        except BaseException as error:
            failure = error
        world.raise_together(failure)
        facts.update({_of_rank(rank): its for rank, its in enumerate(world.gathered(mine))})
        world.first(held.close)


@contextmanager
def _unfinished(final: Path, shapes: Shapes, manifest: dict, beside: Beside) -> Iterator[tuple[Path, dict]]:
    """A directory that becomes the snapshot `final`, and the facts of the files that the block writes into it."""
    facts: dict[str, dict] = {}
    ensure_space(final.parent, state_bytes(shapes, *map(_shapes, beside.values())), "a snapshot")
    with committed(final, overwrite=True) as directory:
        yield directory, facts
        for file, named in zip(_names(beside), beside.values(), strict=True):
            (dtype,) = {tensor.dtype for tensor in named.values()}
            facts[file] = _write_file(directory / file, _shapes(named), named.values(), dtype)
        fault("snapshot.before_manifest")
        write_json(directory / "manifest.json", {**manifest, "files": facts})


def _names(files: Iterable[str]) -> list[str]:
    return [f"{file}.safetensors" for file in files]


def _of_rank(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _shapes(named: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


def state_bytes(shapes: Shapes, *beside: Shapes) -> int:
    """Bytes of one snapshot: float32 master and two moments, and what is beside them (bits count too much)."""
    every = [*shapes.values()] * len(KEYS) + [shape for file in beside for shape in file.values()]
    return 4 * sum(map(prod, every))


def _write_file(path: Path, shapes: Shapes, tensors: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> dict:
    """A safetensors file written one tensor at a time, so that no more than one is ever held; returns its facts."""
    (code, width), header, end = DTYPES[dtype], {}, 0
    for name, shape in shapes.items():
        start, end = end, end + width * prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written = hashlib.sha256()
    try:
        with open(path, "wb") as file:
            for block in _blocks(struct.pack("<Q", len(text)) + text, tensors):
                file.write(block)
                written.update(block)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write does not know its file
        raise
    return {"size": path.stat().st_size, "sha256": written.hexdigest()}


def _blocks(head: bytes, tensors: Iterable[Tensor]) -> Iterator:
    yield head
    for tensor in tensors:
        yield tensor.detach().cpu().reshape(-1).numpy()


def _retire(parent: Path, keep: int) -> None:
    for old in sorted(parent.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)


def latest(parent: Path) -> Path | None:
    """The newest snapshot, verified file by file by the first rank; None if there is none at all. Collective.

    A damaged newest one is an error and never a fresh start: the user says which to remove.
    """
    found = sorted(parent.glob("step-????????"))
    if found:
        world.first(lambda: verify(found[-1]))
    return found[-1] if found else None


def verify(snapshot: Path) -> dict:
    """The manifest of a snapshot whose files are what it says. Raises UserError naming the bad file."""
    manifest = read_json(snapshot / "manifest.json")
    for name, facts in manifest["files"].items():
        path = snapshot / name
        if not path.is_file() or {"size": path.stat().st_size, "sha256": sha256(path)} != facts:
            raise UserError(
                f"{path} is missing or damaged; remove {snapshot} to go on from the one before it, or from the start"
            )
    return manifest


def restore(
    snapshot: Path,
    engine: Engine,
    of: dict[str, Any],
    updates: Callable[[int, Phases], int] = lambda steps, phases: steps,
    accept: bool = False,
) -> dict[str, Any]:
    """Put a verified snapshot into the engine; returns its manifest. All ranks read the files, tensor by tensor.

    `updates` says how many of so many steps updated the parameters of these phases.

    Raises UserError with every difference when the snapshot is of another recipe, model, tokenizer or corpus; with
    `accept` it is added to `overridden` of the manifest instead.
    """
    manifest = read_json(snapshot / "manifest.json")
    if manifest["version"] != VERSION:
        raise UserError(f"{snapshot} was written by another version of this program, and goes on there alone")
    changed = changes(manifest["of"], of)
    if changed and not accept:
        listed = "\n  ".join([f"{snapshot} is of something else; changed since:", *changed])
        raise UserError(f"{listed}\nundo that, or go on all the same, which will be recorded, with --accept-changes")
    (_load_shard if manifest["local"] else _load_whole)(snapshot, engine, manifest, partial(updates, manifest["step"]))
    say(f"resumed from {snapshot}")
    new = [{"step": manifest["step"], "changes": changed}] if changed else []
    return {**manifest, "overridden": manifest.get("overridden", []) + new}


def _load_whole(snapshot: Path, engine: Engine, manifest: dict, updates: Callable[[Phases], int]) -> None:
    from safetensors import safe_open

    files = {key: safe_open(snapshot / file, "pt") for key, file in zip(KEYS, _names(KEYS), strict=True)}
    stored = {name: tuple(files["master"].get_slice(name).get_shape()) for name in files["master"].keys()}  # noqa: SIM118
    if wrong := changes(stored, engine.shapes()):
        raise UserError("\n  ".join([f"{snapshot} is of a student that trains other parameters:", *wrong]))
    engine.load_state(lambda name, key: files[key].get_tensor(name), updates)


def _load_shard(snapshot: Path, engine: Engine, manifest: dict, updates: Callable[[Phases], int]) -> None:
    from safetensors import safe_open

    settings = _settings(engine)
    if wrong := changes({key: manifest[key] for key in settings}, settings):
        raise UserError(
            f"{snapshot} was written with `local: true` and goes on under the same engine alone, this one differs: "
            f"{', '.join(wrong)}; give it engine.zero={manifest['stage']} engine.precision={manifest['precision']} "
            f"and --ranks {manifest['ranks']}. Snapshots with `local: false` go on anywhere"
        )
    engine.load_shard(safe_open(snapshot / _of_rank(world.rank()), "pt").get_tensor, updates)


def beside(snapshot: Path, file: str) -> dict[str, Tensor]:
    """What stands in one of the files beside the state."""
    from safetensors.torch import load_file

    path = snapshot / f"{file}.safetensors"
    if not path.is_file():
        raise UserError(f"{snapshot} has no {path.name}, without which this run cannot go on")
    return load_file(path)
