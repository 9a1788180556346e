"""The collection that is always at hand: the summary line of a docstring asks for the rest of it. No torch.

Of the Python that runs, in the order of its modules. A summary and a body stand once each: of those that say the
same, the first is kept. Which side a pair is on depends on its text alone.
"""

from __future__ import annotations

import hashlib
from functools import cache

from distill.corpus import stdlib
from distill.ranking.collection import Collection
from distill.ranking.groups import name_of
from growth.errors import UserError

TRAIN, TEST = SIDES = ("train", "test")
SHARE = 0.2  # of the pairs is the test side
FEWEST_ASKED, FEWEST_SAID = 3, 10  # words of a summary and of a body; "Close the file." is about all of them


def collection(side: str = TRAIN, share: float = SHARE) -> Collection:
    """Train: its own queries and bodies. Test: its own queries among the bodies of both sides, as a search would be."""
    if side not in SIDES:
        raise UserError(f"the docstrings have no side {side!r}, only {' and '.join(SIDES)}")
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    judged: dict[str, dict[str, int]] = {}
    for summary, body in pairs():
        query, document = name_of(summary), name_of(body)
        mine = (TEST if _place(body) < share else TRAIN) == side
        if mine or side == TEST:
            documents[document] = body
        if mine:
            queries[query], judged[query] = summary, {document: 1}
    return Collection(queries, documents, judged)


@cache
def pairs() -> list[tuple[str, str]]:
    """(summary, body) of every docstring that has both."""
    found, seen = [], set()
    for part, path in stdlib.modules():
        for text in stdlib.docstrings(stdlib.read(path)) if part != "pydoc_data" else ():
            summary, _, rest = text.partition("\n\n")
            pair = " ".join(summary.split()), " ".join(stdlib.paragraphs(rest))
            said = {one.casefold() for one in pair}
            if "\n" not in summary.strip() and _enough(*pair) and not said & seen:
                seen |= said
                found.append(pair)
    return found


def _enough(summary: str, body: str) -> bool:
    return len(summary.split()) >= FEWEST_ASKED and len(body.split()) >= FEWEST_SAID


def _place(body: str) -> float:
    """Of a text between 0 and 1, evenly spread."""
    return int.from_bytes(hashlib.sha256(body.encode()).digest()[:8], "big") / 2**64
