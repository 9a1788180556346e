"""A distribution over a vocabulary as its k best tokens and the mass that they leave: what a cache keeps. No torch."""

from __future__ import annotations

import numpy as np

from distill.scores.shards import Column
from growth.errors import UserError

TOLERANCE = 2e-3  # of a sum of probabilities: float16 log-probabilities are off by a thousandth


def columns(k: int, dtype: str = "float32") -> dict[str, Column]:
    """Of a store, for each scored token of a row."""
    return {
        "ids": Column("int32", (k,), ragged=True, unit="token"),
        "log_probs": Column(dtype, (k,), ragged=True, unit="nat"),
        "rest": Column(dtype, ragged=True, unit="nat"),  # a logarithm: half of a probability of 1e-7 would be gone
    }


def check(ids: np.ndarray, log_probs: np.ndarray, rest: np.ndarray, vocabulary: int) -> None:
    """Refuse what is no distribution over this vocabulary: ids and log-probabilities [N, k], that of the others [N]."""
    check_ids(ids, vocabulary)
    if (np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any():
        raise UserError("a cached distribution has a token twice")
    off = np.abs(np.exp(log_probs.astype(np.float64)).sum(-1) + np.exp(rest.astype(np.float64)) - 1)
    if not (off <= TOLERANCE).all():  # NaN is not within it
        raise UserError(f"cached probabilities do not sum to 1: off by up to {off.max():.3g}")


def check_ids(ids: np.ndarray, vocabulary: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise UserError(f"cached token ids {ids.min()} to {ids.max()}; the vocabulary ends at {vocabulary - 1}")
