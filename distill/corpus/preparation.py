"""Text to rows: split, tokenise, pack, write. All of it or nothing appears under the final name."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from distill.corpus import packing, sources, store, tokens, vocabulary
from distill.corpus.split import Split
from growth import files
from growth.console import bar, count, say, size
from growth.errors import UserError

SHARD = 1 << 22  # places of a shard; filling it takes about fifty bytes a place
BLOCK = 1 << 20  # characters tokenised at once


def prepare(spec, tokenizer_source: Path | None, out: Path) -> None:
    """Make the corpus a recipe asks for, unless it is there already.

    The tokeniser is that of `tokenizer_source`, or trained on the training side if that is None.
    """
    tokenizer = tokens.load(tokenizer_source) if tokenizer_source else None
    request = _request(spec, tokenizer)
    if _is_there(out, request):
        return
    with files.committed(out, overwrite=True) as directory:
        split = Split(spec.heldout, directory)
        split.read(sources.documents(spec), spec.source)
        tokenizer = tokenizer or _trained(spec.tokenizer.train, directory)
        tokenizer.save_pretrained(directory / store.TOKENIZER)
        facts = tokens.facts(tokenizer)
        sides = {side: _write_side(spec, tokenizer, facts, side, directory) for side in split.sides}
        manifest = _manifest(split, sides, tokens.digest(tokenizer), spec.length, directory)
        files.write_json(directory / store.MANIFEST, {**manifest, "request": request, "tokenizer": asdict(facts)})
    _tell(spec, store.read_manifest(out))


def _request(spec, tokenizer) -> dict:
    """What a corpus depends on: with another one it is made anew."""
    keys = ("source", "field", "split", "revision", "limit", "length", "heldout", "packed")
    trained = None if tokenizer else {"vocab": spec.tokenizer.train.vocab, "kind": spec.tokenizer.train.kind}
    return {
        **{key: getattr(spec, key) for key in keys},
        "tokenizer": tokens.digest(tokenizer) if tokenizer else trained,
        "identity": sources.identity(spec),
    }


def _is_there(out: Path, request: dict) -> bool:
    try:
        return store.open(out).manifest["request"] == request
    except UserError:  # absent, damaged or of another version: made anew in each case
        return False


def _trained(wanted, directory: Path):
    return vocabulary.train(wanted.kind, wanted.vocab, store.Texts(directory, store.TRAIN))


def _manifest(split: Split, sides: dict[str, dict], tokenizer_digest: str, length: int, directory: Path) -> dict:
    written = {path.name: _about(path) for path in sorted(directory.iterdir()) if path.is_file()}
    for side, about in sides.items():
        shards = [about["sha256"] for name, about in written.items() if name.startswith(f"{side}-")]
        about["digest"] = files.digest([length, tokenizer_digest, shards])
    return {
        "version": store.VERSION,
        "digest": files.digest([split.source["digest"], *(about["digest"] for about in sides.values())]),
        "source": split.source,
        "length": length,
        "rows_per_shard": _rows_per_shard(length),
        "tokenizer_digest": tokenizer_digest,
        "rows": {side: about.pop("rows") for side, about in sides.items()},
        "sides": sides,
        "parts": list(split.parts),
        "files": written,
    }


def _about(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def _tell(spec, manifest: dict) -> None:
    source, rows, train = manifest["source"], manifest["rows"], manifest["sides"][store.TRAIN]
    say(
        f"corpus {spec.source}{sources.about(spec)}: {source['documents']} documents, {size(source['bytes'])}, "
        f"{count(source['words'])} words, sha256 {source['digest'][:16]}"
        + (f"; {source['cut']} of them are further pieces of longer ones" if source["cut"] else "")
        + (f"; {source['blank']} blank ones left out" if source["blank"] else "")
    )
    held = rows.get(store.HELDOUT, 0)
    say(f"  {rows[store.TRAIN]} rows of {manifest['length']} tokens, {train['fill']:.1%} filled; {held} rows held out")


# --- rows -------------------------------------------------------------------------------------------------------------


def _write_side(spec, tokenizer, facts: tokens.Facts, side: str, directory: Path) -> dict:
    """The rows of one side as shards; what the manifest says about them."""
    spool = directory / "tokens.tmp"
    texts = store.Texts(directory, side)
    lengths = _tokenise(texts, tokenizer, facts, spec.length, spool, f"tokenising ({side})")
    row_of = (packing.best_fit if spec.packed else packing.one_each)(lengths, spec.length)
    layout = packing.Layout(lengths, row_of, spec.length)
    _write_rows(layout, np.memmap(spool, dtype=np.uint32, mode="r"), facts, side, directory)
    spool.unlink()
    filled = int(lengths.sum())
    return {
        "documents": len(texts),
        "pieces": len(lengths),
        "tokens": filled,
        "rows": layout.rows,
        "fill": filled / (layout.rows * spec.length),
    }


def _tokenise(texts: store.Texts, tokenizer, facts: tokens.Facts, length: int, spool: Path, label: str) -> np.ndarray:
    """Write the tokens of all pieces of all documents end to end; the lengths of the pieces."""
    tokens.room_for_text(facts, length)
    lengths = array("I")
    with spool.open("wb") as file, bar(len(texts), label) as advance:
        for block in _blocks(texts):
            encoded = (ids for ids in tokens.encode(tokenizer, block) if ids)
            pieces = [piece for ids in encoded for piece in tokens.chunks(ids, facts, length)]
            file.write(np.array(list(itertools.chain.from_iterable(pieces)), dtype=np.uint32).data)
            lengths.extend(map(len, pieces))
            advance(len(block))
    if not lengths:
        raise UserError("the tokeniser finds no token in this corpus")
    return np.array(lengths, dtype=np.int64)


def _blocks(texts: store.Texts) -> Iterator[list[str]]:
    block, held = [], 0
    for text in texts:
        block.append(text)
        held += len(text)
        if held >= BLOCK:
            yield block
            block, held = [], 0
    if block:
        yield block


def _write_rows(layout: packing.Layout, ids: np.ndarray, facts: tokens.Facts, side: str, directory: Path) -> None:
    types = np.min_scalar_type(facts.vocabulary - 1), np.min_scalar_type(layout.length)
    needed = layout.rows * layout.length * sum(kind.itemsize for kind in types)
    files.ensure_space(directory, needed, "the prepared corpus")
    step = _rows_per_shard(layout.length)
    for number, start in enumerate(range(0, layout.rows, step)):
        rows = range(start, min(start + step, layout.rows))
        for what, values in zip(store.COLUMNS, layout.fill(rows, ids, facts.pad, types), strict=True):
            store.write_array(directory / store.shard_name(side, number, what), values)


def _rows_per_shard(length: int) -> int:
    return max(1, SHARD // length)
