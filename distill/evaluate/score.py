"""A number and how far it may be off."""

from __future__ import annotations

from typing import NamedTuple


class Score(NamedTuple):
    value: float
    error: float | None = None  # standard error over the test items; None where nothing was sampled
