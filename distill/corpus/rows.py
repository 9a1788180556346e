"""The rows of one side of a corpus: its texts tokenised, packed and written."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distill.corpus import packing, store, tokens
from growth import files
from growth.console import bar
from growth.errors import UserError

SHARD = 1 << 22  # places of a shard; filling it takes about fifty bytes a place
BLOCK = 1 << 20  # characters tokenised at once


def write_side(
    tokenizer, facts: tokens.Facts, length: int, side: str, directory: Path, *, packed: bool = True, apart: bool = False
) -> dict:
    """The rows of the texts in `directory` as shards beside them; what the manifest says about them.

    `packed`: several documents share a row; `apart`: only documents of one part do.
    """
    spool, texts = directory / "tokens.tmp", store.Texts(directory, side)
    lengths, spans = _tokenise(texts, tokenizer, facts, length, spool, f"tokenising ({side})")
    parts = texts.parts[spans[:, 0]] if apart else np.zeros(len(spans), dtype=np.uint32)
    layout = packing.Layout(lengths, _rows_of(lengths, parts, length, packed), length)
    _write_rows(layout, np.memmap(spool, dtype=np.uint32, mode="r"), facts, side, directory)
    write_spans(directory, side, spans[layout.order], layout.row_of)
    spool.unlink()
    return about_side(len(texts), len(lengths), int(lengths.sum()), layout.rows, length)


def about_side(documents: int, pieces: int, filled: int, rows: int, length: int) -> dict:
    fill = filled / (rows * length)
    return {"documents": documents, "pieces": pieces, "tokens": filled, "rows": rows, "fill": fill}


def write_spans(directory: Path, side: str, spans: np.ndarray, row_of: np.ndarray) -> None:
    """(document, first byte, end) of every piece in the order of the rows [P, 3], and where each row's pieces end."""
    ends = np.flatnonzero(np.diff(row_of, append=-1)) + 1
    store.write_array(directory / f"{side}.spans.npy", spans.astype(np.uint32))
    store.write_array(directory / f"{side}.spans.ends.npy", ends.astype(np.uint64))


def rows_per_shard(length: int) -> int:
    return max(1, SHARD // length)


def _rows_of(lengths: np.ndarray, parts: np.ndarray, length: int, packed: bool) -> np.ndarray:
    """The row of every piece, part after part."""
    row_of, opened = np.empty(len(lengths), dtype=np.int64), 0
    for part in np.unique(parts):
        here = parts == part
        row_of[here] = opened + (packing.best_fit if packed else packing.one_each)(lengths[here], length)
        opened = int(row_of[here].max()) + 1
    return row_of


def _tokenise(
    texts: store.Texts, tokenizer, facts: tokens.Facts, length: int, spool: Path, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """Write the tokens of all pieces of all documents end to end; their lengths [P] and spans [P, 3]."""
    lengths, spans = array("I"), array("I")
    with spool.open("wb") as file, bar(len(texts), label) as advance:
        for first, block in _blocks(texts):
            cut = list(tokens.pieces(tokenizer, block, facts, length))
            pieces = [(first + n, piece) for n, several in enumerate(cut) for piece in several]
            ids = itertools.chain.from_iterable(piece.ids for _, piece in pieces)
            file.write(np.array(list(ids), dtype=np.uint32).data)
            lengths.extend(len(piece.ids) for _, piece in pieces)
            spans.extend(itertools.chain.from_iterable((n, piece.start, piece.end) for n, piece in pieces))
            advance(len(block))
    if not lengths:
        raise UserError("the tokeniser finds no token in this corpus")
    return np.array(lengths, dtype=np.int64), np.array(spans, dtype=np.uint32).reshape(-1, 3)


def _blocks(texts: store.Texts) -> Iterator[tuple[int, list[str]]]:
    """(number of the first text, texts)."""
    first, block, held = 0, [], 0
    for text in texts:
        block.append(text)
        held += len(text)
        if held >= BLOCK:
            yield first, block
            first, block, held = first + len(block), [], 0
    if block:
        yield first, block


def _write_rows(layout: packing.Layout, ids: np.ndarray, facts: tokens.Facts, side: str, directory: Path) -> None:
    types = np.min_scalar_type(facts.vocabulary - 1), np.min_scalar_type(layout.length)
    needed = layout.rows * layout.length * sum(kind.itemsize for kind in types)
    files.ensure_space(directory, needed, "the prepared corpus")
    step = rows_per_shard(layout.length)
    for number, start in enumerate(range(0, layout.rows, step)):
        rows = range(start, min(start + step, layout.rows))
        store.write_shard(directory, side, number, *layout.fill(rows, ids, facts.pad, types))
