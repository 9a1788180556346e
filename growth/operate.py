"""What every operator shares: a source on disk or in memory, and a result of the same sort."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth.bits import FILE, Mask
from growth.checkpoint import Checkpoint, open
from growth.errors import UsageError, UserError
from growth.files import ensure_space
from growth.masks import is_sparse
from growth.pieces import Piece, made
from growth.writer import guard, lineage, write


@dataclass(frozen=True)
class Output:
    """How a result is written."""

    shard_size: str | int = "5GB"
    check: bool = False  # read all values of the source first, refuse NaN and infinity
    overwrite: bool = False  # replace a checkpoint that stands there


PLAIN = Output()


def in_memory(source: Any) -> bool:
    """Whether an operator was given a model instead of a path."""
    return not isinstance(source, (str, os.PathLike))


def seen(source: Any) -> Checkpoint:
    """A directory or a model, as one mapping."""
    if not in_memory(source):
        return open(source)
    from growth.memory import Memory

    return Memory(source)


def opened(source: Any, dst: str | Path | None, output: Output) -> Checkpoint:
    """The source of an operator, once it is sure that the result can be put where it is to go."""
    if in_memory(source) != (dst is None):
        raise UsageError("a model in memory gives a model: no path is wanted" if dst else "say where to write")
    if dst is not None:
        guard(Path(dst), [Path(source)], output.overwrite)
    checkpoint = seen(source)
    if output.check:
        checkpoint.check_values()
    return checkpoint


@dataclass(frozen=True)
class Result:
    """What an operator makes of its sources, before it is anywhere."""

    operator: str
    arguments: Mapping[str, Any]
    config: Mapping[str, Any]
    pieces: Iterable[tuple[str, Piece]]
    facts: Mapping[str, Any]  # maps, new, preserves
    carry: bool = True  # whether the tokenizer of the source still fits
    masks: Mapping[str, Mask] | None = None  # of its weights; None: the operator does not know any


class Staged(Mapping[str, Piece]):
    """A result as the source of the next step; nothing is written between the two."""

    def __init__(self, config: Mapping[str, Any], pieces: Mapping[str, Piece], path: Any):
        self.config, self.path, self._pieces = config, path, pieces

    @classmethod
    def of(cls, result: Result, source: Checkpoint) -> Staged:
        return cls(result.config, dict(result.pieces), source.path)

    def __getitem__(self, name: str) -> Piece:
        return self._pieces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def tensor(self, name: str):
        return made(self[name])


def delivered(result: Result, dst: str | Path | None, output: Output, *sources: Checkpoint):
    """The result as a directory, or as a model of its own with the lineage in `model.growth`."""
    if result.masks is None:
        refuse_masks(result.operator, sources)
    story = lineage(result.operator, result.arguments, sources, **result.facts)
    pieces, masks = list(result.pieces), dict(result.masks or {})
    if dst is None:
        model = sources[0].rebuilt(result.config, pieces, _kind(result.config, sources[0]))
        model.growth = story
        model.masks = masks if model.device.type == "meta" else {name: mask.settled() for name, mask in masks.items()}
        return model
    ensure_space(Path(dst), sum(piece.nbytes for _, piece in pieces), f"{result.operator} into {dst}")
    carry = sources[0].path if result.carry else None
    return write(
        *(dst, result.config, pieces),
        **dict(shard_size=output.shard_size, lineage=story, carry=carry, overwrite=output.overwrite, masks=masks),
    )


def refuse_masks(operator: str, sources: Iterable[Any]) -> None:
    """Of an operator that knows none: it would bring dead weights to life in silence."""
    sparse = next((source.path for source in sources if is_sparse(source)), None)
    if sparse is not None:
        raise UserError(
            f"{sparse} is sparse, and its masks do not fit what {operator} makes: `growth densify` drops {FILE}"
        )


def _kind(config: Mapping[str, Any], source: Any) -> type | None:
    """The class of the result where it is another than the source's (a mixture of experts)."""
    if config["architectures"] == source.config["architectures"]:
        return None
    import transformers

    return getattr(transformers, config["architectures"][0])
