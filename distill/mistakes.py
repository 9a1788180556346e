"""What is wrong with a recipe, in the words of the person who wrote it. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from distill.strict_yaml import Document, Mistake, Path, plain
from growth.errors import did_you_mean

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
SHA256 = r"^[0-9a-f]{64}$"
PATTERNS = {NAME: "letters, digits, - and _ make a name", SHA256: "64 hexadecimal digits in lower case are needed"}

EXPECTED = {
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
}
NUMBERS = ("a number", "a whole number")
BOUNDS = ("too_short", "too_long", "greater_than", "greater_than_equal", "less_than", "less_than_equal")


def report(mistakes: Iterable[Mistake], document: Document | dict, file: str) -> str:
    """One line a mistake, in the order of the file: `file: dotted.key: what (line 3)`."""
    lines, value = (document.lines, document.value) if isinstance(document, Document) else ({}, None)
    placed = [m._replace(line=_line(m.path, lines) if m.line is None else m.line) for m in _once(mistakes)]
    return "\n".join(_said(m, value, file) for m in sorted(placed, key=lambda m: m.line or 0))


def _once(mistakes: Iterable[Mistake]) -> list[Mistake]:
    """A place that could not be read is not also reported as having the wrong value."""
    kept: dict[tuple, Mistake] = {}
    for mistake in mistakes:
        if not any(m.path == mistake.path and m.line is not None for m in kept.values()) or mistake.line is not None:
            kept.setdefault((mistake.path, mistake.what), mistake)
    return list(kept.values())


def _line(path: Path, lines: dict[Path, int]) -> int | None:
    """Of the path, or of the nearest thing around it that has one."""
    return next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)


def _said(mistake: Mistake, value: Any, file: str) -> str:
    dotted = ".".join(_named(mistake.path, value))
    where = "command line" if mistake.line == 0 else file
    line = f" (line {mistake.line})" if mistake.line else ""
    return ": ".join(filter(None, [where, dotted, mistake.what])) + line


def _named(path: Path, value: Any) -> Iterator[str]:
    """Keys, with a stage's id in place of its number."""
    for depth, part in enumerate(path):
        value = value[part] if _has(value, part) else None
        named = depth == 1 and path[0] == "stages" and isinstance(value, dict) and isinstance(value.get("id"), str)
        yield value["id"] if named else str(part)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def of_shape(error: ValidationError, document: Document, model: type[BaseModel]) -> list[Mistake]:
    """pydantic's list, in our words; what a union says of each of its members becomes one line."""
    if not isinstance(document.value, dict):
        found = "the file is empty" if document.value is None else f"found {_shown(document.value)} at the top"
        return [Mistake((), f"{found}; a recipe is keys and values, beginning with `recipe: NAME`")]
    schema = model.model_json_schema(by_alias=True)
    grouped: dict[Path, list[dict]] = {}
    for one in error.errors(include_url=False):
        grouped.setdefault(_place(one, document.value), []).append(one)
    deepest = {path: errors for path, errors in grouped.items() if not _is_other_member(path, errors, grouped)}
    return [
        Mistake(path, what, _line_of(errors, path, document))
        for path, errors in deepest.items()
        for what in _words(errors, schema, path)
    ]


def _line_of(errors: list[dict], path: Path, document: Document) -> int | None:
    """Of the unknown key, where that is the mistake."""
    keys = [e["loc"][-1] for e in errors if e["type"] == "extra_forbidden"]
    return next((document.lines[(*path, key)] for key in keys if (*path, key) in document.lines), None)


def _place(error: dict, value: Any) -> Path:
    """Where in the file: pydantic's location without the names of union members."""
    path: list[str | int] = []
    unknown = error["type"] == "extra_forbidden"  # whose last part is no place
    for part in error["loc"][:-1] if unknown else error["loc"]:
        if _has(value, part):
            path.append(part)
            value = value[part]
    return tuple(path)


def _is_other_member(path: Path, errors: list[dict], grouped: dict[Path, list[dict]]) -> bool:
    """A union's wish for another type, where the member that was meant has a mistake further in."""
    further = any(p != path and p[: len(path)] == path for p in grouped)
    return further and all(e["type"] in (*EXPECTED, "literal_error") or _is_short_of_bad_items(e) for e in errors)


