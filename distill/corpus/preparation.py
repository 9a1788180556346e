"""Text to rows: split, tokenise, pack, write. All of it or nothing appears under the final name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from distill.corpus import sources, store, tokens, vocabulary
from distill.corpus.rows import rows_per_shard, write_side
from distill.corpus.split import Sides, split
from growth import files
from growth.console import count, say, size
from growth.errors import UserError


def prepare(spec, tokenizer_source: Path | None, out: Path) -> None:
    """Make the corpus a recipe asks for, unless it is there already.

    The tokeniser is that of `tokenizer_source`, or trained on the training side if that is None.
    """
    tokenizer = tokens.load(tokenizer_source) if tokenizer_source else None
    request = _request(spec, tokenizer)
    if _is_there(out, request):
        return
    with files.committed(out, overwrite=True) as directory:
        texts = split(sources.documents(spec), spec.heldout, directory, sources.said(spec))
        _insist_on_classes(spec, texts.classes)
        tokenizer = tokenizer or trained(spec.tokenizer.train, directory)
        apart = not isinstance(spec.source, str)  # each source in rows of its own
        fill(directory, texts, tokenizer, spec.length, {"packed": spec.packed, "apart": apart}, request)
    _tell(spec, store.read_manifest(out))


def _insist_on_classes(spec, found: list[str] | None) -> None:
    if spec.label and len(found or ()) < 2:
        of = f"one class alone, {found[0]!r}" if found else "no class"
        raise UserError(f"{sources.said(spec)}: label: {spec.label} gives {of}; `part`, or a column that says more")


def _request(spec, tokenizer) -> dict:
    """What a corpus depends on: with another one it is made anew."""
    keys = ("source", "field", "split", "revision", "limit", "length", "heldout", "packed", "parts", "label")
    trained = None if tokenizer else {"vocab": spec.tokenizer.train.vocab, "kind": spec.tokenizer.train.kind}
    return {
        **{key: value for key, value in spec.model_dump(mode="json").items() if key in keys},
        "tokenizer": tokens.digest(tokenizer) if tokenizer else trained,
        "identity": sources.identity(spec),
    }


def _is_there(out: Path, request: dict) -> bool:
    try:
        return store.open(out).manifest["request"] == request
    except UserError:  # absent, damaged or of another version: made anew in each case
        return False


def trained(wanted, directory: Path):
    """A tokeniser learned from the training side's texts."""
    return vocabulary.train(wanted.kind, wanted.vocab, store.Texts(directory, store.TRAIN))


def fill(directory: Path, texts: Sides, tokenizer, length: int, packing: dict[str, bool], request: dict) -> None:
    """Rows, tokeniser and manifest beside the texts; `packing`: which documents share a row, see `write_side`."""
    tokenizer.save_pretrained(directory / store.TOKENIZER)
    facts = tokens.facts(tokenizer)
    sides = {side: write_side(tokenizer, facts, length, side, directory, **packing) for side in texts}
    write_manifest(directory, texts, sides, tokenizer, length, packing, request)


def write_manifest(
    directory: Path, texts: Sides, sides: dict[str, dict], tokenizer, length: int, packing: dict, request: dict
) -> None:
    """The classes of the rows, and what the files in `directory` are; the last one to be written."""
    if texts.classes:
        for side in texts:
            documents = store.Spans(directory, side).all[:, 0]  # of every row, for each is one piece
            store.write_array(directory / store.labels_name(side), texts.labels(side)[documents])
    written = {path.name: _about(path) for path in sorted(directory.iterdir()) if path.is_file()}
    tokenizer_digest = tokens.digest(tokenizer)
    for side, about in sides.items():
        shards = [about["sha256"] for name, about in written.items() if name.startswith(f"{side}-")]
        about["digest"] = files.digest([length, tokenizer_digest, shards, texts.classes])
    manifest = {
        "version": store.VERSION,
        "digest": files.digest([texts.source["digest"], *(about["digest"] for about in sides.values())]),
        "source": texts.source,
        "length": length,
        "packing": packing,
        "rows_per_shard": rows_per_shard(length),
        "tokenizer_digest": tokenizer_digest,
        "rows": {side: about.pop("rows") for side, about in sides.items()},
        "sides": sides,
        "parts": list(texts.parts),
        "classes": texts.classes,
        "files": written,
    }
    files.write_json(
        directory / store.MANIFEST, {**manifest, "request": request, "tokenizer": asdict(tokens.facts(tokenizer))}
    )


def _about(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def _tell(spec, manifest: dict) -> None:
    source, rows, train = manifest["source"], manifest["rows"], manifest["sides"][store.TRAIN]
    say(
        f"corpus {sources.said(spec)}{sources.about(spec)}: {source['documents']} documents, {size(source['bytes'])}, "
        f"{count(source['words'])} words, sha256 {source['digest'][:16]}"
        + (f"; {source['cut']} of them are further pieces of longer ones" if source["cut"] else "")
        + (f"; {source['blank']} blank ones left out" if source["blank"] else "")
    )
    held = rows.get(store.HELDOUT, 0)
    say(f"  {rows[store.TRAIN]} rows of {manifest['length']} tokens, {train['fill']:.1%} filled; {held} rows held out")
