"""Masked language modelling (Devlin et al. 2018, arXiv 1810.04805): which tokens are hidden, and behind what."""

from __future__ import annotations

import numpy as np

from distill.corpus import order

NONE = -100  # the label of a place that is not predicted, as in torch's cross-entropy
MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are


def mlm(
    ids: np.ndarray,
    maskable: np.ndarray,
    seed: int,
    epoch: int,
    sample_id: int,
    rate: float,
    *,
    mask: int,
    words: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) of one row [T]; `mask` is the mask token, `words` are the ids that random tokens are drawn from.

    A pure function of (seed, epoch, sample id).
    """
    return hide(ids, maskable, numbers(len(ids), seed, epoch, sample_id), rate, mask=mask, words=words)


def numbers(length: int, seed: int, epoch: int, sample_id: int) -> np.ndarray:
    """Two random numbers for every place [T, 2], whatever the rate: a higher one hides the same tokens and more."""
    return order.raw(2 * length, seed, order.MASK, epoch, sample_id).reshape(length, 2)


def hide(
    ids: np.ndarray, maskable: np.ndarray, numbers: np.ndarray, rate: float, *, mask: int, words: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) of rows of any leading shape."""
    first, second = numbers[..., 0], numbers[..., 1]
    chosen = maskable & (first < _share(rate))
    drawn = words[(second & 0xFFFFFFFF) * len(words) >> 32]  # the low half: the upper one decides just below
    hidden = np.where(second < _share(MASKED), mask, np.where(second < _share(MASKED + RANDOM), drawn, ids))
    return np.where(chosen, hidden, ids), np.where(chosen, ids, NONE)


def _share(probability: float) -> np.uint64:
    """The bound that a random 64-bit number stays below with this probability."""
    return np.uint64(min(int(probability * 2.0**64), 2**64 - 1))
