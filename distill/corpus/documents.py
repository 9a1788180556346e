"""What every source yields: texts with the part of the source they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

LONGEST = 100_000  # characters; a longer document is cut, so that one line of a gigabyte needs no gigabyte of memory


class Document(NamedTuple):
    """`continues`: not the first piece of a document that was cut; all its pieces stay on one side of the split.

    `label`: its class, where the corpus has classes and this document is of a known one.
    """

    text: str
    part: str
    continues: bool = False
    label: str | None = None


def bounded(documents: Iterable[Document]) -> Iterator[Document]:
    """The same documents, those that are too long in pieces."""
    for document in documents:
        first, *rest = pieces(document.text)
        yield document._replace(text=first)
        yield from (document._replace(text=text, continues=True) for text in rest)


def pieces(text: str) -> list[str]:
    """At most LONGEST characters each, cut at white space where there is some; joined they are the text."""
    found = []
    while len(text) > LONGEST:
        at = max(text.rfind(" ", LONGEST // 2, LONGEST), text.rfind("\n", LONGEST // 2, LONGEST))
        at = LONGEST if at < 0 else at
        found.append(text[:at])
        text = text[at:]
    return [*found, text]
