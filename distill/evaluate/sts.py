"""Sentence similarity against people's judgement: pairs of texts with scores, such as STS-B, from a file or the hub.

Cer et al. 2017 (arXiv 1708.00055): Spearman correlation between cosine similarity and gold score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distill.corpus import sources
from distill.evaluate.agreement import spearman
from distill.evaluate.score import Score
from distill.ranking.significance import Comparison, compare_correlations
from growth.console import say
from growth.errors import UserError
from growth.files import parse_json

COLUMNS = (("text_a", "sentence1"), ("text_b", "sentence2"), ("score", "label"))  # of each, the first that is there
PAIRS = "jsonl of text_a, text_b, score (or sentence1, sentence2)"

Pairs = tuple[tuple[str, str, float], ...]
Records = list[tuple[Any, str]]  # with where they stand


@dataclass(frozen=True)
class Sts:
    """Spearman correlation of cosine similarities with gold scores.

    `source`: jsonl of text_a, text_b, score, or a data set of the hub. `optional`: where such a data set is neither
    here nor can be downloaded, the column stays empty and says so.
    """

    source: str = ""
    split: str = "validation"  # of a data set
    optional: bool = False

    title = "STS"
    better = "high"
    digits = 3
    quality = True

    def note(self, bench) -> str:
        pairs = read(self.source, self.split)
        if pairs is None:
            return f"not measured: {self.source} is not at hand; `source` takes a {PAIRS} as well"
        where = Path(self.source).name if sources.is_path(self.source) else f"{self.source}, {self.split}"
        return f"rank correlation (Spearman) of cosine similarities with {len(pairs):,} scores of {where}"

    def check(self, bench) -> None:
        if not self.source:
            raise UserError(f"sts needs a {PAIRS}, or a data set: `on: [{{sts: {{source: pairs.jsonl}}}}]`")
        if read(self.source, self.split) is None and not self.optional:
            raise UserError(f"sts: {self.source} is not here and cannot be downloaded; a {PAIRS} does as well")

    def measure(self, subjects: Sequence, bench) -> Iterator[Score | None]:
        pairs = read(self.source, self.split)
        if pairs is None:
            yield from (None for _ in subjects)
        else:
            one, other, gold = zip(*pairs, strict=True)
            for subject in subjects:
                similarities = bench.similarities[subject.key] = _cosines(subject.embed([*one, *other]))
                yield _correlation(similarities, gold)

    def compare(self, one: Sequence, other: Sequence, bench) -> Comparison | None:
        """By the similarities that `measure` found; of a row measured once every seed has the same."""
        if (pairs := read(self.source, self.split)) is None:
            return None
        seeds = max(len(one), len(other))
        found = ([bench.similarities[subject.key] for subject in row] * (seeds // len(row)) for row in (one, other))
        return compare_correlations(*found, [gold for *_, gold in pairs])


def _cosines(embeddings):
    """Of the first N of [2 N, D] with the others, [N]."""
    import torch

    one, other = torch.nn.functional.normalize(embeddings.double()).chunk(2)
    return (one * other).sum(1).numpy()


def _correlation(similarities, gold: Sequence[float]) -> Score:
    """With Bonett and Wright's (2000) standard error."""
    value = spearman(similarities, gold)
    return Score(value, math.sqrt((1 + value**2 / 2) / (len(gold) - 3)) * (1 - value**2))


@cache
def read(source: str, split: str) -> Pairs | None:
    """The pairs, or what is wrong with them and where; None for a data set that cannot be had now."""
    records = _of_file(Path(source).expanduser()) if sources.is_path(source) else _of_hub(source, split)
    if records is None:
        return None
    pairs = tuple(_pair(record, where) for record, where in records)
    if len(pairs) < 4:
        raise UserError(f"sts: {source} has {len(pairs)} pairs; a correlation needs more")
    return pairs


def _of_file(path: Path) -> Records:
    if not path.is_file():
        raise UserError(f"sts: {path} does not exist")
    lines = path.read_bytes().split(b"\n")  # not splitlines: U+2028 may stand inside a text
    return [(parse_json(line, f"{path}:{n}"), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _of_hub(source: str, split: str) -> Records | None:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except ConnectionError as error:
        say(f"data set {source}: {sources.first_line(error)}")
        return None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data set {source}: {sources.first_line(error)}") from error
    return [(row, f"{source}: row {n}") for n, row in enumerate(rows)]


def _pair(record: Any, where: str) -> tuple[str, str, float]:
    found = [next((name for name in names if isinstance(record, dict) and name in record), None) for names in COLUMNS]
    if None in found:
        raise UserError(f"{where}: expected an object with {' and '.join(' or '.join(names) for names in COLUMNS)}")
    one, other, score = (record[name] for name in found)
    return str(one), str(other), float(score)
