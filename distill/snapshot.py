"""Training state on disk: canonical, pickle-free, whole or absent, the same for every ZeRO stage and number of ranks.

A snapshot is a directory `step-00000120` with one safetensors file for the float32 masters and one for each moment
(name -> full tensor), files of the same kind beside them (a moving average of the student), and `manifest.json` with
what it belongs to and the digest of every file. Randomness needs no state of its own: data order, masks and dropout
are functions of (seed, step, rank).
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distill import world
from distill.engine import KEYS, Engine, Phases
from growth.console import say
from growth.errors import UserError
from growth.files import committed, ensure_space, fault, read_json, sha256, write_json

VERSION = 1

DTYPES = {torch.float32: ("F32", 4), torch.uint8: ("U8", 1)}

Beside = Mapping[str, Mapping[str, Tensor]]  # file -> name -> tensor, all of one of these types, the same on every rank


def save(
    parent: Path, step: int, engine: Engine, belongs: dict, cursor: dict, keep: int = 1, beside: Beside | None = None
) -> Path:
    """Write `step-<step>` below `parent`; all ranks take part, rank 0 writes. Older ones go after it stands.

    `belongs` says what this state is of (digests of recipe, student, teachers, tokenizer, corpus); `cursor` where the
    data stream goes on. Raises UserError on a full disk, with the snapshots before it intact.
    """
    final = parent / f"step-{step:08d}"
    stream = ((key, name, tensor) for key in KEYS for name, tensor in engine.state(key))
    failure = None
    if world.rank() == 0:
        try:
            manifest = {"version": VERSION, "step": step, "cursor": cursor, **belongs}
            _write(final, stream, engine.shapes(), beside or {}, manifest)
        except BaseException as error:
            failure = error
    for (
        _
    ) in stream:  # the gathers are collective: the other ranks, and a rank 0 whose disk is full, go through them all
        pass
    world.raise_together(failure)
    world.first(lambda: _retire(parent, keep))
    return final


def _write(final: Path, stream: Iterator, shapes: dict, beside: Beside, manifest: dict) -> None:
    others = {file: {name: tuple(tensor.shape) for name, tensor in named.items()} for file, named in beside.items()}
    ensure_space(final.parent, state_bytes(shapes, *others.values()), "a snapshot")
    with committed(final, overwrite=True) as directory:
        for key in KEYS:
            _write_file(directory / f"{key}.safetensors", shapes, (next(stream)[2] for _ in shapes))
            fault("snapshot.after_file")
        for file, named in beside.items():
            (dtype,) = {tensor.dtype for tensor in named.values()}
            tensors = (tensor.cpu() for tensor in named.values())
            _write_file(directory / f"{file}.safetensors", others[file], tensors, dtype)
        files = {f"{key}.safetensors": _facts(directory / f"{key}.safetensors") for key in (*KEYS, *beside)}
        fault("snapshot.before_manifest")
        write_json(directory / "manifest.json", {**manifest, "files": files})


def state_bytes(shapes: dict, *beside: dict) -> int:
    """Bytes of one snapshot: float32 master and two moments, and what is beside them (bits count too much)."""
    every = [*shapes.values()] * len(KEYS) + [shape for file in beside for shape in file.values()]
    return 4 * sum(map(_numel, every))


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n


def _write_file(path: Path, shapes: dict, tensors: Iterator[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """A safetensors file written one tensor at a time, so that rank 0 never holds more than one."""
    (code, width), header, end = DTYPES[dtype], {}, 0
    for name, shape in shapes.items():
        start, end = end, end + width * _numel(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.contiguous().numpy().tobytes())


def _facts(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _retire(parent: Path, keep: int) -> None:
    for old in sorted(parent.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)


def latest(parent: Path) -> Path | None:
    """The newest snapshot, verified file by file; None if there is none at all.

    A damaged newest one is an error and never a fresh start: the user says which to remove.
    """
    found = sorted(parent.glob("step-????????"))
    if found:
        verify(found[-1])
    return found[-1] if found else None


def verify(snapshot: Path) -> dict:
    """The manifest of a snapshot whose files are what it says. Raises UserError naming the bad file."""
    manifest = read_json(snapshot / "manifest.json")
    for name, facts in manifest["files"].items():
        path = snapshot / name
        if not path.is_file() or _facts(path) != facts:
            raise UserError(
                f"{path} is missing or damaged; remove {snapshot} to go on from the one before it, or from the start"
            )
    return manifest


def restore(
    snapshot: Path, engine: Engine, belongs: dict, updates: Callable[[int, Phases], int] = lambda steps, phases: steps
) -> dict:
    """Put a verified snapshot into the engine; returns its manifest. All ranks read the files.

    `updates` says how many of so many steps updated the parameters of these phases.

    Raises UserError with every difference when the snapshot belongs to another recipe, model, tokenizer or corpus.
    """
    from safetensors import safe_open

    manifest = read_json(snapshot / "manifest.json")
    _compare(snapshot, manifest, belongs)
    files = {key: safe_open(snapshot / f"{key}.safetensors", "pt") for key in KEYS}
    engine.load_state(lambda name, key: files[key].get_tensor(name), partial(updates, manifest["step"]))
    say(f"resumed from {snapshot}")
    return manifest


def beside(snapshot: Path, file: str) -> dict[str, Tensor]:
    """What stands in one of the files beside the state."""
    from safetensors.torch import load_file

    path = snapshot / f"{file}.safetensors"
    if not path.is_file():
        raise UserError(f"{snapshot} has no {path.name}, without which this run cannot go on")
    return load_file(path)


def _compare(snapshot: Path, manifest: dict, belongs: dict) -> None:
    other = [
        f"{key} was {manifest.get(key)!r}, is {value!r}"
        for key, value in belongs.items()
        if key not in ("stage", "ranks", "precision") and manifest.get(key) != value
    ]
    if other:
        raise UserError(f"{snapshot} belongs to another run: " + "; ".join(other))
