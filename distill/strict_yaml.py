"""YAML as a careful reader takes it: nothing means two things, nothing runs, nothing explodes. No torch.

YAML 1.1 reads `5e-4` as text, `off` as false, `010` as eight and `1:30` as ninety; it lets a key stand twice. Here each
of these is a mistake with its line. All of them are collected, and reading goes on with what was most likely meant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

import yaml

LARGEST = 1_000_000  # bytes
DEEPEST = 30
MOST = 20_000  # values, aliases expanded: 100 times the longest honest recipe, and parsed well within a second

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MERGE, TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
LINE_ENDS = set("\x85\u2028\u2029")  # to YAML; between single quotes they would be read as blanks
EXPONENT = re.compile(r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+")
INTEGER = re.compile(r"[-+]?(0|[1-9][\d_]{,300})")
DECIMAL = re.compile(r"[-+]?(\d[\d_]{,300}\.\d*|\d?\.\d+)")
CONSTANTS = {"true": True, "false": False, "null": None, "~": None, "": None}

Path = tuple[str | int, ...]


class Mistake(NamedTuple):
    path: Path
    what: str
    line: int | None = None


class Unreadable(Exception):
    """Not YAML at all, or too much of it; carries the one Mistake."""


@dataclass
class Document:
    """What was read: plain dicts, lists and scalars; the line of every path; what was wrong."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    size: int = 0


def parse(data: bytes) -> Document:
    """The one document in `data`; raises Unreadable where no value can be made of it."""
    text = _decode(data)
    try:
        _scan(text)
        node = yaml.compose(text, Loader=LOADER)
    except yaml.MarkedYAMLError as error:
        raise Unreadable(_syntax(error, text)) from None
    except yaml.YAMLError as error:  # a character that may not stand in YAML
        raise Unreadable(Mistake((), " ".join(str(error).split()))) from None
    document = Document()
    if node is not None:
        document.value = _Reader(document).read(node, (), ())
    return document


def _decode(data: bytes) -> str:
    if len(data) > LARGEST:
        raise Unreadable(Mistake((), f"{len(data)} bytes; a recipe has at most {LARGEST}"))
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise Unreadable(Mistake((), "starts with a byte order mark; save it as UTF-8 without BOM", 1))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Unreadable(Mistake((), "not UTF-8; save it as UTF-8", line)) from None


