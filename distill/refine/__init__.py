"""What a data stage does to a corpus: operations by name. No torch."""

from __future__ import annotations

from distill.refine.cache import Cache
from distill.refine.label import Label
from distill.refine.operation import DataOp

OPS: dict[str, type[DataOp]] = {"cache": Cache, "label": Label}

__all__ = ["OPS", "DataOp"]
