"""A target that no model answers for: what a teacher said was written down by a `cache` stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from distill import corpus, world
from distill.corpus.masking import NONE
from distill.heads import Logits
from distill.objectives.protocol import Needs
from distill.objectives.sparse import Sampled, Spoken, TopK
from distill.objectives.token_sum import scored
from distill.refine.cache import behind
from distill.scores import Reader
from distill.scores.keys import document_keys, documents
from distill.sources import weights_of
from distill.taps import Trace
from distill.teachers.alignment import Alignment
from distill.teachers.frozen import alignment
from distill.teachers.kept import HEAD, KEEPS, Keep, KeepHidden
from growth import files
from growth.errors import UserError


class Cached:
    """Values of next tokens, found by the content of documents: whether these share rows does not matter."""

    calls = 0  # forward passes
    models = ()

    def __init__(self, path: Path, device: torch.device, alignment: Alignment | None = None):
        """`alignment`: with the student's tokeniser, where the teacher has read in ids of its own."""
        self.alignment = alignment
        world.first(lambda: Reader(path))  # reads every byte, once
        self.reader, self.device = Reader(path, verify=False), device
        self.producer = self.reader.about.producers[0]
        self.keep = self._keep(path)

    def _keep(self, path: Path) -> Keep:
        keep = KEEPS[self.reader.about.kind](**self.producer["settings"])
        if not isinstance(keep, KeepHidden):
            return keep
        if files.sha256(path / HEAD) != self.producer["head"]:
            raise UserError(f"{path / HEAD} is not the one that was written; cache again")
        return keep.load(path, self.device)

    def take(self, batch: dict, needs: list[Needs]) -> Trace:
        """The head alone, of the rows that `scored` names; there is nothing to tap."""
        ids, segments, labels = (batch[name].cpu() for name in ("input_ids", "segment_ids", "labels"))
        several = [one for one in documents(ids.numpy(), segments.numpy()) if len(one) > 1]
        found = self.reader.tensors(document_keys(several))
        head = self.keep.restored({name: values.values for name, values in found.items()})
        every, _ = scored(ids.masked_fill(segments == 0, NONE), segments, causal=True)
        asked, _ = scored(labels, segments, causal=True)
        return Trace({}, {}, causal=True, head=_rows(head, torch.searchsorted(every, asked), self.device))


Head = TopK | Sampled | Spoken | Logits


def _rows(head: Head, rows: Tensor, device: torch.device) -> Head:
    if isinstance(head, Logits):
        return replace(head, hidden=head.hidden[rows].to(device))
    values = {one.name: getattr(head, one.name) for one in fields(head)}
    return replace(head, **{name: x[rows].to(device) for name, x in values.items() if isinstance(x, Tensor)})


def opened(spec, context, text: corpus.Corpus) -> Cached:
    """The target `{cache: stage}` of a run that trains on this corpus; another teacher's or text's is refused."""
    op = behind(context.recipe, spec)
    told = alignment(op.teacher, context, text) if op.keep == "likelihood" else None
    source = Cached(context.scores(spec.cache), world.device(), told)
    world.first(lambda: refuse_other(source, spec, context, text))
    return source


def refuse_other(source: Cached, spec, context, text: corpus.Corpus) -> None:
    wrong = [
        f"its {what} is {there[:12]}, the run's {here[:12]}"
        for what, there, here in _identities(source, spec, context, text)
        if there != here
    ]
    if wrong:
        raise UserError(f"{source.reader.path} holds something else: {'; '.join(wrong)}; cache again")


def _identities(source: Cached, spec, context, text: corpus.Corpus) -> Iterator[tuple[str, str, str]]:
    """(what, in the cache, in the run)."""
    there, teacher = source.producer, behind(context.recipe, spec).teacher
    yield "teacher", there["model_digest"], weights_of(teacher, context)
    yield "tokeniser", there["tokenizer_digest"], text.manifest["tokenizer_digest"]
    yield "corpus", source.reader.about.corpus_digest, text.digest
