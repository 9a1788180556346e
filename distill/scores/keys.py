"""Rows of tokens and pairs of texts by their content, sixteen bytes each. No torch."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import numpy as np

WIDTH = 16


def row_keys(ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Of rows of token ids [B, T]: the tokens and where documents begin; padding does not count. [B, 16]"""
    return _keys(_packed(row[s > 0]) + _packed(_starts(s[s > 0])) for row, s in zip(ids, segments, strict=True))


def documents(ids: np.ndarray, segments: np.ndarray) -> list[np.ndarray]:
    """The documents of rows [B, T], in the order in which they stand; how they share rows does not matter."""
    found = []
    for row, numbers in zip(ids, segments, strict=True):
        starts = _starts(numbers)
        pieces = zip(np.split(row, starts)[1:], numbers[starts], strict=True)
        found += [piece for piece, number in pieces if number > 0]
    return found


def document_keys(documents: list[np.ndarray]) -> np.ndarray:
    """Of documents alone in their rows [N, 16]."""
    return row_keys(documents, [np.ones_like(document) for document in documents])


def pair_keys(pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    """Of pairs of texts [N, 16]."""
    encoded = ((one.encode(), other.encode()) for one, other in pairs)
    return _keys(struct.pack("<Q", len(one)) + one + other for one, other in encoded)


def _keys(contents: Iterable[bytes]) -> np.ndarray:
    found = b"".join(hashlib.blake2b(content, digest_size=WIDTH).digest() for content in contents)
    return np.frombuffer(found, np.uint8).reshape(-1, WIDTH)


def _starts(segments: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(segments, prepend=0))


def _packed(values: np.ndarray) -> bytes:
    return struct.pack("<Q", len(values)) + np.asarray(values).astype("<i8").tobytes()


class Index:
    """Where a key stands among others; of equal ones the first."""

    def __init__(self, keys: np.ndarray):
        words = _words(keys)
        self._order = np.argsort(words, kind="stable")
        self._words = words[self._order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key [N], -1 where there is none."""
        words = _words(keys)
        if not len(self._words):
            return np.full(len(words), -1)
        place = np.minimum(np.searchsorted(self._words, words), len(self._words) - 1)
        return np.where(self._words[place] == words, self._order[place], -1)


class Known:
    """Keys that were met: sixteen bytes of memory each, in sorted runs of which each is longer than the next."""

    def __init__(self):
        self._runs: list[np.ndarray] = []

    def add(self, keys: np.ndarray) -> None:
        run = np.sort(_words(keys))
        while self._runs and len(self._runs[-1]) < 2 * len(run):  # so that a key is moved a few times in all
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """[N] bool."""
        words = _words(keys)
        found = np.zeros(len(words), dtype=bool)
        for run in filter(len, self._runs):
            place = np.minimum(np.searchsorted(run, words), len(run) - 1)
            found |= run[place] == words
        return found


def _words(keys: np.ndarray) -> np.ndarray:
    """[N] strings that numpy can sort; that it drops trailing zeros hides no difference, all being equally long."""
    return np.ascontiguousarray(keys, np.uint8).reshape(-1, WIDTH).view(f"S{WIDTH}")[:, 0]
