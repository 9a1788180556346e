"""Sentence similarity against people's judgement: a jsonl file of {"text_a", "text_b", "score"}, such as STS-B.

Cer et al. 2017 (arXiv 1708.00055): Spearman correlation between cosine similarity and gold score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.evaluate.agreement import spearman
from distill.evaluate.score import Score
from growth.errors import UserError
from growth.files import parse_json

KEYS = ("text_a", "text_b", "score")


@dataclass(frozen=True)
class Sts:
    """Spearman correlation of cosine similarities with gold scores; `path`: jsonl of text_a, text_b, score."""

    path: str = ""

    title = "STS"
    better = "high"
    digits = 3
    quality = True

    def note(self, bench) -> str:
        return f"rank correlation (Spearman) of cosine similarities with the scores of {Path(self.path).name}"

    def check(self, bench) -> None:
        if not self.path:
            raise UserError(f"sts needs a jsonl file of {', '.join(KEYS)}: `on: [{{sts: {{path: pairs.jsonl}}}}]`")
        read(Path(self.path))

    def measure(self, subjects: Sequence, bench) -> Iterator[Score]:
        import torch

        one, other, gold = zip(*read(Path(self.path)), strict=True)
        for subject in subjects:
            both = torch.nn.functional.normalize(subject.embed([*one, *other]).double())
            cosine = (both[: len(one)] * both[len(one) :]).sum(1)
            value = spearman(cosine.numpy(), gold)
            yield Score(value, math.sqrt((1 + value**2 / 2) / (len(gold) - 3)) * (1 - value**2))


def read(path: Path) -> list[tuple[str, str, float]]:
    """The pairs, or what is wrong with the file and where."""
    if not path.is_file():
        raise UserError(f"sts: {path} does not exist")
    lines = path.read_bytes().split(b"\n")  # not splitlines: U+2028 may stand inside a text
    pairs = [_pair(parse_json(line, f"{path}:{n}"), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if len(pairs) < 4:
        raise UserError(f"sts: {path} has {len(pairs)} pairs; a correlation needs more")
    return pairs


def _pair(record, where: str) -> tuple[str, str, float]:
    if not isinstance(record, dict) or set(KEYS) - set(record):
        raise UserError(f"{where}: expected an object with {', '.join(KEYS)}")
    return str(record["text_a"]), str(record["text_b"]), float(record["score"])
