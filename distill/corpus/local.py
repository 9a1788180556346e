"""Texts from files: txt, md, jsonl, parquet, each also as .gz or .zst, and directories of them.

Files are somebody else's data: whatever is wrong with them is said with file and line.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distill.corpus.documents import LONGEST, Document, pieces
from distill.corpus.streams import PACKED, Budget, lines, opened, seekable, text
from growth.errors import UserError, did_you_mean
from growth.files import parse_json

LABEL = "label"  # the column or key that names a document's part, where there is one
LONGEST_LINE = 16 << 20  # bytes of one JSON line; parsed, it may take twenty times as much memory
FIRST_LOOK = 1 << 20
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


def documents(path: Path, field: str, label: str | None = None) -> Iterator[Document]:
    """The documents of a file, or of a directory's files one after the other; `label`: the column of their classes."""
    for file in files(path):
        yield from READERS[kind(file)](file, field, label)


def files(path: Path) -> list[Path]:
    """The readable files at or below a path, sorted by name; hidden ones and other kinds are left out."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    found = [path] if path.is_file() else sorted(path.rglob("*"), key=lambda file: file.relative_to(path).parts)
    readable = [file for file in found if file.is_file() and kind(file) in READERS and not _hidden(file, path)]
    if not readable:
        known = f"{', '.join(READERS)}, each also with {' or '.join(PACKED)}"
        raise UserError(f"{path}: nothing to read here; what can be read: {known}")
    return readable


def _hidden(file: Path, root: Path) -> bool:
    return any(name.startswith(".") for name in file.relative_to(root).parts)


def kind(file: Path) -> str:
    return _unpacked(file).suffix.lower()


def _part(file: Path) -> str:
    return _unpacked(file).stem


def _unpacked(file: Path) -> Path:
    return Path(file.stem if file.suffix.lower() in PACKED else file.name)


def _text(path: Path, field: str, label: str | None) -> Iterator[Document]:
    """Documents end at blank lines; in a file whose first MiB has none, each line is one."""
    if label is not None:
        raise UserError(f"{path}: a text file has no column {label!r}; `label: part` makes the file's name the class")
    with opened(path) as stream:
        by_line = BLANK_LINE.search(stream.read(FIRST_LOOK)) is None
    held, size, continues = [], 0, False
    with opened(path) as stream:
        for _, piece in lines(stream, path, LONGEST):
            held.append(piece)
            size += len(piece)
            if size > LONGEST:
                *full, rest = pieces("".join(held))
                yield from (Document(head, _part(path), continues or i > 0) for i, head in enumerate(full))
                held, size, continues = [rest], len(rest), True
            if piece.endswith("\n") if by_line else piece.isspace():
                yield from _whole(held, path, continues, by_line)
                held, size, continues = [], 0, False
    yield from _whole(held, path, continues, keep_blank=False)


def _whole(held: list[str], path: Path, continues: bool, keep_blank: bool) -> Iterator[Document]:
    """One document, unless it is nothing but the space between two."""
    text = "".join(held)
    if keep_blank or text.strip():
        yield Document(text, _part(path), continues)


def _json_lines(path: Path, field: str, label: str | None) -> Iterator[Document]:
    with opened(path) as stream:
        for number, line in lines(stream, path, LONGEST_LINE, whole=True):
            where, line = f"{path}:{number}", line.strip()
            record = parse_json(line.encode(), where) if line else {field: ""}
            yield from_record(record, field, _part(path), where, label)


def from_record(record: Any, field: str, part: str, where: str, column: str | None = None) -> Document:
    """A record's text, part and, in `column`, class; `null` counts as a blank text and as no class."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object like {{{field!r}: ...}}, found a {type(record).__name__}")
    if field not in record:
        raise UserError(_no_field(field, list(record), where))
    value, named = record[field], record.get(LABEL)
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {field!r} is of type {type(value).__name__}, not text")
    part = part if named is None else text(str(named), where)
    return Document(text(value or "", where), part, label=_class(record.get(column), where))


def _class(value: Any, where: str) -> str | None:
    """The name of a class: a word, a whole number, true or false."""
    if not isinstance(value, str | int | None):
        raise UserError(f"{where}: a class is a name or a whole number, not a {type(value).__name__}")
    return None if value is None else text(str(value), where).strip() or None


def _no_field(field: str, there: list[str], where: str) -> str:
    return f"{where}: no {field!r} here, only {', '.join(there)[:200]}; set `field`{did_you_mean(field, there)}"


def _parquet(path: Path, field: str, label: str | None) -> Iterator[Document]:
    import pyarrow

    try:
        with seekable(path) as stream:
            yield from _rows(stream, path, field, label)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a sound parquet file: {str(error).splitlines()[0]}") from error


def _rows(stream: BinaryIO, path: Path, field: str, label: str | None) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    metadata, budget = parquet.read_metadata(stream), Budget(path)
    types = {column.name: column.type for column in metadata.schema.to_arrow_schema()}
    if field not in types:
        raise UserError(_no_field(field, list(types), str(path)))
    stored = types[field].value_type if pyarrow.types.is_dictionary(types[field]) else types[field]
    if str(stored) not in ("string", "large_string"):
        raise UserError(f"{path}: {field!r} holds {types[field]}, not text")
    wanted = [field, *({LABEL, label} & set(types) - {field})]
    _check_sizes(metadata, wanted, path)
    # a text that stands a million times is stored once: read it as it is stored
    table = parquet.ParquetFile(stream, metadata=metadata, read_dictionary=[field])
    batches = (batch.columns for batch in table.iter_batches(batch_size=64, columns=wanted))
    rows = itertools.chain.from_iterable(zip(*columns, strict=True) for columns in batches)
    for number, values in enumerate(rows):
        record = dict(zip(wanted, (value.as_py() for value in values), strict=True))
        document = from_record(record, field, _part(path), f"{path}: row {number}", label)
        budget.spend(len(document.text))
        yield document


def _check_sizes(metadata, wanted: list[str], path: Path) -> None:
    """What a row group says it unpacks to is asked for before a page of it is read."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(metadata.num_columns))
        Budget(path).spend(sum(c.total_uncompressed_size for c in columns if c.path_in_schema in wanted))


READERS = {".txt": _text, ".md": _text, ".jsonl": _json_lines, ".parquet": _parquet}
