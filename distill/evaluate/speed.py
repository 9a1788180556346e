"""Tokens per second of a forward pass without a head: full rows of random tokens, float32.

The models take turns, so that what else the machine does falls on all of them alike; ratios mean more than values.
Checkpoints of one architecture are timed once and share the figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from distill.evaluate.score import Score

Key = TypeVar("Key")


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a forward pass without a head, in float32; models take turns."""

    batch: int = 8
    length: int = 128  # at most; the corpus may have shorter rows
    rounds: int = 5

    title = "tokens/s"
    better = "high"
    digits = 0
    quality = False

    def note(self, bench) -> str:
        import torch

        threads = torch.get_num_threads()
        return (
            f"forward pass without a head, {self.batch} x {self._length(bench)} tokens, float32, "
            f"{threads} thread{'s'[: threads != 1]}, median of {self.rounds} rounds in which the models take turns"
        )

    def check(self, bench) -> None:
        pass

    def measure(self, subjects: Sequence, bench) -> Iterator[Score]:
        first = {subject.architecture: subject for subject in reversed(subjects)}
        passes = {name: self._pass(subject, bench) for name, subject in first.items()}
        seconds = in_turns(passes, self.rounds)
        for subject in subjects:
            yield Score(self.batch * self._length(bench) / seconds[subject.architecture])

    def _length(self, bench) -> int:
        return min(self.length, bench.seen.length)

    def _pass(self, subject, bench):
        import torch

        from distill import layout

        model = subject.load()
        shape = self.batch, self._length(bench)
        ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids.to(model.device), "segment_ids": torch.ones_like(ids).to(model.device)}

        def run() -> None:
            with torch.inference_mode():
                model(**layout.inputs(model, batch))
            if model.device.type == "cuda":
                torch.cuda.synchronize()

        return run


def in_turns(passes: Mapping[Key, Callable[[], None]], rounds: int) -> dict[Key, float]:
    """Median seconds of each over so many rounds, after one that warms up."""
    seconds: dict[Key, list[float]] = {name: [] for name in passes}
    for turn in range(rounds + 1):
        for name, run in passes.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(found) for name, found in seconds.items()}
