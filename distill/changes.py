"""What is not as it was, key by key in the words of a recipe. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def flat(spec: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of a part of a recipe."""
    return dict(_flat(spec))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield prefix, value
        return
    for key, below in items:
        yield from _flat(below, f"{prefix}.{key}" if prefix else str(key))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`stop.steps 200 -> 300` for every key whose value is not the same."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key} {_brief(old, key)} -> {_brief(new, key)}" for key in keys]


def in_short(changed: list[str]) -> str:
    """The first of them in a line."""
    return ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def _brief(values: Mapping[str, Any], key: str) -> str:
    text = str(values.get(key, "nothing"))
    return f"contents {text[:8]}" if len(text) == 64 else text[:40]
