"""Held-out loss: what the checkpoint's own head makes of text that no row was trained on, always the same masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distill.evaluate.score import Score

TOKENS = 16_384  # of the held-out part
ROWS = 16  # of one forward pass
MASK = 0.15
SEED = 0  # of the masks: a constant of the measure, not of the run


@dataclass(frozen=True)
class HeldoutLoss:
    """Masked or next-token cross-entropy; none for a checkpoint without a head or with another vocabulary."""

    title = "held-out loss"
    better = "low"
    digits = 3
    quality = True

    def note(self, bench) -> str:
        rows = _positions(bench.heldout)
        return (
            f"cross-entropy of the checkpoint's own head on {len(rows)} held-out rows of {bench.heldout.length} "
            f"tokens, nats a token ({MASK:.0%} masked, or the next token); - where there is no head"
        )

    def check(self, bench) -> None:
        _positions(bench.heldout)  # refuses a corpus of which nothing is held out

    def measure(self, subjects: Sequence, bench) -> Iterator[Score | None]:
        for subject in subjects:
            fits = subject.head is not None and subject.vocabulary == bench.vocabulary
            yield self._score(subject, bench) if fits else None

    def _score(self, subject, bench) -> Score:
        import torch
        from torch.nn.functional import cross_entropy

        losses = [cross_entropy(logits, labels, reduction="none") for logits, labels in predictions(subject, bench)]
        return mean(torch.cat(losses))


def predictions(subject, bench) -> Iterator[tuple]:
    """(logits [N, V] float32, labels [N]) of the scored tokens, batch by batch."""
    import torch

    from distill import corpus, layout, world
    from distill.objectives.token_sum import scored
    from distill.taps import trace

    model = subject.load(subject.head)
    batches = corpus.Batches(bench.heldout, seed=SEED, objective=subject.head, mask=MASK)
    positions = _positions(bench.heldout)
    for start in range(0, len(positions), ROWS):
        batch = batches.at(positions[start : start + ROWS])
        batch = batch if layout.packable(model.config) else corpus.unpack(batch)
        batch = {key: value.to(world.device()) for key, value in batch.items()}
        rows, labels = scored(batch["labels"], batch["segment_ids"], causal=subject.head == "causal")
        with torch.inference_mode():  # never around a yield: it would hold for the caller as well
            logits = trace(model, batch, (), rows).logits.float()
        yield logits, labels


def mean(values) -> Score:
    """Over tokens; the standard error takes them as independent, which flatters it a little."""
    return Score(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def _positions(heldout) -> range:
    return range(min(len(heldout), max(TOKENS // heldout.length, 1)))
