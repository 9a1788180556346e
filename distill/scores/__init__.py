"""What models said about rows and pairs of texts, on disk. No torch."""

from __future__ import annotations

from distill.scores.keys import pair_keys, row_keys
from distill.scores.shards import Column, Ragged
from distill.scores.store import About, Reader, Writer, forecast, seal

__all__ = ["About", "Column", "Ragged", "Reader", "Writer", "forecast", "pair_keys", "row_keys", "seal"]
