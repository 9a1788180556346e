"""Text that is worth nothing, of the kinds that crawled text is full of: to see whether a selection leaves it out.

Seeded, so always the same where the prose it is made from is (that of the Python that runs). The part is the kind.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Iterator

from distill.corpus import stdlib
from distill.corpus.documents import Document

MENU = "Home Products Services Support Contact About Login Search Cart Help News Blog Careers Terms Privacy"
NOTICES = (
    "We use cookies to improve your experience .", "Click here to subscribe to our newsletter .",
    "All rights reserved .", "Please enable JavaScript to view this page .", "Share this page with your friends .",
)  # fmt: skip


def documents(seed: int = 0) -> Iterator[Document]:
    """One for every paragraph of the prose and about as long; the kinds take turns."""
    rng, kinds = random.Random(seed), list(KINDS.items())
    for n, paragraph in enumerate(stdlib.prose()):
        kind, make = kinds[n % len(kinds)]
        yield Document(make(paragraph.text, rng), kind)


def _words(text: str, rng: random.Random) -> str:
    """Words without order."""
    return " ".join(_shuffled(text.split(), rng))


def _letters(text: str, rng: random.Random) -> str:
    """Letters without order."""
    return "".join(_shuffled(text, rng))


def _boilerplate(text: str, rng: random.Random) -> str:
    """Menus and notices, again and again."""
    menu, found = " | ".join(_shuffled(MENU.split(), rng)[:6]), ""
    while len(found) < len(text):
        found += f"{menu} {rng.choice(NOTICES)} "
    return found


def _binary(text: str, rng: random.Random) -> str:
    """Random bytes in base64."""
    return base64.b64encode(bytes(rng.getrandbits(8) for _ in range(3 * len(text) // 4))).decode()


def _shuffled(items, rng: random.Random) -> list:
    return sorted(items, key=lambda item: rng.random())


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "words": _words,
    "letters": _letters,
    "boilerplate": _boilerplate,
    "binary": _binary,
}
