"""Corpora from corpora: in other tokens, in other words, or rows of several. No torch."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill import corpus
from distill.corpus import Corpus, store, tokens
from distill.corpus.preparation import fill, trained
from distill.corpus.split import Sides
from distill.refine.gather import Chosen, gather
from growth import files
from growth.errors import UserError

WORD = re.compile(r"[^\W\d_]+")  # letters alone
MARKED = ("Ġ", "▁")  # how vocabularies of bytes and of sentencepiece mark the beginning of a word
SHORTEST = 3  # letters of a word that is drawn; below are pieces and single letters


def retokenize(src: Path, out: Path, tokenizer=None, *, train=None, length: int | None = None) -> dict[str, Any]:
    """The texts of the corpus in `src`, every one of them, in the tokens of another tokeniser or one to be learned.

    A document is packed whole again where all of its pieces are there. Parts that shared no row share none.
    """
    manifest = store.read_manifest(src)
    length = length or manifest["length"]
    with files.committed(out, overwrite=True) as directory:
        texts = _copied(src, directory, manifest)
        tokenizer = tokenizer or trained(train, directory)
        request = {"retokenize": tokens.digest(tokenizer), "of": manifest["digest"]}
        fill(directory, texts, tokenizer, length, manifest["packing"], request)
    made = store.read_manifest(out)
    return {"rows": made["rows"], "tokens": {side: about["tokens"] for side, about in made["sides"].items()}}


def augment(src: Path, out: Path, copies: int = 1, share: float = 0.4, seed: int = 0) -> dict[str, Any]:
    """The texts of the corpus in `src`, and of those to train on copies with this share of their words replaced.

    What is held out stays as it is.
    """
    manifest, draw = store.read_manifest(src), random.Random(seed)
    tokenizer = corpus.open(src).tokenizer
    words = whole_words(tokenizer.get_vocab())

    def copied(text: str) -> list[str]:
        return [reworded(text, words, share, draw) for _ in range(copies)]

    with files.committed(out, overwrite=True) as directory:
        texts = _copied(src, directory, manifest, copied)
        request = {"augment": [copies, share, seed], "of": manifest["digest"]}
        fill(directory, texts, tokenizer, manifest["length"], manifest["packing"], request)
    return {"rows": store.read_manifest(out)["rows"], "words": len(words)}


def reworded(text: str, words: list[str], share: float, draw: random.Random) -> str:
    """Each word is another one with this probability; what stands between words stays."""
    return WORD.sub(lambda found: draw.choice(words) if draw.random() < share else found[0], text)


def whole_words(pieces: Iterable[str]) -> list[str]:
    """The words of a vocabulary, sorted; where it marks what begins a word, only those."""
    pieces = list(pieces)
    begins = [piece[1:] for piece in pieces if piece.startswith(MARKED)] or pieces
    words = sorted({piece for piece in begins if len(piece) >= SHORTEST and WORD.fullmatch(piece)})
    if not words:
        raise UserError("augment draws words from the tokeniser's vocabulary, and this one has none")
    return words


def _copied(
    src: Path, directory: Path, manifest: dict, copies: Callable[[str], Iterable[str]] = lambda text: ()
) -> Sides:
    """The same texts, parts and classes; behind each one to train on its `copies`."""
    texts = Sides(directory, manifest["sides"], manifest["classes"] or ())
    for side in manifest["sides"]:
        text = corpus.open(src, side)
        classes = _classes(text)
        for i, one in enumerate(text.texts):
            for each in (one, *(copies(one) if side == store.TRAIN else ())):
                texts.add(each, manifest["parts"][text.texts.parts[i]], side, classes[i])
    texts.close()
    return texts


def _classes(text: Corpus) -> list[str | None]:
    """Of every document."""
    found: list[str | None] = [None] * len(text.texts)
    for document, label in zip(text.spans.all[:, 0], text.labels if text.classes else (), strict=False):
        found[document] = None if label == store.UNKNOWN else text.classes[label]
    return found


def mix(src: Path, out: Path, others: Mapping[Path, float]) -> dict[str, Any]:
    """Rows of the corpus in `src` and of others, in these shares; as many as there are without a row twice.

    Of each corpus they come from all over it and keep their order. What is held out is mixed likewise.
    """
    shares = [(Path(src), 1 - sum(others.values())), *((Path(path), share) for path, share in others.items())]
    sides = [side for side in store.SIDES if all(side in store.read_manifest(path)["sides"] for path, _ in shares)]
    given = {side: _shared([(corpus.open(path, side), share) for path, share in shares]) for side in sides}
    gather(out, given, {"mix": [chosen.text.digest for chosen in given[store.TRAIN]], "shares": [n for _, n in shares]})
    return {"rows": [len(chosen.rows) for chosen in given[store.TRAIN]]}


def _shared(shares: list[tuple[Corpus, float]]) -> list[Chosen]:
    first, _ = shares[0]
    for text, _ in shares:
        if (text.manifest["tokenizer_digest"], text.length) != (first.manifest["tokenizer_digest"], first.length):
            raise UserError(f"{text.path} has another tokeniser or other rows than {first.path}; retokenize it first")
    whole = min(len(text) / share for text, share in shares if share)
    counts = [(text, math.floor(whole * share + 1e-9)) for text, share in shares]
    return [Chosen(text, np.arange(n) * len(text) // max(n, 1)) for text, n in counts]
