"""Where text comes from: what `source:` in a recipe may say."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.corpus import local, stdlib, synthetic
from distill.corpus.documents import Document, bounded
from growth.errors import UserError, did_you_mean

EMBEDDED = {"stdlib": stdlib.prose, "stdlib-code": stdlib.code, "synthetic": synthetic.documents}


def documents(spec) -> Iterator[Document]:
    """The documents of a corpus in the order of their source, none longer than `documents.LONGEST` characters."""
    if spec.source in EMBEDDED:
        found = EMBEDDED[spec.source]()
    elif _is_path(spec.source):
        found = local.documents(Path(spec.source).expanduser(), spec.field)
    else:
        found = _hub(spec)
    return bounded(_limited(found, spec))


def identity(spec) -> dict[str, Any]:
    """What the texts depend on besides the recipe: a corpus is prepared again when this has changed."""
    if spec.source in EMBEDDED:
        return {"python": sys.version}
    if not _is_path(spec.source):
        return {}
    root = Path(spec.source).expanduser()
    facts = ((str(file.relative_to(root)), file.stat()) for file in local.files(root))
    return {"files": [[name, about.st_size, about.st_mtime_ns] for name, about in facts]}


def about(spec) -> str:
    """A remark for the user."""
    if spec.source == "synthetic":
        grammar = synthetic.grammar()
        return f", entropy {grammar.bits:.2f} bits a document, {grammar.bits / grammar.words:.3f} bits a word"
    return f" of Python {sys.version.split()[0]}" if spec.source in EMBEDDED else ""


def _limited(found: Iterator[Document], spec) -> Iterator[Document]:
    """`limit` documents: the first of a stream, but evenly many from all over an embedded source, which is sorted."""
    if spec.limit is None or spec.source not in EMBEDDED:
        return itertools.islice(found, spec.limit)
    every = list(found)
    kept = min(spec.limit, len(every))
    return (every[i * len(every) // kept] for i in range(kept))


def _is_path(source: str) -> bool:
    """What exists here, or cannot be a name on the hub."""
    path = Path(source).expanduser()
    looks_like_one = source.startswith((".", "/", "~")) or local.kind(path) in local.READERS or source.count("/") > 1
    return path.exists() or looks_like_one


def _hub(spec) -> Iterator[Document]:
    """A data set of the hub, `owner/name` or `owner/name:configuration`; with a limit it is streamed."""
    name, _, configuration = spec.source.partition(":")
    if "/" not in name:
        known = f"{', '.join(EMBEDDED)}, a path or a data set on the hub (owner/name)"
        raise UserError(f"no source {spec.source!r}{did_you_mean(spec.source, EMBEDDED)}; there are {known}")
    import datasets

    try:
        yield from _hub_rows(spec, name, configuration or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data set {spec.source}: {_first_line(error)}") from error


def _hub_rows(spec, name: str, configuration: str | None) -> Iterator[Document]:
    import datasets

    split = spec.split or "train"
    rows = datasets.load_dataset(
        name, configuration, split=split, revision=spec.revision, streaming=spec.limit is not None
    )
    label = rows.features.get(local.LABEL) if rows.features else None
    names = label.names if isinstance(label, datasets.ClassLabel) else None
    for number, row in enumerate(rows):
        if names and row[local.LABEL] is not None:
            row[local.LABEL] = names[row[local.LABEL]]
        yield local.from_record(row, spec.field, split, f"{spec.source}: row {number}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
