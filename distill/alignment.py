"""Rows of one tokeniser's ids retold for another: the second model's rows of the same text, and the spans of both.

No torch. A row is read back to text document by document, so whatever made the rows (packing, cuts inside a word or a
character) is what the other model sees too; every document starts and ends as that model's own tokeniser does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.shards import Column
from distill.spans import Writing, shared, spans

COLUMNS = {"log_likelihoods": Column("float32", ragged=True, unit="nat")}  # of a store: a row's spans, in their order


@dataclass(frozen=True)
class Told:
    """What both models read. Spans are numbered through the batch in the order of the text; -1 is none."""

    ids: np.ndarray  # [B, U] the teacher's rows
    segments: np.ndarray  # [B, U]
    student: np.ndarray  # [B, T] the span of each of the student's tokens
    teacher: np.ndarray  # [B, U]
    counts: np.ndarray  # [B] spans of each row


class Alignment:
    """A student's tokeniser and a teacher's."""

    def __init__(self, student: Any, teacher: Any):
        self.student, self.teacher = Writing(student), Writing(teacher)

    def shared(self) -> np.ndarray:
        """Ids of the pieces that both have [2, K]: the student's, the teacher's."""
        return shared(self.student, self.teacher)

    def tell(self, ids: np.ndarray, segments: np.ndarray) -> Told:
        """Rows of the student [B, T] for the teacher; document n of a row is document n of the teacher's row."""
        student, rows, counts = np.full(ids.shape, -1), [], []
        number = 0
        for row in range(len(ids)):
            told, first = [], number
            for segment in dict.fromkeys(segments[row][segments[row] > 0].tolist()):
                places = np.flatnonzero(segments[row] == segment)
                theirs, of_mine, of_theirs = self._document(ids[row, places])
                student[row, places] = np.where(of_mine < 0, -1, of_mine + number)
                told.append((theirs, np.full(len(theirs), segment), np.where(of_theirs < 0, -1, of_theirs + number)))
                number += int(of_mine.max(initial=-1)) + 1
            rows.append(
                [np.concatenate(column) for column in zip(*told, strict=True)] if told else [np.empty(0, int)] * 3
            )
            counts.append(number - first)
        pad = self.teacher.facts.pad
        ids, segments, teacher = (_stacked([row[k] for row in rows], fill) for k, fill in enumerate((pad, 0, -1)))
        return Told(ids, segments, student, teacher, np.array(counts))

    def _document(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The teacher's ids of a document, and the spans of both sides; the first token of either is not predicted."""
        text, mine = self.student.read(ids)
        theirs = self.teacher.encode(text)
        ended = len(mine.after) > 0 and any(low[1] for low, _ in mine.after)
        theirs = self.teacher.framed(theirs, len(text.encode()), end=ended)
        mine, theirs = (side.besides(np.arange(len(side.ids)) == 0) for side in (mine, theirs))
        return theirs.ids, *spans(mine, theirs)


def _stacked(rows: list[np.ndarray], fill: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
