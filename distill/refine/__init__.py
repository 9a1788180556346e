"""What a data stage does to a corpus: operations by name. No torch."""

from __future__ import annotations

from distill.refine.operation import DataOp

OPS: dict[str, type[DataOp]] = {}

__all__ = ["OPS", "DataOp"]
