"""Some rows of a prepared corpus as a corpus of their own: the same tokens, the texts they stand for, no other ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distill.corpus import store
from distill.corpus.preparation import write_manifest
from distill.corpus.rows import about_side, rows_per_shard, write_spans
from distill.corpus.split import Sides
from growth.errors import UserError


def write(
    src: Path,
    directory: Path,
    kept: Mapping[str, np.ndarray],
    request: dict,
    *,
    classes: list[str] | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
) -> None:
    """The files of a corpus in `directory`: these rows of each side, in this order.

    Their classes are those they had, or `labels` [rows kept], places in `classes`. `request` is kept in the manifest:
    what it was made from.
    """
    sources = {side: store.open(src, side) for side in kept}
    texts, sides = Sides(directory, kept), {}
    for side, rows in kept.items():
        if not len(rows):
            raise UserError(f"{src}: no row of the {side} part is left")
        sides[side] = _write_side(sources[side], rows, texts, side, directory)
    texts.close()
    some = next(iter(sources.values()))
    texts.classes = classes or some.classes
    if texts.classes:
        for side, rows in kept.items():
            values = labels[side] if labels else sources[side].labels[rows]
            store.write_array(directory / store.labels_name(side), values.astype(np.int32))
    some.tokenizer.save_pretrained(directory / store.TOKENIZER)
    write_manifest(directory, texts, sides, some.tokenizer, some.length, request)


def _write_side(source: store.Corpus, rows: np.ndarray, texts: Sides, side: str, directory: Path) -> dict:
    spans, row_of = source.spans.of(rows)
    documents, numbered = np.unique(spans[:, 0], return_inverse=True)
    for document in documents.tolist():
        texts.add(source.texts[document], source.manifest["parts"][source.texts.parts[document]], side)
    write_spans(directory, side, np.column_stack([numbered, spans[:, 1:]]), row_of)
    filled, step = 0, rows_per_shard(source.length)
    for number, start in enumerate(range(0, len(rows), step)):
        ids, segments = source.block(rows[start : start + step].tolist())
        kinds = np.min_scalar_type(source.facts.vocabulary - 1), np.min_scalar_type(source.length)
        store.write_shard(directory, side, number, ids.astype(kinds[0]), segments.astype(kinds[1]))
        filled += int((segments > 0).sum())
    return about_side(len(documents), len(spans), filled, len(rows), source.length)
