"""Collections of a recipe, made once: texts, judgements and groups in a directory, whole or not at all. No torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.ranking import collection, docstrings, groups, texts
from distill.ranking.collection import Collection, Missing
from distill.ranking.groups import Groups
from distill.specs import DOCSTRINGS, CollectionSpec
from growth import files
from growth.console import say
from growth.errors import UserError

VERSION, MANIFEST = 1, "manifest.json"
QUERIES, DOCUMENTS, JUDGED, GROUPS = "queries", "documents", "judgements.jsonl", "groups"


@dataclass(frozen=True)
class Ranking:
    """What rankers are trained and measured on: a prepared collection, and perhaps groups of it."""

    collection_path: Path
    groups_path: Path | None = None

    def open(self) -> tuple[Collection, Groups | None]:
        return opened(self.collection_path), self.groups_path and groups.load(self.groups_path)

    def insist(self, what: str) -> tuple[Collection, Groups]:
        """The same, for `what` needs groups."""
        found, listed = self.open()
        if listed is None:
            raise UserError(f"{what} needs queries with negatives: mine them first, or give the collection its triples")
        return found, listed

    @property
    def digest(self) -> str:
        """Of texts, judgements and groups, without reading them."""
        paths = [path for path in (self.collection_path, self.groups_path) if path]
        return files.digest([files.read_json(path / MANIFEST)["digest"] for path in paths])


def prepare(spec: CollectionSpec, out: Path) -> None:
    """Make the collection a recipe asks for, unless it is there already."""
    request = _request(spec)
    if _is_there(out, request):
        return
    with files.committed(out, overwrite=True) as directory:
        found, listed, missing = _read(spec, directory / DOCUMENTS)
        if listed is not None and not found.judgements:
            found = replace(found, judgements=_answers(listed))
        if not (directory / DOCUMENTS).exists():
            texts.store(directory / DOCUMENTS, None, _rows(found.documents))
        texts.store(directory / QUERIES, None, _rows(found.queries))
        lines = (json.dumps(judged, ensure_ascii=False) + "\n" for judged in found.judgements.items())
        files.write_bytes(directory / JUDGED, (line.encode() for line in lines))
        if listed is not None:
            groups.save(directory / GROUPS, listed, {"triples": request["triples"]})
        manifest = _manifest(found, listed, missing)
        files.write_json(directory / MANIFEST, {**manifest, "request": request})
    _tell(spec, manifest)


def opened(path: Path) -> Collection:
    """Read where it lies; verified as far as sizes and judgements go."""
    manifest = _manifest_of(path)
    judged = dict(json.loads(line) for _, line in texts.numbered(path / JUDGED))
    found = Collection(texts.Stored(path / QUERIES), texts.Stored(path / DOCUMENTS), judged)
    if found.digest != manifest["digest"]:
        raise UserError(f"{path} is damaged; remove it, and it is made again")
    return found


def _manifest_of(path: Path) -> dict[str, Any]:
    manifest = files.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UserError(f"{path} was not written by this version; remove it, and it is made again")
    return manifest


def _is_there(out: Path, request: dict) -> bool:
    try:
        opened(out)
        return _manifest_of(out)["request"] == request
    except (UserError, OSError):  # absent, damaged or of another version: made anew in each case
        return False


def _request(spec: CollectionSpec) -> dict[str, Any]:
    """What a collection depends on: with another one it is made anew."""
    given = [Path(place).expanduser() for place in (spec.source, spec.triples) if place and place != DOCSTRINGS]
    read = {str(path): [texts.identity(file) for file in _files(path)] for path in given}
    embedded = {"python": sys.version} if spec.source == DOCSTRINGS else {}
    return {**spec.model_dump(mode="json"), "files": read, **embedded}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; a collection is {DOCSTRINGS} or in BEIR's layout")
    return [file for pattern in ("*.jsonl*", "qrels*.tsv", "qrels/*.tsv") for file in sorted(path.glob(pattern))]


def _read(spec: CollectionSpec, store: Path) -> tuple[Collection, Groups | None, Missing]:
    if spec.source is None:
        return groups.read(Path(spec.triples).expanduser(), store=store)
    found = _source(spec, store)
    if spec.triples is None:
        return found, None, found.missing
    return groups.read(Path(spec.triples).expanduser(), found)


def _source(spec: CollectionSpec, store: Path) -> Collection:
    if spec.source == DOCSTRINGS:
        return docstrings.collection(spec.split or docstrings.TRAIN)
    directory = Path(spec.source).expanduser()
    if spec.ask != "judged":
        return {"titles": collection.titles, "openings": collection.openings}[spec.ask](directory, store=store)
    if spec.triples and not spec.split and not collection.is_judged(directory):
        return collection.unjudged(directory, store=store)
    return collection.beir(directory, spec.split, store=store)


def _answers(listed: Groups) -> dict[str, dict[str, int]]:
    """Nobody has judged anything but the positives."""
    found: dict[str, dict[str, int]] = {}
    for query, positive in zip(listed.query.tolist(), listed.positive.tolist(), strict=True):
        found.setdefault(listed.query_ids[query], {})[listed.document_ids[positive]] = 1
    return found


def _rows(found: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    return (("", name, text) for name, text in found.items())


def _manifest(found: Collection, listed: Groups | None, missing: Missing) -> dict[str, Any]:
    return {
        "version": VERSION,
        "digest": found.digest,
        "queries": len(found.queries),
        "documents": len(found.documents),
        "judged": len(found.judgements),
        "answers": sum(grade > 0 for grades in found.judgements.values() for grade in grades.values()),
        "groups": None if listed is None else len(listed),
        "negatives": None if listed is None else len(listed.negative),
        "missing": {"rows": missing.rows, "lost": missing.lost},
    }


def _tell(spec: CollectionSpec, manifest: dict[str, Any]) -> None:
    listed = f", {manifest['groups']} groups with {manifest['negatives']} negatives" if manifest["groups"] else ""
    lost = f"; {manifest['missing']['lost']} rows name what is not there" if manifest["missing"]["lost"] else ""
    say(
        f"collection {spec.source or spec.triples}: {manifest['queries']} queries ({manifest['judged']} judged), "
        f"{manifest['documents']} documents{listed}, digest {manifest['digest'][:16]}{lost}"
    )
