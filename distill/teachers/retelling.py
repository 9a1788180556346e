"""A batch retold for teachers of other tokenisers: what they read, and which spans of text are on both sides.

{target}.ids and .segments [B, U] are the teacher's rows, .spans [B, T] and .teacher_spans [B, U] the number of each
token's span (-1: of none), .shared [1, 2, K] the ids of the pieces that both have.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distill.teachers.alignment import Alignment


def retold(batch: dict, alignments: Mapping[str, Alignment]) -> dict:
    """The batch with the rows of these targets."""
    told = (_of_target(name, alignment, batch) for name, alignment in alignments.items())
    return {key: value for part in (batch, *told) for key, value in part.items()}


def _of_target(name: str, alignment: Alignment, batch: dict) -> dict[str, torch.Tensor]:
    found = alignment.tell(batch["input_ids"].numpy(), batch["segment_ids"].numpy())
    columns = {"ids": found.ids, "segments": found.segments, "spans": found.student, "teacher_spans": found.teacher}
    columns["shared"] = alignment.shared[None]
    return {f"{name}.{key}": torch.from_numpy(values) for key, values in columns.items()}


def own_rows(batch: dict, name: str) -> dict:
    """What that teacher reads; it predicts every token that has one before it."""
    ids = batch[f"{name}.ids"]
    return {"input_ids": ids, "segment_ids": batch[f"{name}.segments"], "labels": ids}