def _words(errors: list[dict], schema: dict, path: Path) -> Iterator[str]:
    """What is said of one place: one line for all types that it might have had, then one for every other mistake."""
    types = [e for e in errors if e["type"] in EXPECTED]
    choices = [e for e in errors if e["type"] == "literal_error"]
    others = [e for e in errors if e not in types and e not in choices and not _is_short_of_bad_items(e)]
    choices = [e for e in choices if not (others and isinstance(e["input"], dict))]  # another member was meant
    if any(e["type"] in BOUNDS for e in others):
        types, choices = [], []  # it has the type of that member
    if choices and all(EXPECTED[e["type"]] not in NUMBERS for e in types) and isinstance(choices[0]["input"], str):
        yield _no_choice(choices)
    elif types and not any(e["type"] == "value_error" for e in others):
        yield _wrong_type(types, choices)
    elif choices:
        yield _no_choice(choices)
    for error in others:
        if error["type"] == "extra_forbidden":
            key, known = str(error["loc"][-1]), _keys(schema, path)
            yield f"no key {key!r}{did_you_mean(key, known) or '; known: ' + ', '.join(known)}"
        elif error["type"] == "missing":
            yield f"{error['loc'][-1]!r} is needed"
        else:
            yield _other(error)


def _is_short_of_bad_items(error: dict) -> bool:
    """pydantic calls a list short when its items failed, which is said already."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _wrong_type(types: list[dict], choices: list[dict]) -> str:
    found = types[0]["input"]
    wanted = " or ".join(dict.fromkeys([*(EXPECTED[e["type"]] for e in types), *_choices(choices)]))
    return f"expected {wanted}, found {_shown(found)}{_cure(wanted, found)}"


def _no_choice(choices: list[dict]) -> str:
    found, known = choices[0]["input"], _choices(choices)
    return f"{_quoted(found)} is not one of {', '.join(known)}{did_you_mean(found, known)}"


def _choices(errors: list[dict]) -> list[str]:
    return [word.strip("'") for e in errors for word in re.split(r", | or ", e["ctx"]["expected"])]


def _other(error: dict) -> str:
    kind, context, found = error["type"], error.get("ctx", {}), error["input"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return f"{_quoted(found)}: {PATTERNS[context['pattern']]}"
    if kind == "too_short":
        return f"at least {context['min_length']} needed, found {len(found)}"
    if kind == "too_long":
        return f"at most {context['max_length']} allowed, found {len(found)}"
    said = error["msg"].removeprefix("Input should be ")
    return f"must be {said}, found {_quoted(found)}" if said != error["msg"] else f"{said}, found {_quoted(found)}"


def _quoted(value: Any) -> str:
    return _shown(value).removeprefix("text ")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "keys and values"
    return f"text {value[:40]!r}" if isinstance(value, str) else f"{value}"


def _cure(wanted: str, found: Any) -> str:
    if "number" in wanted and isinstance(found, str) and re.fullmatch(r"[-+.\d]+([eE][-+]?\d+)?", found):
        try:
            return f"; write {plain(float(found))} without quotes"
        except ValueError:
            return ""
    if wanted == "text" and isinstance(found, bool | int | float):
        return f"; quote it: '{_shown(found)}'"
    return ""


def _keys(schema: dict, path: Path) -> list[str]:
    """The keys that the JSON schema knows at a path."""
    nodes = _members(schema, schema)
    for part in path:
        below = [_below(node, part) for node in nodes]
        nodes = [member for node in below if node for member in _members(node, schema)]
    return sorted({key for node in nodes for key in node.get("properties", {})})


def _below(node: dict, part: str | int) -> dict | None:
    if isinstance(part, int):
        return node.get("items")
    patterned = next(iter(node.get("patternProperties", {}).values()), None)
    named = node.get("properties", {}).get(part) or patterned or node.get("additionalProperties")
    return named if isinstance(named, dict) else None


def _members(node: dict, schema: dict) -> list[dict]:
    """A node, or those it stands for: `$ref` and the members of a union."""
    if "$ref" in node:
        return _members(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in node:
        return [member for one in node["anyOf"] for member in _members(one, schema)]
    return [node]
