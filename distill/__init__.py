"""Models in motion: teachers, students, objectives, runs. Importing it costs nothing; torch comes with first use."""

from __future__ import annotations

from importlib import import_module

# name -> the module that brings torch with it
NAMES = {"tap": "taps", "trace": "taps", "Tap": "taps"}

__all__ = ["NAMES", *NAMES]


def __getattr__(name: str):
    if name not in NAMES:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(import_module(f"distill.{NAMES[name]}"), name)
