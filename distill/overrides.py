"""`key.sub=value` on the command line: put into what was read, before it is checked. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distill.strict_yaml import Document, Mistake, Path, Unreadable, parse
from growth.errors import UsageError, did_you_mean

COMMAND_LINE = 0  # the line of a value that was given there


def apply(document: Document, overrides: Iterable[str], top: set[str]) -> None:
    """Put every `key.sub=value` in its place; `top` are the keys of a recipe. The document collects what is wrong."""
    for text in overrides:
        dotted, equals, value = text.partition("=")
        if not equals or not all(dotted.split(".")):
            raise UsageError(f"{text}: expected key.sub=value, such as stages.student.train.stop.steps=10")
        try:
            read = parse(value.encode())
        except Unreadable as error:
            raise UsageError(f"{text}: {error.args[0].what}") from None
        path = _put(document, _parts(document.value, dotted.split("."), top), read.value, text)
        document.mistakes += [Mistake(path + m.path, m.what, COMMAND_LINE) for m in read.mistakes]


def _parts(recipe: Any, parts: list[str], top: set[str]) -> list[str]:
    """Indices for stage ids: `stages.student.x`, or `student.x` where no key of the recipe has that name."""
    ids = _ids(recipe)
    if parts[0] not in top and parts[0] in ids:
        parts = ["stages", *parts]
    if parts[0] == "stages" and len(parts) > 1 and parts[1] in ids:
        parts = ["stages", str(ids.index(parts[1])), *parts[2:]]
    elif parts[0] not in top:
        raise UsageError(
            f"{'.'.join(parts)}: a recipe has no key and no stage {parts[0]!r}{did_you_mean(parts[0], [*top, *ids])}"
        )
    return parts


def _ids(recipe: Any) -> list[Any]:
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    return (
        [stage.get("id") if isinstance(stage, dict) else None for stage in stages] if isinstance(stages, list) else []
    )


def _put(document: Document, parts: list[str], value: Any, text: str) -> Path:
    here, path = document.value, ()
    for part in parts[:-1]:
        path = (*path, _step(here, part, text))
        if isinstance(here, dict):
            here.setdefault(part, {})
        here = here[path[-1]]
    path = (*path, _step(here, parts[-1], text))
    here[path[-1]] = value
    _forget(document, path)
    document.lines[path] = COMMAND_LINE
    return path


def _forget(document: Document, path: Path) -> None:
    """What was said of the value that stood there."""
    document.lines = {p: line for p, line in document.lines.items() if p[: len(path)] != path}
    document.mistakes = [m for m in document.mistakes if m.path[: len(path)] != path]


def _step(here: Any, part: str, text: str) -> str | int:
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise UsageError(f"{text}: {part!r} stands below a plain value; give the whole of it as key={{...}}")
    if not part.isascii() or not part.isdigit() or int(part) >= len(here):
        raise UsageError(f"{text}: {part!r} is not one of the {len(here)} places of that list, 0 to {len(here) - 1}")
    return int(part)
