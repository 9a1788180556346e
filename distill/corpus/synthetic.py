"""Text of known entropy: a seeded grammar without recursion in which every text has one derivation.

The first word of an alternative always decides which alternative it is, so the entropy of the texts is that of the
choices, and no model can do better than `Grammar.bits` per document on average.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from distill.corpus.documents import Document

DOCUMENTS = 4000
COUNTS = {"three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
TOPICS = {
    "garden": "rose tree hedge pond path seed root flower",
    "kitchen": "fork oven plate spoon table recipe pot bowl",
    "harbor": "boat sailor anchor rope wave captain pier net",
    "school": "teacher book lesson desk pencil student test page",
    "forest": "hawk owl fern trail stone river bear nest",
    "office": "letter phone clerk printer meeting report chair window",
    "market": "coin basket trader apple stall price scale carrot",
    "theater": "actor stage curtain song dancer mask ticket mirror",
}
ADJECTIVES = "old small quiet bright heavy green strange broken"
VERBS = "find keep hide move hold need follow cover"
PLACES = "near under behind above"

Alternative = tuple[float, tuple[str, ...]]  # probability, symbols; a symbol without a rule is a word


@dataclass(frozen=True)
class Grammar:
    """`rules[symbol]` are its alternatives; the first symbol is `text`."""

    rules: dict[str, list[Alternative]]

    @property
    def bits(self) -> float:
        """Entropy of one text (Grenander 1967: the entropy of a derivation is the expected sum over its choices)."""
        return self._expected(lambda alternatives: sum(-p * math.log2(p) for p, _ in alternatives), 0.0)

    @property
    def words(self) -> float:
        """Expected words of one text."""
        return self._expected(lambda alternatives: 0.0, 1.0)

    def _expected(self, of_choice, of_word: float) -> float:
        @cache
        def value(symbol: str) -> float:
            if symbol not in self.rules:
                return of_word
            alternatives = self.rules[symbol]
            return of_choice(alternatives) + sum(p * sum(map(value, symbols)) for p, symbols in alternatives)

        return value("text")

    def text(self, rng: random.Random) -> list[str]:
        """The words of one text."""
        words, stack = [], ["text"]
        while stack:
            symbol = stack.pop()
            if symbol not in self.rules:
                words.append(symbol)
                continue
            chances, bodies = zip(*self.rules[symbol], strict=True)
            chosen = min(bisect(list(accumulate(chances)), rng.random()), len(bodies) - 1)
            stack.extend(reversed(bodies[chosen]))
        return words


def documents(seed: int = 0) -> Iterator[Document]:
    """The part is the topic, which the text names."""
    rules, rng = grammar(seed), random.Random(seed)
    for _ in range(DOCUMENTS):
        words = rules.text(rng)
        yield Document(" ".join(words), words[4])


def grammar(seed: int = 0) -> Grammar:
    """`five notes on the garden : the old rose hides the seeds near the pond . ...`; the seed ranks the words."""
    rng = random.Random(seed)
    rules = {"text": _equally([(count, "notes", "on", "the", f"body {n}") for count, n in COUNTS.items()])}
    for n in COUNTS.values():
        rules[f"body {n}"] = _equally([(topic, ":", *[f"sentence {topic}"] * n) for topic in TOPICS])
    for topic, nouns in TOPICS.items():
        rules |= _sentence(topic, _shuffled(nouns, rng), rng)
    return Grammar(rules)


def _sentence(topic: str, nouns: list[str], rng: random.Random) -> dict[str, list[Alternative]]:
    """The verb agrees with the subject: a choice once made that shows a word later."""
    one, many = [(noun,) for noun in nouns], [(noun + "s",) for noun in nouns]
    verbs, rest = _shuffled(VERBS, rng), ("the", f"object {topic}", f"place {topic}")
    bare = _either(0.5, [(*n, f"does {topic}") for n in one], [(*n, f"do {topic}") for n in many])
    adjectives = [(word, f"bare {topic}") for word in _shuffled(ADJECTIVES, rng)]
    return {
        f"sentence {topic}": [(1.0, ("the", f"subject {topic}", *rest))],
        f"subject {topic}": [*_scaled(0.6, bare), *_scaled(0.4, _zipf(adjectives))],
        f"bare {topic}": bare,
        f"does {topic}": _zipf([(verb + "s",) for verb in verbs]),
        f"do {topic}": _zipf([(verb,) for verb in verbs]),
        f"object {topic}": _either(0.5, one, many),
        f"place {topic}": _either(0.6, [(".",)], [(word, "the", f"object {topic}", ".") for word in PLACES.split()]),
    }


def _either(chance: float, one: list[tuple[str, ...]], other: list[tuple[str, ...]]) -> list[Alternative]:
    return [*_scaled(chance, _zipf(one)), *_scaled(1 - chance, _zipf(other))]


def _equally(bodies: list[tuple[str, ...]]) -> list[Alternative]:
    return [(1 / len(bodies), body) for body in bodies]


def _zipf(bodies: list[tuple[str, ...]]) -> list[Alternative]:
    total = sum(1 / rank for rank in range(1, len(bodies) + 1))
    return [(1 / (rank * total), body) for rank, body in enumerate(bodies, start=1)]


def _scaled(share: float, alternatives: list[Alternative]) -> list[Alternative]:
    return [(share * p, body) for p, body in alternatives]


def _shuffled(words: str, rng: random.Random) -> list[str]:
    return sorted(words.split(), key=lambda word: rng.random())
