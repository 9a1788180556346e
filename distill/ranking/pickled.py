"""Scores that were published as a pickle: read, never executed. No torch.

sentence-transformers publishes {query: {document: score}} as a gzipped pickle of 160 million pairs. A pickle is a
program: to unpickle it runs what it names, and even an unpickler that refuses every name builds the whole dictionary,
some twenty gigabytes. The few instructions that dictionaries, numbers and strings are written with are decoded here
one after the other, pairs come out as they pass, and any other instruction is refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from distill.corpus.streams import opened
from growth.errors import UserError

EXPECTED = (
    "a pickle of {query: {document: score}} with whole numbers or strings as ids and plain floats; convert others to "
    "lines of JSON: query_id, document_id, score"
)
LONGEST = 1000  # bytes of an id
MARK, INNER = object(), object()


class Pair(NamedTuple):
    where: str
    query: str
    document: str
    score: float


def pairs(path: Path) -> Iterator[Pair]:
    with opened(path) as stream:
        yield from _Decoder(stream, path).pairs()


class _Decoder:
    """A stack of plain values, on which a dictionary is no more than a sign that it is one."""

    def __init__(self, stream: BinaryIO, path: Path):
        self.stream, self.path, self.at = stream, path, 0
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def pairs(self) -> Iterator[Pair]:
        while (code := self.take(1)) != b".":
            if code in SKIPPED:
                self.take(SKIPPED[code])
            elif code in VALUES:
                self.stack.append(VALUES[code](self))
            elif code in MEMO:
                self.memo[MEMO[code](self)] = self.top()
            elif code in ENTRIES:
                yield from self.entries(ENTRIES[code](self))
            else:
                self.refuse(f"an instruction {code!r} that may run code or build something else")
        if self.stack != [INNER]:
            self.refuse("something that is no dictionary")

    def entries(self, items: list) -> Iterator[Pair]:
        """Into the dictionary on top: pairs if it is that of a query, whose id lies below it."""
        if self.top() is not INNER or len(items) % 2:
            self.refuse("entries of no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if len(self.stack) == 1 and value is INNER and _is_id(key):
                continue  # a query that is complete; its pairs came out one by one
            if len(self.stack) < 3 or not _is_id(self.stack[-2]) or not _is_id(key) or not _is_score(value):
                self.refuse("an entry that is no score of a document")
            yield Pair(f"{self.path}: byte {self.at}", str(self.stack[-2]), str(key), float(value))

    def take(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.at += len(data)
        if len(data) < count:
            self.refuse("the end of the file; it is truncated")
        return data

    def number(self, form: str) -> int | float:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form: str) -> str:
        if (size := self.number(form)) > LONGEST:
            self.refuse(f"a string of {size} bytes")
        return self.take(size).decode("utf-8", "replace")

    def known(self, form: str) -> object:
        if (place := self.number(form)) not in self.memo or (value := self.memo[place]) in (MARK, INNER):
            self.refuse("a reference to what is no number or string")
        return value

    def top(self) -> object:
        return self.stack[-1] if self.stack else self.refuse("an instruction without a value")

    def since_mark(self) -> list:
        if MARK not in self.stack:
            self.refuse("entries without a beginning")
        start = len(self.stack) - 1 - self.stack[::-1].index(MARK)
        items, self.stack[start:] = self.stack[start + 1 :], []
        return items

    def last_two(self) -> list:
        items, self.stack[-2:] = self.stack[-2:], []
        return items

    def refuse(self, what: str):
        raise UserError(f"{self.path}: byte {self.at}: {what}; expected {EXPECTED}")


def _is_id(value: object) -> bool:
    return isinstance(value, int | str)


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


SKIPPED = {b"\x80": 1, b"\x95": 8}  # protocol, frame
VALUES: dict[bytes, Callable] = {
    b"}": lambda d: INNER,
    b"(": lambda d: MARK,
    b"K": lambda d: d.number("<B"),
    b"M": lambda d: d.number("<H"),
    b"J": lambda d: d.number("<i"),
    b"\x8a": lambda d: int.from_bytes(d.take(d.number("<B")), "little", signed=True),
    b"G": lambda d: d.number(">d"),
    b"\x8c": lambda d: d.text("<B"),
    b"X": lambda d: d.text("<I"),
    b"h": lambda d: d.known("<B"),
    b"j": lambda d: d.known("<I"),
}
MEMO: dict[bytes, Callable] = {
    b"q": lambda d: d.number("<B"),
    b"r": lambda d: d.number("<I"),
    b"\x94": lambda d: len(d.memo),
}
ENTRIES: dict[bytes, Callable] = {b"u": lambda d: d.since_mark(), b"s": lambda d: d.last_two()}
