"""Documents into rows of one length, so that hardly any place holds padding."""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each piece: longest pieces first, each into the fullest row that still takes it.

    Best-fit decreasing, as in "Efficient Sequence Packing without Cross-contamination" (Krell et al. 2021,
    arXiv 2107.02027). Rows with the same space left are taken last opened first, so the result is one.
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
