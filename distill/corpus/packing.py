"""Documents into rows of one length, so that hardly any place holds padding."""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece: longest pieces first, each into the fullest row that still takes it.

    Best-fit decreasing, as in "Efficient Sequence Packing without Cross-contamination" (Krell et al. 2021,
    arXiv 2107.02027). Of rows with the same space left the last one is taken, so there is one result.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    by_space: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the space they have left
    some = 0  # bit s: there is a row with s places left
    opened = 0
    for piece in np.argsort(-lengths.astype(np.int64), kind="stable"):
        need = int(lengths[piece])
        fits = some >> need
        if fits:
            space = need + (fits & -fits).bit_length() - 1
            row = by_space[space].pop()
            some ^= (not by_space[space]) << space
        else:
            space, row, opened = room, opened, opened + 1
        rows[piece] = row
        by_space[space - need].append(row)
        some |= 1 << (space - need)
    return rows


def one_each(lengths: np.ndarray, room: int) -> np.ndarray:
    """No packing: every piece is a row."""
    return np.arange(len(lengths), dtype=np.int64)


class Layout:
    """Where each piece lies: its row, its place in it, its number among the pieces of the row."""

    def __init__(self, lengths: np.ndarray, row_of: np.ndarray, length: int):
        self.order = order = np.argsort(row_of, kind="stable")  # the piece that comes first, second ... in the rows
        self.length, self.rows = length, int(row_of.max()) + 1
        self.row_of, self.lengths = row_of[order], lengths[order]
        self.sources = (np.cumsum(lengths) - lengths)[order]  # where a piece starts among all tokens
        starts = np.cumsum(self.lengths) - self.lengths
        first = np.searchsorted(self.row_of, self.row_of)  # the first piece of the same row
        self.places = starts - starts[first]
        self.numbers = np.arange(len(lengths)) - first + 1

    def fill(self, rows: range, tokens: np.ndarray, pad: int, types: tuple) -> tuple[np.ndarray, np.ndarray]:
        """ids and segments of these rows, [rows, T] each."""
        span = slice(*np.searchsorted(self.row_of, [rows.start, rows.stop]))
        n = self.lengths[span]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        there = np.repeat(self.sources[span], n) + within
        here = np.repeat((self.row_of[span] - rows.start) * self.length + self.places[span], n) + within
        ids = np.full(len(rows) * self.length, pad, dtype=types[0])
        segments = np.zeros(len(rows) * self.length, dtype=types[1])
        ids[here], segments[here] = tokens[there], np.repeat(self.numbers[span], n)
        return ids.reshape(len(rows), self.length), segments.reshape(len(rows), self.length)
