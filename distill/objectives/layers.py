"""Which layer of a model an objective reads, as recipes say it. No torch."""

from __future__ import annotations

from typing import Literal

Layer = int | Literal["last"]


def number(layer: Layer) -> int:
    return -1 if layer == "last" else layer


def mistakes(key: str, layer: Layer, facts) -> list[str]:
    if layer == "last" or -facts.layers <= layer < facts.layers:
        return []
    return [f"{key}={layer}: the {facts.family} has {facts.layers} layers, 0 to {facts.layers - 1}"]
