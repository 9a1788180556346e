"""Writing a checkpoint: weights, config, lineage and what belongs beside them; whole or not at all."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from growth.bits import FILE, Mask, write_masks
from growth.errors import UserError
from growth.files import committed, digest, fault, write_json, write_text
from growth.ranges import inside
from growth.shards import bytes_of, write_shards

CONFIG, LINEAGE, CARD = "config.json", "growth.json", "README.md"
CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    "generation_config.json",
)


def write(
    dst: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Any]],
    *,
    shard_size: str | int = "5GB",
    lineage: Mapping[str, Any] | None = None,
    carry: str | Path | None = None,
    overwrite: bool = False,
    masks: Mapping[str, Mask] | None = None,
) -> Path:
    """A checkpoint directory from (name, tensor) pairs, as transformers would save it, masks beside its weights.

    A tensor is a torch one, or bytes at rest (`Entry`, `Fill`), or `Computed` when its turn comes. Tokenizer and
    generation files come from `carry`, which is never written to.
    """
    dst = Path(dst)
    guard(dst, [Path(carry)] if carry else [], overwrite)
    with committed(dst, overwrite=overwrite) as directory:
        write_shards(directory, tensors, bytes_of(shard_size))
        if masks:
            write_masks(directory / FILE, masks)
        write_json(directory / CONFIG, dict(config))
        if lineage is not None:
            write_json(directory / LINEAGE, {"version": 1, **lineage, "versions": versions()})
        if carry:
            _carry(Path(carry), directory)
            _carry_card(Path(carry), directory, lineage or {})
        fault("write.before_commit")
    return dst


def guard(dst: Path, sources: Iterable[Path], overwrite: bool) -> None:
    """The source is never written, and only a checkpoint is ever replaced."""
    there = dst.resolve()
    for source in (source.resolve() for source in sources):
        if there == source or source in there.parents or there in source.parents:
            raise UserError(f"{dst} and its source {source} must not lie in each other; give another path")
    if os.path.lexists(dst) and not overwrite:
        raise UserError(f"{dst} exists; give another path or --overwrite")
    if dst.is_dir() and any(dst.iterdir()) and not (dst / CONFIG).exists():
        raise UserError(f"{dst} is not a checkpoint, so it is not replaced; give another path")


def versions() -> dict[str, str]:
    return {"growth": metadata.version("distill-growth"), "python": platform.python_version()}


def lineage(operator: str, arguments: Mapping[str, Any], sources: Iterable[Any], **facts: Any) -> dict:
    """What growth.json says of a result: where it came from, through which maps, what is new, what is preserved."""
    return {"operator": operator, "arguments": dict(arguments), "sources": [_origin(s) for s in sources], **facts}


def _origin(source: Any) -> dict[str, Any]:
    return {
        "path": source.origin,
        "config_digest": digest(source.config),
        "header_digest": source.header_digest(),
        "size": source.nbytes,
    }


def _carry(source: Path, directory: Path) -> None:
    for name in CARRIED:
        if os.path.lexists(source / name):
            shutil.copyfile(inside(source, name), directory / name)


def _carry_card(source: Path, directory: Path, story: Mapping[str, Any]) -> None:
    """The source's model card, and at its end what has been done since."""
    if not os.path.lexists(source / CARD) or "preserves" not in story:
        return
    text = inside(source, CARD).read_text(encoding="utf-8", errors="replace").rstrip()
    kept = {"exact": "computes the same", "approximate": "computes nearly the same"}
    does = kept.get(story["preserves"], "does not compute the same")
    done = f"`growth {story['operator']}` made these weights of the model described above; the result {does}."
    write_text(directory / CARD, f"{text}\n\n## Changed since\n\n{done} See `{LINEAGE}`.\n")
