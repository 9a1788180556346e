"""Rows of one tokeniser's ids retold for another: the second model's rows of the same text, and the spans of both.

No torch. A row is read back to text document by document, so whatever made the rows (packing, cuts inside a word or a
character) is what the other model sees too; every document starts and ends as that model's own tokeniser does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from distill.teachers.spans import Writing, shared, spans

NONE = -1  # no span


@dataclass(frozen=True)
class Told:
    """What both models read. Spans are numbered through the batch in the order of the text; -1 is none."""

    ids: np.ndarray  # [B, U] the teacher's rows
    segments: np.ndarray  # [B, U]
    student: np.ndarray  # [B, T] the span of each of the student's tokens
    teacher: np.ndarray  # [B, U]
    counts: np.ndarray  # [B] spans of each row


class Alignment:
    """A student's tokeniser and a teacher's; the teacher reads no row longer than `longest`."""

    def __init__(self, student: Any, teacher: Any, longest: int | None = None):
        self.student, self.teacher, self.longest = Writing(student), Writing(teacher), longest

    @cached_property
    def shared(self) -> np.ndarray:
        """Ids of the pieces that both have [2, K]: the student's, the teacher's."""
        return shared(self.student, self.teacher)

    def tell(self, ids: np.ndarray, segments: np.ndarray) -> Told:
        """Rows of the student [B, T] for the teacher; document n of a row is document n of the teacher's row."""
        rows = [self._row(*row) for row in zip(ids, segments, strict=True)]
        counts = np.array([1 + student.max(initial=-1) for student, *_ in rows])
        starts = np.cumsum(counts) - counts
        return Told(
            ids=_stacked([row[1] for row in rows], self.teacher.facts.pad),
            segments=_stacked([row[2] for row in rows], 0),
            student=_stacked([_from(n, row[0]) for n, row in zip(starts, rows, strict=True)], NONE),
            teacher=_stacked([_from(n, row[3]) for n, row in zip(starts, rows, strict=True)], NONE),
            counts=counts,
        )

    def _row(self, ids: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, ...]:
        """The student's spans [T]; the teacher's ids, segments and spans [U]."""
        student, told, number = np.full(len(ids), NONE), [(np.empty(0, np.int64),) * 3], 0
        for segment in dict.fromkeys(segments[segments > 0].tolist()):
            places = segments == segment
            theirs, of_mine, of_theirs = self._document(ids[places])
            student[places] = _from(number, of_mine)
            told.append((theirs, np.full_like(theirs, segment), _from(number, of_theirs)))
            number += 1 + of_mine.max(initial=-1)
        return self._cut(student, *map(np.concatenate, zip(*told, strict=True)))

    def _cut(self, student: np.ndarray, ids: np.ndarray, segments: np.ndarray, teacher: np.ndarray):
        """Without what the teacher has no place for, and without the span that is cut in two."""
        beyond = teacher[self.longest :] if self.longest else teacher[:0]
        first = min(beyond[beyond != NONE], default=len(student))
        student, teacher = (np.where(side < first, side, NONE) for side in (student, teacher))
        return student, *(side[: self.longest] for side in (ids, segments, teacher))

    def _document(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The teacher's ids of a document, and the spans of both sides; the first token of either is not predicted."""
        text, mine = self.student.read(ids)
        theirs = self.teacher.encode(text)
        ended = len(mine.after) > 0 and any(low[1] for low, _ in mine.after)
        theirs = self.teacher.framed(theirs, len(text.encode()), end=ended)
        mine, theirs = (side.besides(np.arange(len(side.ids)) == 0) for side in (mine, theirs))
        return theirs.ids, *spans(mine, theirs)


def _from(number: int, spans: np.ndarray) -> np.ndarray:
    return np.where(spans == NONE, NONE, spans + number)


def _stacked(rows: list[np.ndarray], fill: int) -> np.ndarray:
    longest = max([1, *map(len, rows)])  # a model reads something, even where there is no text
    out = np.full((len(rows), longest), fill, dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
