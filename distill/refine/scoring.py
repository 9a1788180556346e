"""What one model thinks of every row of a corpus, written down row by row: sums of log-probabilities, tokens, bytes.

Rows are read in blocks that do not depend on ranks, and a block is written whole: whoever takes it, and however
often a run was killed, its numbers are the same. A row's documents are read apart from each other, longest first and
together with others of their length, so hardly anything is padded and no token sees another document.
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill import layout, loading, models, scores, sources, world
from distill.corpus import Corpus, tokens
from distill.reading import next_tokens, passes
from distill.refine.likelihood import likelier, log_probabilities
from distill.scores import About, Column, Writer
from distill.scores.keys import documents, row_keys
from distill.teachers.spans import Writing
from growth import files
from growth.console import bar, count
from growth.errors import UserError

PASSES = 8  # forward passes of a block: documents of one length are found among so many
TOKENS, TOKENS_ON_A_GPU = 4096, 1 << 16  # of a forward pass, unless told otherwise; measured; a guess
LONGER = 4  # a row in another tokeniser's tokens may be so many times as long before it is cut

COLUMNS = {
    "logp": Column("float64", unit="nats, the sum over all tokens but the first of each document"),
    "tokens": Column("int32", unit="tokens in that sum"),
    "bytes": Column("int32", unit="bytes of text in that sum"),
}
MEDIAN = {
    "median": Column("float64", unit="nats, the median loss of learnable tokens; 0 without any"),
    "learnable": Column("int32", unit="tokens among the k that the model likes best"),
}


class Block(NamedTuple):
    """The documents of some rows as a model reads them."""

    documents: list[np.ndarray]
    row: np.ndarray  # of each document, by its place in the block
    bytes: np.ndarray  # of each document, without a first token that nothing predicts


def score(
    text: Corpus,
    model: Path,
    out: Path,
    *,
    precision: str = "float32",
    k: int | None = None,
    forward: int | None = None,
    label: str = "score",
) -> dict[str, Any]:
    """The store in `out` of what the model in a directory says of every row, all ranks together; what it amounts to.

    With `k` also the median loss of the tokens that are among the model's k likeliest (SALT-DS: hard yet learnable).
    `forward`: tokens of one forward pass.
    """
    scorer, began = Scorer(text, model, precision, k, forward), time.perf_counter()
    fresh, failure = 0, None
    try:
        with Writer(out, scorer.about, world.rank()) as writer:
            fresh = scorer.run(writer, label)
    except BaseException as error:  # the others must not be left waiting
        failure = error
    world.raise_together(failure)
    (fresh,) = world.agree(fresh)
    world.first(lambda: scores.seal(out))
    seconds = time.perf_counter() - began
    return {"tokens": int(fresh), "seconds": round(seconds, 2), "tokens_per_second": round(fresh / seconds, 1)}


class Scorer:
    """A model over the rows of a corpus; a tokeniser of its own reads the text that they stand for."""

    def __init__(self, text: Corpus, path: Path, precision: str, k: int | None, forward: int | None):
        self.text, self.path, self.k = text, Path(path), k
        config = loading.configuration(self.path)
        if not loading.causal(config):
            raise UserError(f"{path}: {config.model_type} does not predict next tokens, so it has no likelihood")
        self.tokenizer = tokens.load(self.path)
        self.facts, self.digest = tokens.facts(self.tokenizer), tokens.digest(self.tokenizer)
        self.own = self.digest == text.manifest["tokenizer_digest"]
        self.length = _length(config, text.length, self.own, self.path)
        if self.facts.vocabulary > config.vocab_size:
            raise UserError(f"{path}: its tokeniser has {self.facts.vocabulary} ids, its model {config.vocab_size}")
        self.model = models.freeze(models.load(self.path, "causal", getattr(torch, precision))).to(world.device())
        self.forward = forward or (TOKENS_ON_A_GPU if world.device().type == "cuda" else TOKENS)

    @cached_property
    def about(self) -> About:
        producer = {
            "model_digest": sources.weights_sha256(self.path),
            "tokenizer_digest": self.digest,
            "lengths": self.length,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "k": self.k,
        }
        return About("likelihood", COLUMNS | (MEDIAN if self.k else {}), [producer], self.text.digest)

    def run(self, writer: Writer, label: str) -> int:
        """This rank's blocks, those that are there left out; the tokens that were scored."""
        done, began, mine = 0, time.perf_counter(), self._blocks()[world.rank() :: world.size()]
        with bar(sum(map(len, mine)), label) as advance:
            for rows in mine:
                keys = row_keys(*self.text.block(rows))
                if writer.missing(keys).any():
                    values = self.values(rows)
                    files.fault("score.block")
                    writer.add(keys, values)
                    done += int(values["tokens"].sum())
                advance(len(rows), note=f"{count(done / (time.perf_counter() - began))} tok/s")
        return done

    def values(self, rows: range) -> dict[str, np.ndarray]:
        """The columns of some rows."""
        block = self._read(rows)
        lengths = np.array([len(one) for one in block.documents], dtype=np.int64)
        found = [np.empty(0)] * len(lengths), [np.empty(0, dtype=bool)] * len(lengths)
        predicted = np.flatnonzero(lengths > 1)
        for places in passes(lengths[predicted], self.forward):
            some = predicted[places]
            for column, values in zip(found, self._losses([block.documents[i] for i in some]), strict=False):
                for place, value in zip(some, values, strict=True):
                    column[place] = value
        sums = np.array([one.sum(dtype=np.float64) for one in found[0]])
        columns = {
            "logp": 0.0 - np.bincount(block.row, sums, minlength=len(rows)),
            "tokens": np.bincount(block.row, np.maximum(lengths - 1, 0), minlength=len(rows)).astype(np.int32),
            "bytes": np.bincount(block.row, block.bytes, minlength=len(rows)).astype(np.int32),
        }
        return columns | (_medians(block.row, *found, len(rows)) if self.k else {})

    def _losses(self, several: list[np.ndarray]) -> list[list[np.ndarray]]:
        """[of each token of these documents but the first]; with k a second list: is it among the k likeliest?"""
        lengths = np.cumsum([len(one) - 1 for one in several])[:-1]
        head, targets = next_tokens(self.model, several)
        if self.k is None:
            return [np.split(-log_probabilities(head, targets).cpu().numpy(), lengths)]
        found, better = likelier(head, targets)
        return [np.split(values.cpu().numpy(), lengths) for values in (-found, better < self.k)]

    def _blocks(self) -> list[range]:
        size = max(1, PASSES * self.forward // self.text.length)
        return [range(first, min(first + size, len(self.text))) for first in range(0, len(self.text), size)]

    def _read(self, rows: range) -> Block:
        spans, row = self.text.spans.of(np.array(rows))
        if self.own:
            several = documents(*self.text.block(rows))
            sizes = spans[:, 2].astype(np.int64) - spans[:, 1]
        else:
            several, row, sizes = self._read_again(spans, row)
        return Block(several, row, np.maximum(sizes - self._unpredicted(several), 0))

    def _read_again(self, spans: np.ndarray, row: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The texts of the spans in the model's own tokens."""
        texts = [self.text.texts.slice(*map(int, span)) for span in spans]
        ends = [int(end) == self.text.texts.size(int(document)) for document, _, end in spans]
        cut = list(tokens.pieces(self.tokenizer, texts, self.facts, self.length, ends))
        pieces = [piece for several in cut for piece in several]
        again = np.repeat(row, [len(several) for several in cut])
        sizes = np.array([piece.end - piece.start for piece in pieces], dtype=np.int64)
        return [np.array(piece.ids, dtype=np.int64) for piece in pieces], again, sizes

    def _unpredicted(self, several: list[np.ndarray]) -> np.ndarray:
        """Bytes of each document's first token, which nothing predicts; none where a special token stands first."""
        if self.facts.prefix:
            return np.zeros(len(several), dtype=np.int64)
        return np.array([self._sizes.get(int(one[0]), 0) for one in several], dtype=np.int64)

    @cached_property
    def _sizes(self) -> dict[int, int]:
        """Bytes of text that each token stands for where a text begins with it."""
        spelt = Writing(self.tokenizer).bytes
        blank = spelt[tokens.encode(self.tokenizer, ["a"])[0][0]][:1] == b" "  # which it puts there itself
        return {token: len(piece) - (blank and piece[:1] == b" ") for token, piece in spelt.items()}


def _length(config, length: int, own: bool, path: Path) -> int:
    """Tokens that the model reads in one piece."""
    longest = layout.longest(config)
    if own and longest and longest < length:
        raise UserError(f"{path} has positions for {longest} tokens, the rows of the corpus have {length}")
    learned = config.to_dict().get("max_position_embeddings")  # computed positions go on, but nobody was taught them
    return length if own else min(longest or learned or length, LONGER * length)


def _medians(row: np.ndarray, losses: list[np.ndarray], within: list[np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Of the losses of each row's learnable tokens."""
    good = np.concatenate([np.empty(0, dtype=bool), *within])
    where = np.repeat(row, [len(one) for one in losses])[good]
    loss = np.concatenate([np.empty(0), *losses])[good][np.argsort(where, kind="stable")]
    learnable = np.bincount(where, minlength=rows)
    each = np.split(loss, np.cumsum(learnable)[:-1])
    return {
        "median": np.array([np.median(some) if len(some) else 0.0 for some in each], dtype=np.float64),
        "learnable": learnable.astype(np.int32),
    }
