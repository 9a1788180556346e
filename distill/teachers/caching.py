"""One pass of a teacher over a corpus, written down token by token: what the data operation `cache` does.

Documents are read one by one, however they share rows, and found again by their content. They go through the teacher
in blocks of rows that depend on nothing but the recipe: whoever takes a block, and however often it was begun, its
values are the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill import corpus, scores, world
from distill.heads import Logits
from distill.reading import next_tokens, passes
from distill.scores import About, Ragged, Writer
from distill.scores.keys import document_keys, documents
from distill.sources import weights_of
from distill.teachers.alignment import Alignment
from distill.teachers.frozen import alignment, frozen, insist_on_pieces
from distill.teachers.kept import HEAD, Keep, KeepHidden, KeepLikelihood, KeepSampled, KeepTopK, Values, settings
from growth import console, files

PASSES = 8  # forward passes of a block: documents of similar length are found among so many


def write(op, src: Path, out: Path, context) -> dict[str, Any]:
    """The store in `out`, of the training side of a corpus, all ranks together; what stage.json says of it."""
    text, began = corpus.open(src, "train"), time.perf_counter()
    teacher = _teacher(op, text, context)
    keep = _keep(op, teacher)
    if isinstance(keep, KeepHidden):
        world.first(lambda: (out / HEAD).exists() or keep.save(out))
    about = About(op.keep, keep.columns(), [_producer(op, teacher, keep, out, context)], text.digest)
    work = Pass(teacher, keep, op.tokens)
    world.first(lambda: work.foretell(out))
    scored, failure = 0, None
    try:
        with Writer(out, about, world.rank()) as writer:
            scored = work.run(writer, out.parent.name)
    except BaseException as error:  # the others must not be left waiting
        failure = error
    world.raise_together(failure)
    (scored,) = world.agree(scored)
    world.first(lambda: scores.seal(out))
    held = _held(out)
    return {
        "tokens": int(scored),
        "bytes": held,
        "bytes_per_token": round(held / max(scored, 1), 2),
        "seconds": round(time.perf_counter() - began, 2),
    }


class Teacher:
    """What a frozen model says of the next tokens of documents; with an alignment it reads them in ids of its own."""

    def __init__(self, model: nn.Module, text: corpus.Corpus, seed: int, alignment: Alignment | None = None):
        self.model, self.text, self.seed, self.alignment = model, text, seed, alignment

    def documents(self, rows: range) -> list[np.ndarray]:
        """Those of some rows that have a next token to be predicted."""
        ids, segments = zip(*(self.text.row(i) for i in rows), strict=True)
        if self.alignment:
            told = self.alignment.tell(np.stack(ids), np.stack(segments))
            ids, segments = told.ids, told.segments
        return [one for one in documents(ids, segments) if len(one) > 1]

    def head(self, several: list[np.ndarray]) -> tuple[Logits, Tensor]:
        """Its logits at all tokens of these documents that have a next one, document after document; and that one."""
        head, following = next_tokens(self.model, several)
        return head if self.alignment else head.trimmed(self.text.facts.vocabulary), following

    def starts(self, several: list[np.ndarray], keys: np.ndarray) -> Tensor:
        """A number from 0 to 1 for each of these tokens: a function of the seed and of the document."""
        drawn = [
            np.random.default_rng([self.seed, *key.view(np.uint32).tolist()]).random(len(one) - 1)
            for one, key in zip(several, keys, strict=True)
        ]
        return torch.from_numpy(np.concatenate(drawn)).to(world.device())


def _teacher(op, text: corpus.Corpus, context) -> Teacher:
    model = frozen(op.teacher, "causal", context)
    if op.keep == "likelihood":
        return Teacher(model, text, context.seed, alignment(op.teacher, context, text))
    insist_on_pieces(model, op.teacher, context, text)
    return Teacher(model, text, context.seed)


def _keep(op, teacher: Teacher) -> Keep:
    vocabulary = teacher.text.facts.vocabulary
    if op.keep == "topk":
        return KeepTopK(op.k or min(64, vocabulary), op.dtype or "float16", vocabulary, op.temperature)
    if op.keep == "sampled":
        return KeepSampled(op.draws or 50, vocabulary, op.temperature)
    if op.keep == "likelihood":
        return KeepLikelihood()
    return KeepHidden.of(teacher.head([np.zeros(2, dtype=np.int64)])[0], op.dtype)


def _producer(op, teacher: Teacher, keep: Keep, out: Path, context) -> dict[str, Any]:
    """Who says what, and what of it is kept: with another one it is another store."""
    own = {"head": files.sha256(out / HEAD)} if isinstance(keep, KeepHidden) else {}
    return {
        "model_digest": weights_of(op.teacher, context),
        "tokenizer_digest": teacher.text.manifest["tokenizer_digest"],
        "lengths": teacher.text.length,
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "seed": teacher.seed if isinstance(keep, KeepSampled) else None,
        "settings": settings(keep),
        **own,
    }


@dataclass(frozen=True)
class Pass:
    """Over all rows of the corpus, `tokens` of them in a forward pass."""

    teacher: Teacher
    keep: Keep
    tokens: int

    def run(self, writer: Writer, label: str) -> int:
        """This rank's blocks, what is there already left out; how many tokens are scored in them."""
        mine, total, done = self._blocks()[world.rank() :: world.size()], 0, 0
        began = time.perf_counter()
        with console.bar(sum(map(len, mine)), label) as advance:
            for rows in mine:
                several = self.teacher.documents(rows)
                here = sum(len(one) - 1 for one in several)
                if several and writer.missing(document_keys(several)).any():
                    self._write(several, writer)
                    done += here
                total += here
                advance(len(rows), note=f"{console.count(done / (time.perf_counter() - began))} tok/s")
        return total

    def _write(self, several: list[np.ndarray], writer: Writer) -> None:
        for some in self._passes(several):
            files.fault("cache.pass")
            writer.add(document_keys(some), self._values(some))

    def _blocks(self) -> list[range]:
        text = self.teacher.text
        size = max(1, PASSES * self.tokens // text.length)
        return [range(first, min(first + size, len(text))) for first in range(0, len(text), size)]

    def _passes(self, several: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Documents of one forward pass each."""
        places = passes(np.array([len(one) for one in several]), self.tokens)
        return ([several[i] for i in place] for place in places)

    def _values(self, several: list[np.ndarray]) -> dict[str, Ragged]:
        """Of documents, from those of their tokens."""
        made = self._kept(several)
        lengths = [len(one) - 1 for one in several]
        return {name: _by_document(values, lengths) for name, values in made.items()}

    def _kept(self, several: list[np.ndarray]) -> Values:
        return self.keep.kept(*self.teacher.head(several), self.teacher.starts(several, document_keys(several)))

    def foretell(self, out: Path) -> None:
        """Say how much will be written, and refuse now what the disk cannot hold; a sample's size is tried out."""
        several = self.teacher.documents(self._blocks()[0])
        if not several:
            return
        count, tokens = self._size(several)
        tried = self._kept(next(self._passes(several)))
        length = {name: _mean(values) * tokens / count for name, values in tried.items()}
        needed = scores.forecast(self.keep.columns(), count, length)
        console.say(
            f"{out.parent.name}: {console.count(tokens)} tokens of {needed / tokens:.0f} bytes each, "
            f"{console.size(needed)} together (a forecast)"
        )
        files.ensure_space(out, needed - _held(out), "the cache")

    def _size(self, several: list[np.ndarray]) -> tuple[float, float]:
        """(documents, tokens that are scored) of all; of those told in other ids as many as the first block has."""
        about, share = self.teacher.text.manifest["sides"]["train"], len(self.teacher.text) / len(self._blocks()[0])
        if self.teacher.alignment:
            return len(several) * share, sum(len(one) - 1 for one in several) * share
        return about["pieces"], about["tokens"] - about["pieces"]


def _held(out: Path) -> int:
    """Bytes of the shards."""
    return sum(path.stat().st_size for path in out.glob("r*"))


def _by_document(values: Tensor | Ragged, lengths: list[int]) -> Ragged:
    if not isinstance(values, Ragged):
        return Ragged(values, torch.tensor(lengths))
    return Ragged(values.values, torch.stack([each.sum() for each in values.lengths.split(lengths)]).cpu())


def _mean(values: Tensor | Ragged) -> float:
    """How many values a token has."""
    return len(values.values) / len(values.lengths) if isinstance(values, Ragged) else 1.0