def _scan(text: str) -> None:
    """Stop at the first sign of a bomb, before anything is built."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=LOADER)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        line = event.start_mark.line + 1
        if depth > DEEPEST:
            raise Unreadable(Mistake((), f"nested more than {DEEPEST} deep", line))
        if count > MOST:
            raise Unreadable(Mistake((), f"more than {MOST} values", line))
        if getattr(event, "tag", None):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise Unreadable(Mistake((), f"tag {tag}: a recipe holds plain values, no tags", line))


def _syntax(error: yaml.MarkedYAMLError, text: str) -> Mistake:
    line = error.problem_mark.line if error.problem_mark else 0
    lines = text.splitlines()
    start = re.match(r"\s*", lines[line]).group() if line < len(lines) else ""
    if "\t" in start:
        return Mistake((), "a tab at the start of the line; indent with spaces", line + 1)
    if "document" in (error.problem or "") + (error.context or ""):
        return Mistake((), "a second document; a recipe is one document", line + 1)
    return Mistake((), f"not YAML: {error.problem}", line + 1)


class _Reader:
    """Nodes into values. Aliases are read anew where they stand, so that no two places share one list."""

    def __init__(self, document: Document):
        self.document = document

    def read(self, node: yaml.Node, path: Path, above: tuple[yaml.Node, ...]) -> Any:
        self.document.size += 1
        line = node.start_mark.line + 1
        self.document.lines.setdefault(path, line)
        if node in above:
            raise Unreadable(Mistake((), "an alias that refers to what it stands in", line))
        if self.document.size > MOST or len(above) > DEEPEST:
            raise Unreadable(
                Mistake((), f"more than {MOST} values or {DEEPEST} levels once aliases are followed", line)
            )
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, i), above) for i, item in enumerate(node.value)]
        return self._mapping(node, path, above)

    def _mapping(self, node: yaml.MappingNode, path: Path, above: tuple[yaml.Node, ...]) -> dict:
        own: dict[str, Any] = {}
        for key, value in self._keys(node, path):
            if key in own:
                self._wrong((*path, key), f"key {key!r} stands twice", value)
                continue
            self.document.lines[(*path, key)] = value.start_mark.line + 1
            own[key] = self.read(value, (*path, key), above)
        merged = self._merged(node, path, above)
        return {**merged, **own}

    def _keys(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, yaml.Node]]:
        for key, value in node.value:
            if key.tag == MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode) or not _is_name(key):
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                self._wrong(path, f"key {shown!r} is not text; keys are names", key)
                continue
            yield key.value, value

    def _merged(self, node: yaml.MappingNode, path: Path, above: tuple[yaml.Node, ...]) -> dict:
        """`<<: *other`, or a list of them: keys that are not given here."""
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag != MERGE:
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                read = self.read(source, path, above)
                if isinstance(read, dict):
                    merged = {**read, **merged}
                else:
                    self._wrong(path, "'<<' takes a mapping or a list of them", source)
        return merged

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text = node.value
        if node.style in ("'", '"', "|", ">"):
            return text
        if text.lower() in CONSTANTS:
            return CONSTANTS[text.lower()]
        if INTEGER.fullmatch(text):
            return int(text.replace("_", ""))
        if DECIMAL.fullmatch(text):
            return float(text.replace("_", ""))
        return self._doubtful(node, path)

    def _doubtful(self, node: yaml.ScalarNode, path: Path) -> Any:
        text, shown, kind = node.value, node.value[:40], node.tag.rpartition(":")[2]
        value = float(text.replace("_", "")) if EXPONENT.fullmatch(text) else math.nan
        if math.isfinite(value):
            self._wrong(
                path, f"{shown} is text to some YAML readers; write {plain(value)}, or quote it if text is meant", node
            )
            return value
        if kind == "bool":
            self._wrong(
                path, f"{shown} is false or true to some YAML readers; write true, false or quote it: '{shown}'", node
            )
        elif kind in ("int", "float") or EXPONENT.fullmatch(text):
            self._wrong(
                path, f"{shown} is not a plain finite decimal number; write digits, or quote it: '{shown}'", node
            )
        return text

    def _wrong(self, path: Path, what: str, node: yaml.Node) -> None:
        self.document.mistakes.append(Mistake(path, what, node.start_mark.line + 1))


def _is_name(key: yaml.ScalarNode) -> bool:
    """`on` is a boolean to YAML 1.1 and a name to everybody else."""
    return key.tag == TEXT or key.style in ("'", '"') or key.value.lower() in ("on", "off", "yes", "no")


def plain(value: float) -> str:
    """0.0005, not 5e-04; 1000000, not 1e6."""
    return format(Decimal(repr(value)).normalize(), "f")


class _Writer(yaml.SafeDumper):
    """Writes only what `parse` takes: decimals in full, doubtful words quoted, no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_float(writer: _Writer, value: float) -> yaml.Node:
    text = plain(value)
    return writer.represent_scalar("tag:yaml.org,2002:float", text if "." in text else f"{text}.0")


def _write_text(writer: _Writer, value: str) -> yaml.Node:
    style = '"' if LINE_ENDS & set(value) else "'" if EXPONENT.fullmatch(value) else None
    return writer.represent_scalar(TEXT, value, style=style)


_Writer.add_representer(float, _write_float)
_Writer.add_representer(str, _write_text)


def dump(value: Any) -> str:
    """Text that `parse` reads back as an equal value."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
