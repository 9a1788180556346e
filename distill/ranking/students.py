"""A ranker that is to learn: how it starts, and how what was trained becomes a directory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from distill import loading, models, sources
from distill.corpus import tokens
from distill.ranking import rankers
from distill.ranking.joining import fitted
from distill.ranking.kinds import ENCODER, ClassifierKind, RankerKind
from distill.ranking.opening import form_of, loaded
from distill.ranking.ranker import ENCODER as INSIDE
from distill.ranking.ranker import Ranker
from growth.errors import UserError


def begin(student, context, start: Path, seed: int) -> Path:
    """The student before its first step, as the directory of a ranker, its tokenizer with it.

    `from` without `ranker` is one that scores already, head and all; a cut or growth of such a one keeps the head.
    """
    if student.from_ and not student.ranker:
        found = form_of(context, student.from_)
        return rankers.save(loaded(found), start, tokenizer=found.encoder)
    kept = None if student.ranker else form_of(context, student.origin)
    head = "classify" if kept and isinstance(kept.kind, ClassifierKind) else None
    scratch = Path(start).with_name(f"{Path(start).name}.encoder")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        models.seed_checkpoint(student, lambda name: sources.encoder(context.model(name)), scratch, head, seed)
        if student.new:
            models.carry_tokenizer(sources.encoder(context.model(student.new.like)), scratch)
        kind: RankerKind = kept.kind if kept else fitted(student.ranker.kind, tokens.load(scratch))
        ranker = rankers.build(kind, loading.load(scratch, head), seed=seed)
        if kept:
            _fill(ranker, loaded(kept), student.origin)
        return rankers.save(ranker, start, tokenizer=scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(ranker: Ranker, origin: Ranker, name: str) -> None:
    """The head of the ranker that its encoder was cut from."""
    head = origin.head()
    if {n: x.shape for n, x in head.items()} != {n: x.shape for n, x in ranker.head().items()}:
        raise UserError(f"the head of {name} is for another width; name `ranker` of the student, and it starts anew")
    ranker.load_state_dict(head, strict=False)


def export(start: Path, trained: Mapping[str, models.Make], dst: Path) -> Path:
    """What was trained, by parameter name; everything else as it was at the start, the tokenizer too."""
    ranker = rankers.load(start)
    encoder = {name.removeprefix(INSIDE): make for name, make in trained.items() if name.startswith(INSIDE)}
    head = {name: make() for name, make in trained.items() if not name.startswith(INSIDE)}
    ranker.load_state_dict(head, strict=False)
    tensors = models.trained_pieces(ranker.encoder, encoder)
    story = {"preserves": "no"}
    return rankers.save(ranker, dst, tokenizer=start / ENCODER, overwrite=True, story=story, tensors=tensors)
