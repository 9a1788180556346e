"""Linear probe: which part of its source does a text come from? A labelled task that every corpus with parts carries.

Alain and Bengio 2016 (arXiv 1610.01644): what a linear classifier finds in frozen states. Here multinomial logistic
regression on standardised mean-pooled states. Every document is tested once, by a classifier that has not seen it
(cross-validation by document hash): for the same encoding work twice the test items of one equal split.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from distill.evaluate.score import Score
from growth.errors import UserError

FEWEST = 20  # documents; a part with fewer is no class


@dataclass(frozen=True)
class Probe:
    """Accuracy of a linear probe: which part of the corpus does a text come from?"""

    parts: int = 20
    documents: int = 100  # of each part at most
    folds: int = 5
    ridge: float = 0.03

    title = "probe"
    better = "high"
    digits = 3
    quality = True

    def note(self, bench) -> str:
        texts, labels = self.task(bench)
        parts = len(set(labels))
        return (
            f"accuracy of a linear probe: which of {parts} parts of the corpus a text comes from ({len(texts):,} "
            f"texts, {self.folds}-fold by document hash; float32 mean-pooled states; chance {1 / parts:.3f})"
        )

    def check(self, bench) -> None:
        if len(set(self.task(bench)[1])) < 2:
            raise UserError(
                f"probe asks which part of the corpus a text comes from; {bench.path.name} has fewer than 2 parts of "
                f"{FEWEST} documents. Sources with parts: stdlib, directories of files, jsonl with a key 'label'; "
                "else take probe out of `on`"
            )

    def measure(self, subjects: Sequence, bench) -> Iterator[Score]:
        import torch

        texts, labels = self.task(bench)
        classes = sorted(set(labels))
        y = torch.tensor([classes.index(label) for label in labels])
        fold = torch.tensor([text_hash(text) % self.folds for text in texts])
        for subject in subjects:
            embeddings = subject.embed(texts)
            with one_thread():
                right = correct(embeddings, y, fold, self.ridge).double()
            share = right.mean().item()
            yield Score(share, math.sqrt(share * (1 - share) / len(right)))

    def task(self, bench) -> tuple[list[str], list[str]]:
        """Texts and their parts, in the order of part and hash."""
        by_part: dict[str, set[str]] = defaultdict(set)
        for text, part in bench.documents:
            by_part[part].add(text)
        large = [part for part, texts in by_part.items() if len(texts) >= FEWEST]
        chosen = sorted(large, key=lambda part: (-len(by_part[part]), part))[: self.parts]
        each = min([self.documents, *(len(by_part[part]) for part in chosen)])
        pairs = [(text, part) for part in chosen for text in sorted(by_part[part], key=text_hash)[:each]]
        return [text for text, _ in pairs], [part for _, part in pairs]


@cache
def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@contextmanager
def one_thread():
    """For small products threads bring little, and on a busy machine they wait for each other (measured: ten times)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def correct(x, y, fold, ridge: float):
    """For every item whether the classifier trained on the other folds is right about it: [N] bool."""
    import torch

    right = torch.zeros(len(y), dtype=torch.bool)
    for tested in (fold == k for k in fold.unique()):
        scaled = _standardised(x.double(), ~tested)
        w = fit(scaled[~tested], y[~tested], int(y.max()) + 1, ridge)
        right[tested] = (scaled[tested] @ w[:-1] + w[-1]).argmax(1) == y[tested]
    return right


def _standardised(x, train):
    """By the training items' mean and deviation; a constant feature becomes zero."""
    return (x - x[train].mean(0)) / x[train].std(0).clamp_min(1e-8)


def fit(x, y, classes: int, ridge: float):
    """Weights [D + 1, classes] (the bias last) of the least cross-entropy + ridge / 2 |w|^2, by L-BFGS in float64."""
    import torch
    from torch.nn.functional import cross_entropy

    w = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-9, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = cross_entropy(x @ w[:-1] + w[-1], y) + ridge / 2 * w[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach()
