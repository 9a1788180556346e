"""Text to rows: split, tokenise, pack, write. All of it or nothing appears under the final name."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from distill.corpus import packing, sources, store, tokens, vocabulary
from distill.corpus.documents import Document
from growth import files
from growth.console import bar, count, say, size
from growth.errors import UserError

SHARD = 1 << 23  # places of a shard
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
        _prepare(spec, tokenizer, request, directory)
    _tell(spec, store.read_manifest(out))


def _prepare(spec, tokenizer, request: dict, directory: Path) -> None:
    split = Split(spec.heldout, directory)
    split.read(sources.documents(spec), f"reading {spec.source}")
    split.finish(spec)
    if tokenizer is None:
        wanted = spec.tokenizer.train
        tokenizer = vocabulary.train(wanted.kind, wanted.vocab, store.Texts(directory, store.TRAIN))
    tokenizer.save_pretrained(directory / store.TOKENIZER)
    facts, tokenizer_digest = tokens.facts(tokenizer), tokens.digest(tokenizer)
    sides = {}
    for side in split.sides:
        lengths = _tokenise(tokenizer, facts, spec.length, side, directory)
        sides[side] = _write_rows(lengths, facts, spec, side, directory)
        sides[side]["digest"] = files.digest([spec.length, tokenizer_digest, sides[side].pop("shards")])
        sides[side]["documents"] = len(split.sides[side].ends)
    manifest = {
        "version": store.VERSION,
        "digest": files.digest([split.counts["digest"], *(side["digest"] for side in sides.values())]),
        "request": request,
        "source": split.counts,
        "length": spec.length,
        "rows_per_shard": _rows_per_shard(spec.length),
        "tokenizer": asdict(facts),
        "tokenizer_digest": tokenizer_digest,
        "rows": {side: sides[side].pop("rows") for side in sides},
        "sides": sides,
        "parts": list(split.parts),
        "files": {path.name: _about(path) for path in sorted(directory.iterdir()) if path.is_file()},
    }
    files.write_json(directory / store.MANIFEST, manifest)


# --- what was asked for, and whether it is there ----------------------------------------------------------------------


def _request(spec, tokenizer) -> dict:
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


def _about(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def _tell(spec, manifest: dict) -> None:
    source, rows, train = manifest["source"], manifest["rows"], manifest["sides"][store.TRAIN]
    held = manifest["sides"].get(store.HELDOUT)
    say(
        f"corpus {spec.source}{sources.about(spec)}: {source['documents']} documents, {size(source['bytes'])}, "
        f"{count(source['words'])} words, sha256 {source['digest'][:16]}"
        + (f"; {source['blank']} blank ones left out" if source["blank"] else "")
        + (f"; {source['cut']} of them are further pieces of longer ones" if source["cut"] else "")
    )
    say(
        f"  {rows[store.TRAIN]} rows of {manifest['length']} tokens, {train['fill']:.1%} filled"
        + (f"; {rows[store.HELDOUT]} rows held out ({held['documents']} documents)" if held else "; nothing held out")
    )


# --- texts ------------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """The texts of one side, end to end in one file."""

    directory: Path
    name: str
    ends: array = field(default_factory=lambda: array("Q"))
    parts: array = field(default_factory=lambda: array("I"))

    def __post_init__(self):
        self._file = (self.directory / f"{self.name}.texts").open("wb")

    def add(self, data: bytes, part: int) -> None:
        self._file.write(data)
        self.ends.append(self._file.tell())
        self.parts.append(part)

    def close(self) -> None:
        self._file.close()
        np.save(self.directory / f"{self.name}.ends.npy", np.array(self.ends, dtype=np.uint64))
        np.save(self.directory / f"{self.name}.parts.npy", np.array(self.parts, dtype=np.uint32))


class Split:
    """Documents go to a side by the hash of their text: a document stays where it is when others come and go."""

    def __init__(self, heldout: float, directory: Path):
        self.heldout = heldout
        names = store.SIDES if heldout else (store.TRAIN,)
        self.sides = {name: Side(directory, name) for name in names}
        self.parts: dict[str, int] = {}
        self.counts = {"bytes": 0, "documents": 0, "words": 0, "blank": 0, "cut": 0}
        self._hash = hashlib.sha256()

    def read(self, documents: Iterable[Document], label: str) -> None:
        side = None
        with bar(None, label) as advance:
            for document in documents:
                text = document.text.strip()
                side = side if document.continues else self.side(text)
                self.counts["cut"] += document.continues
                if text:
                    self._add(text.encode(), document.part, side)
                    self.counts["words"] += len(text.split())
                else:
                    self.counts["blank"] += 1
                advance()
        self.counts["digest"] = self._hash.hexdigest()

    def side(self, text: str) -> str:
        """Spaces and case make no other document."""
        key = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
        share = int.from_bytes(key[:8], "big") / 2**64
        return store.HELDOUT if share < self.heldout else store.TRAIN

    def _add(self, data: bytes, part: str, side: str) -> None:
        self.sides[side].add(data, self.parts.setdefault(part, len(self.parts)))
        self._hash.update(data + b"\n")
        self.counts["bytes"] += len(data) + 1
        self.counts["documents"] += 1

    def finish(self, spec) -> None:
        for side in self.sides.values():
            side.close()
        n = self.counts["documents"]
        if not n:
            raise UserError(f"{spec.source}: no text here ({self.counts['blank']} blank documents)")
        if not all(side.ends for side in self.sides.values()):
            raise UserError(
                f"{spec.source}: {n} documents are too few to hold out {spec.heldout:g} of them; "
                "set heldout: 0 or give more text"
            )


# --- rows -------------------------------------------------------------------------------------------------------------


def _tokenise(tokenizer, facts: tokens.Facts, length: int, side: str, directory: Path) -> np.ndarray:
    """Write the pieces of all documents end to end; their lengths."""
    tokens.room_for_text(facts, length)
    texts, lengths = store.Texts(directory, side), array("I")
    with _spool(directory).open("wb") as spool, bar(len(texts), f"tokenising ({side})") as advance:
        for block in _blocks(texts):
            encoded = (ids for ids in tokens.encode(tokenizer, block) if ids)
            pieces = [piece for ids in encoded for piece in tokens.chunks(ids, facts, length)]
            np.array(list(itertools.chain.from_iterable(pieces)), dtype=np.uint32).tofile(spool)
            lengths.extend(map(len, pieces))
            advance(len(block))
    if not lengths:
        raise UserError(f"the tokeniser finds no token in the {side} part of this corpus")
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


def _write_rows(lengths: np.ndarray, facts: tokens.Facts, spec, side: str, directory: Path) -> dict:
    """Pack the pieces and write the shards; what the manifest says about them."""
    row_of = (packing.best_fit if spec.packed else packing.one_each)(lengths, spec.length)
    layout = Layout(lengths, row_of, spec.length)
    types = np.min_scalar_type(facts.vocabulary - 1), np.min_scalar_type(spec.length)
    needed = layout.rows * spec.length * sum(kind.itemsize for kind in types)
    files.ensure_space(directory, needed, f"the corpus {spec.source}")
    spool = np.memmap(_spool(directory), dtype=np.uint32, mode="r")
    shards = []
    for number, start in enumerate(range(0, layout.rows, _rows_per_shard(spec.length))):
        rows = range(start, min(start + _rows_per_shard(spec.length), layout.rows))
        for what, array_ in zip(("ids", "segments"), layout.fill(rows, spool, facts.pad, types), strict=True):
            path = directory / store.shard_name(side, number, what)
            np.save(path, array_)
            shards.append(files.sha256(path))
    del spool
    _spool(directory).unlink()
    places, filled = layout.rows * spec.length, int(lengths.sum())
    return {"rows": layout.rows, "pieces": len(lengths), "tokens": filled, "fill": filled / places, "shards": shards}


class Layout:
    """Where each piece lies: its row, its place there, its number among the pieces of the row."""

    def __init__(self, lengths: np.ndarray, row_of: np.ndarray, length: int):
        self.length, self.rows = length, int(row_of.max()) + 1
        self.sources = np.cumsum(lengths) - lengths  # where a piece starts in the spool
        self.order = np.argsort(row_of, kind="stable")
        self.row_of, self.lengths = row_of[self.order], lengths[self.order]
        first = np.searchsorted(self.row_of, self.row_of)  # the first piece of the same row
        ends = np.cumsum(self.lengths)
        self.places = ends - self.lengths - (ends - self.lengths)[first]
        self.numbers = np.arange(len(lengths)) - first + 1

    def fill(self, rows: range, spool: np.ndarray, pad: int, types: tuple) -> tuple[np.ndarray, np.ndarray]:
        """ids and segments of these rows, [rows, T] each."""
        span = slice(*np.searchsorted(self.row_of, [rows.start, rows.stop]))
        n = self.lengths[span]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        there = np.repeat(self.sources[self.order[span]], n) + within
        here = np.repeat((self.row_of[span] - rows.start) * self.length + self.places[span], n) + within
        ids = np.full(len(rows) * self.length, pad, dtype=types[0])
        segments = np.zeros(len(rows) * self.length, dtype=types[1])
        ids[here], segments[here] = spool[there], np.repeat(self.numbers[span], n)
        return ids.reshape(len(rows), self.length), segments.reshape(len(rows), self.length)


def _spool(directory: Path) -> Path:
    return directory / "pieces.tmp"


def _rows_per_shard(length: int) -> int:
    return max(1, SHARD // length)
