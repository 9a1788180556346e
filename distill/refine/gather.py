"""Rows of prepared corpora as a corpus of their own, with the text they stand for. No torch.

Pieces of a document that follow each other stay one text; what no chosen row has is left out, and nothing is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill import corpus
from distill.corpus import Corpus, store
from distill.corpus.preparation import write_manifest
from distill.corpus.rows import about_side, rows_per_shard, write_spans
from distill.corpus.split import Sides
from growth import files
from growth.errors import UserError

STEP = 4096  # rows in memory at once


class Chosen(NamedTuple):
    """Some rows of one side of a corpus, in the order wanted; `names`: classes that they are given."""

    text: Corpus
    rows: np.ndarray
    names: np.ndarray | None = None


def gather(
    out: Path, given: dict[str, Sequence[Chosen]], request: dict[str, Any], classes: Sequence[str] | None = None
) -> None:
    """The corpus in `out` of the rows that are given of each side; `request` says in the manifest how it came about.

    `classes`: the names of all classes, where they are not those of the first corpus.
    """
    first = given[store.TRAIN][0].text
    with files.committed(out, overwrite=True) as directory:
        texts = Sides(directory, given, classes or first.classes or ())
        spans = {side: [_write_texts(chosen, side, texts) for chosen in several] for side, several in given.items()}
        texts.close()
        sides = {side: _write_side(several, spans[side], side, directory) for side, several in given.items()}
        first.tokenizer.save_pretrained(directory / store.TOKENIZER)
        write_manifest(directory, texts, sides, first.tokenizer, first.length, first.manifest["packing"], request)


def heldout(path: Path) -> list[Chosen]:
    """All rows that a corpus holds out, if it does."""
    if store.HELDOUT not in store.read_manifest(path)["sides"]:
        return []
    text = corpus.open(path, store.HELDOUT)
    return [Chosen(text, np.arange(len(text)))]


def _write_texts(chosen: Chosen, side: str, texts: Sides) -> tuple[np.ndarray, np.ndarray]:
    """Append the text of the rows; (document, first byte, end) of each of their pieces in it, and the row of each."""
    spans, row = chosen.text.spans.of(chosen.rows)
    spans = spans.astype(np.int64)
    order = np.lexsort((spans[:, 2], spans[:, 1], spans[:, 0]))
    document, start, end = spans[order].T
    classes = _classes(chosen, row)[order]
    other = (document[1:] != document[:-1]) | (start[1:] != end[:-1]) | (classes[1:] != classes[:-1])
    opens = np.append(True, other)
    heads = np.flatnonzero(opens)
    number = np.cumsum(opens) - 1  # the new document of each piece
    before, parts = len(texts[side].ends), chosen.text.manifest["parts"]
    for head, last in zip(heads, np.append(heads[1:], len(order)) - 1, strict=True):
        text = chosen.text.texts.slice(int(document[head]), int(start[head]), int(end[last]))
        texts.add(text, parts[chosen.text.texts.parts[document[head]]], side, classes[head])
    new = np.empty_like(spans)
    new[order] = np.stack([before + number, start - start[heads][number], end - start[heads][number]], axis=1)
    return new, row


def _classes(chosen: Chosen, row: np.ndarray) -> np.ndarray:
    """The name of the class of each piece, None where it is not known."""
    if chosen.names is not None:
        return chosen.names[row]
    names = np.array([*(chosen.text.classes or ()), None], dtype=object)  # the last place is that of UNKNOWN, -1
    return names[chosen.text.labels[chosen.rows[row]]]


def _write_side(several: Sequence[Chosen], spans: list[tuple], side: str, directory: Path) -> dict:
    length = several[0].text.length
    rows = sum(len(chosen.rows) for chosen in several)
    if not rows:
        raise UserError(f"no row of the {side} side is left")
    before = np.cumsum([0, *(len(chosen.rows) for chosen in several)])
    row_of = np.concatenate([row + first for (_, row), first in zip(spans, before, strict=False)])
    write_spans(directory, side, np.concatenate([new for new, _ in spans]), row_of)
    filled = _write_rows(several, side, directory)
    documents = 1 + max(int(new[:, 0].max()) for new, _ in spans)
    return about_side(documents, len(row_of), filled, rows, length)


def _write_rows(several: Sequence[Chosen], side: str, directory: Path) -> int:
    """The shards; tokens in them without padding."""
    size, held, number, filled = rows_per_shard(several[0].text.length), [], 0, 0
    for ids, segments in _blocks(several):
        filled += int((segments > 0).sum())
        held.append((ids, segments))
        while sum(len(part[0]) for part in held) >= size:
            ids, segments = (np.concatenate(column) for column in zip(*held, strict=True))
            store.write_shard(directory, side, number, ids[:size], segments[:size])
            held, number = [(ids[size:], segments[size:])], number + 1
    if held and sum(len(part[0]) for part in held):
        store.write_shard(directory, side, number, *(np.concatenate(column) for column in zip(*held, strict=True)))
    return filled


def _blocks(several: Sequence[Chosen]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for text, rows, _ in several:
        types = np.min_scalar_type(text.facts.vocabulary - 1), np.min_scalar_type(text.length)
        for first in range(0, len(rows), STEP):
            block = text.block(rows[first : first + STEP])
            yield tuple(values.astype(kind) for values, kind in zip(block, types, strict=True))
