"""A model that teaches: as it is, in the precision of the run, without gradients; and in whose ids it reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from distill import classifiers, layout, loading, models, world
from distill.corpus import Corpus, tokens
from distill.objectives.protocol import Needs
from distill.teachers import depth, vocabularies
from distill.teachers.alignment import Alignment
from growth import files
from growth.errors import UserError


def frozen(
    reference: str,
    head: str | None,
    context,
    classes: Sequence[str] | None = None,
    needs: Sequence[Needs] = (),
    shared: bool = False,
) -> nn.Module:
    """A model or stage on this rank's device, with its head if an objective asks for its logits.

    A head that classifies has these classes, in this order. `needs`: of objectives, whose deepest tap says how many
    layers are loaded. `shared`: it is not on the device yet, but mapped from its file, in the precision that it has.
    """
    path, dtype = context.model(reference), None if shared else getattr(torch, context.dtype(reference))
    if head == "classify":
        model = classifiers.load(path, classes, dtype)
    else:
        model = models.load(path, head, dtype, first=depth.shortened(files.read_json(path / "config.json"), needs))
    return models.freeze(model) if shared else models.freeze(model).to(world.device())


def insist_on_pieces(model: nn.Module, reference: str, context, text: Corpus) -> None:
    """Its logits must be of the pieces of a corpus: tokenisers that were learned on the way are compared only now."""
    theirs = tokens.load(context.model(reference))
    found = vocabularies.match(text.tokenizer, theirs, text.facts.vocabulary, model.config.vocab_size)
    if not found:
        raise UserError(f"{reference} and the corpus have different vocabularies: {found.reason}; {vocabularies.WORKS}")


def alignment(reference: str, context, text: Corpus) -> Alignment:
    """Of the tokeniser of a corpus with the teacher's own."""
    path = context.model(reference)
    theirs = tokens.load(path)
    if tokens.digest(theirs) == tokens.digest(text.tokenizer):
        raise UserError(vocabularies.same(reference))
    return Alignment(text.tokenizer, theirs, layout.longest(loading.configuration(path)))
