"""Where text comes from: what `source:` in a recipe may say."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from distill.corpus import local, noise, stdlib, synthetic
from distill.corpus.documents import Document, bounded
from growth.errors import UserError, did_you_mean

NO_CLASS = -1  # of a hub data set's row without a label
PART = "part"  # as `label`: the class of a document is its part
EMBEDDED = {"stdlib": stdlib.prose, "stdlib-code": stdlib.code, "synthetic": synthetic.documents,
            "noise": noise.documents}  # fmt: skip


def documents(spec) -> Iterator[Document]:
    """The documents of a corpus in the order of their source, none longer than `documents.LONGEST` characters."""
    found = _several(spec) if _parts(spec) else _single(spec)
    if spec.label == PART:
        found = (document._replace(label=document.part) for document in found)
    return bounded(found)


def _several(spec) -> Iterator[Document]:
    named = (d._replace(part=name) for name, part in _parts(spec).items() for d in _single(part))
    return _of_parts(named, spec)


def _single(spec) -> Iterator[Document]:
    if spec.source in EMBEDDED:
        found = iter(_embedded(spec.source))
    elif is_path(spec.source):
        found = local.documents(Path(spec.source).expanduser(), spec.field, _column(spec))
    else:
        found = _hub(spec)
    return _limited(_of_parts(found, spec), spec)


@cache
def _embedded(source: str) -> tuple[Document, ...]:
    """Some megabytes; a recipe of several corpora reads the library once."""
    return tuple(EMBEDDED[source]())


def _column(spec) -> str | None:
    """The column that names classes."""
    return None if spec.label == PART else spec.label


def _of_parts(found: Iterator[Document], spec) -> Iterator[Document]:
    """Those of the parts asked for; read to its end, the source has them all."""
    if spec.parts is None:
        yield from found
        return
    seen = set()
    for document in found:
        seen.add(document.part)
        if document.part in spec.parts:
            yield document
    if strange := sorted(set(spec.parts) - seen):
        raise UserError(f"{said(spec)} has no part {strange[0]!r}{did_you_mean(strange[0], seen)}")


def _parts(spec) -> dict[str, Any]:
    """Of a corpus of several sources, each as a corpus of its own."""
    if isinstance(spec.source, str):
        return {}
    return {name: spec.model_copy(update={**dict(part), "parts": None}) for name, part in spec.source.items()}


def said(spec) -> str:
    """What the user is told of where text comes from."""
    return ", ".join(spec.sources)


def identity(spec) -> dict[str, Any]:
    """What the texts depend on besides the recipe: a corpus is prepared again when this has changed."""
    if parts := _parts(spec):
        return {name: identity(part) for name, part in parts.items()}
    if spec.source in EMBEDDED:
        return {"python": sys.version}
    if not is_path(spec.source):
        return {}
    root = Path(spec.source).expanduser()
    facts = ((str(file.relative_to(root)), file.stat()) for file in local.files(root))
    return {"files": [[name, about.st_size, about.st_mtime_ns] for name, about in facts]}


def about(spec) -> str:
    """A remark for the user."""
    if _parts(spec):
        return ""
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


def is_path(source: str) -> bool:
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
        raise UserError(f"data set {spec.source}: {first_line(error)}") from error


def _hub_rows(spec, name: str, configuration: str | None) -> Iterator[Document]:
    import datasets

    split = spec.split or "train"
    rows = datasets.load_dataset(
        name, configuration, split=split, revision=spec.revision, streaming=spec.limit is not None
    )
    features, column = rows.features or {}, _column(spec)
    named = {key: kind.names for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, row in enumerate(rows):
        for key in {local.LABEL, column} & named.keys():
            row[key] = named[key][row[key]] if row[key] not in (None, NO_CLASS) else None
        yield local.from_record(row, spec.field, split, f"{spec.source}: row {number}", column)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
