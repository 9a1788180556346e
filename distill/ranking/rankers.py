"""Rankers by their kind: new ones, and their directories (`encoder/`, `head.safetensors`, `ranker.json`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from distill import loading, models
from distill.ranking import export, kinds
from distill.ranking.colbert import ColBERT
from distill.ranking.cross import Classifier, CrossEncoder
from distill.ranking.dual import DualEncoder
from distill.ranking.kernels import TK
from distill.ranking.kinds import ABOUT, ENCODER, HEAD, ClassifierKind, RankerKind
from distill.ranking.prett import PreTT
from distill.ranking.ranker import Ranker
from growth import files, ranges
from growth.checkpoint import Checkpoint, refuse_not_finite
from growth.errors import UserError
from growth.pieces import Piece
from growth.shards import write_file

MODULES: dict[type[RankerKind], type[Ranker]] = {
    kinds.CrossKind: CrossEncoder,
    kinds.ClassifierKind: Classifier,
    kinds.DualKind: DualEncoder,
    kinds.ColBERTKind: ColBERT,
    kinds.PreTTKind: PreTT,
    kinds.TKKind: TK,
}


def build(kind: RankerKind, encoder: nn.Module, *, seed: int = 0) -> Ranker:
    """A ranker on an encoder (a base model of transformers), its head new from a seed; in eval mode."""
    with loading.seeded(seed):
        return MODULES[type(kind)](encoder, kind).eval()


def save(
    ranker: Ranker,
    directory: str | Path,
    *,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    story: Mapping[str, str] | None = None,
    tensors: Iterable[tuple[str, Piece]] | None = None,
) -> Path:
    """Its directory, whole or not at all; `tokenizer` is a directory whose tokenizer goes into `encoder/`.

    Its lineage goes with it; `story` is what that must say otherwise; `tensors`: of its encoder, as in `models.save`.
    With a tokenizer sentence-transformers loads the directory as well.
    """
    with files.committed(directory, overwrite=overwrite) as temporary:
        models.save(ranker.encoder, temporary / ENCODER, carry=tokenizer, story=story, tensors=tensors)
        if head := ranker.head():
            write_file(temporary / HEAD, list(head.items()))
        files.write_json(temporary / ABOUT, kinds.written(ranker.kind))
        if tokenizer:
            export.describe(ranker, temporary)
    return Path(directory)


def load(directory: str | Path, dtype: torch.dtype = torch.float32) -> Ranker:
    """The ranker of a directory that is not trusted, in eval mode; every weight is there, of its shape and finite."""
    directory = Path(directory)
    kind = kinds.read(files.read_json(directory / ABOUT), directory / ABOUT)
    head = "classify" if isinstance(kind, ClassifierKind) else None
    ranker = build(kind, loading.load(directory / ENCODER, head, dtype))
    if expected := ranker.head():
        _fill(ranker, expected, directory)
    return ranker


def _fill(ranker: Ranker, expected: dict[str, torch.Tensor], directory: Path) -> None:
    file = ranges.inside(directory, HEAD)
    found = Checkpoint(directory, {}, [file], ranges.header(file))
    if wrong := sorted(expected.keys() ^ found.keys()):
        has = "has" if wrong[0] in found else "lacks"
        raise UserError(f"{file} {has} {wrong[0]}, and this ranker is made of {', '.join(sorted(expected))}")
    for name, tensor in expected.items():
        entry = found[name]
        if entry.shape != tuple(tensor.shape) or entry.dtype not in loading.REAL:
            raise UserError(
                f"{file}: {name} is {entry.dtype} {list(entry.shape)}, {ABOUT} asks for float {list(tensor.shape)}"
            )
    refuse_not_finite(found)
    ranker.load_state_dict({name: found.tensor(name) for name in found}, strict=False)
