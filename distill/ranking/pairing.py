"""The score of every pair of a collection's groups by any ranker, once, into a store that a kill does no harm to.

Pairs go in the order of their passages, the shortest first: a passage is encoded once and meets all its queries, and
what is read together is of like length. The whole list is cut into blocks before anything is scored. A block is one
shard, whoever scores it and however often that was begun, so the bytes of a store do not know of interruptions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distill import layout, models, scores, world
from distill.evaluate.machine import matmul_speed
from distill.ranking import stores
from distill.ranking.collection import Collection
from distill.ranking.groups import Groups
from distill.ranking.kinds import ClassifierKind, CrossKind, PreTTKind
from distill.ranking.opening import Opened, opened, token_ids
from distill.scores import Writer, pair_keys
from distill.scores.keys import Index
from growth import console, files

SHARDS = 256  # at most: a reader holds all of them open
JOINED, APART = 1 << 10, 1 << 14  # pairs of a block at least: read as one text each, or every text once
TOKENS, TOKENS_ON_A_GPU = 1 << 14, 1 << 18  # of a part of a block, whose hidden states are all in memory; guesses
OF_PASSAGES = 4  # times as many where texts are read apart: queries are read again in every part
PAIRS = 1 << 15  # of a part


class Pairs(NamedTuple):
    """Each pair of texts once, its passage never shorter than that of the pair before."""

    query: np.ndarray  # [U] places in the ids of groups
    passage: np.ndarray  # [U]
    keys: np.ndarray  # [U, 16]

    def at(self, rows: slice) -> Pairs:
        return Pairs(*(values[rows] for values in self))


def listed(collection: Collection, groups: Groups) -> Pairs:
    """All of some groups; two ids of the same text are one."""
    query, passage = np.divmod(groups.codes()[0], len(groups.document_ids))
    sizes = np.array([len(collection.documents[name]) for name in groups.document_ids], dtype=np.int64)
    order = np.lexsort((query, passage, sizes[passage]))
    query, passage = query[order], passage[order]
    keys = pair_keys(_texts(collection, groups, query, passage))
    first = Index(keys).find(keys) == np.arange(len(keys))
    return Pairs(query[first], passage[first], keys[first])


def _texts(collection: Collection, groups: Groups, query: np.ndarray, passage: np.ndarray) -> Iterator[tuple[str, str]]:
    """Of pairs in the order of their passages."""
    last, text = -1, ""
    for q, p in zip(query.tolist(), passage.tolist(), strict=True):
        if p != last:
            last, text = p, collection.documents[groups.document_ids[p]]
        yield collection.queries[groups.query_ids[q]], text


def blocks(count: int, ranker: Opened) -> list[slice]:
    """Of so many pairs."""
    size = max(JOINED if _joins(ranker) else APART, -(-count // SHARDS))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _joins(ranker: Opened) -> bool:
    return isinstance(ranker.ranker.kind, CrossKind | ClassifierKind | PreTTKind)


def score(
    ranker: Opened, collection: Collection, groups: Groups, out: Path, *, label: str = "scores"
) -> dict[str, Any]:
    """The store in `out`, all ranks together; what is there of the same ranker is not scored again."""
    began, work, failure = time.perf_counter(), None, None
    try:
        work = Work(ranker, collection, groups)
        with Writer(out, stores.about([ranker.about]), world.rank()) as writer:
            work.run(writer, label)
    except BaseException as error:  # the others must not be left waiting
        failure = error
    world.raise_together(failure)
    world.first(lambda: scores.seal(out))
    pairs, tokens = map(int, world.agree(work.scored, work.tokens))
    told = _told(ranker, len(work.pairs.keys), pairs, tokens, time.perf_counter() - began)
    console.say(f"{label}: {_said(told)}")
    return told


@dataclass(eq=False)
class Work:
    """A ranker over all pairs of some groups."""

    ranker: Opened
    collection: Collection
    groups: Groups
    scored: int = 0
    tokens: int = 0  # that went through the encoder

    def __post_init__(self):
        self.pairs = listed(self.collection, self.groups)

    def run(self, writer: Writer, label: str) -> None:
        """This rank's blocks, those that are there left out."""
        mine = blocks(len(self.pairs.keys), self.ranker)[world.rank() :: world.size()]
        began = time.perf_counter()
        with console.bar(sum(rows.stop - rows.start for rows in mine), label) as advance:
            for rows in mine:
                block = self.pairs.at(rows)
                if writer.missing(block.keys).any():
                    values = self.values(block)
                    files.fault("pairs.block")
                    writer.add(block.keys, {stores.SCORE: values})
                    writer.flush()
                    self.scored += len(values)
                rate = self.tokens / (time.perf_counter() - began)
                advance(len(block.keys), note=f"{console.count(rate)} tok/s")

    def values(self, block: Pairs) -> np.ndarray:
        """The score of each pair [n] float32."""
        queries, q = np.unique(block.query, return_inverse=True)
        passages, p = np.unique(block.passage, return_inverse=True)
        sides = (
            self._read(self.collection.queries, self.groups.query_ids, queries, 0),
            self._read(self.collection.documents, self.groups.document_ids, passages, 1),
        )
        return np.concatenate([self._part(sides, q[rows], p[rows]) for rows in self._parts(sides, q, p)])

    def _read(self, texts, ids: Sequence[str], places: np.ndarray, side: int) -> list[list[int]]:
        length = self.ranker.ranker.kind.lengths[side]
        return token_ids(self.ranker.tokenizer, [texts[ids[place]] for place in places.tolist()], length)

    def _parts(self, sides, q: np.ndarray, p: np.ndarray) -> Iterator[slice]:
        """Runs of a block's pairs with few enough tokens."""
        sizes = [np.array([len(ids) for ids in side]) for side in sides]
        new = np.append(True, p[1:] != p[:-1])
        joins, room = _joins(self.ranker), TOKENS if world.device().type == "cpu" else TOKENS_ON_A_GPU
        each = sizes[0][q] + sizes[1][p] if joins else np.where(new, sizes[1][p], 0) / OF_PASSAGES
        ends, start = np.cumsum(each), 0
        while start < len(q):
            before = ends[start - 1] if start else 0
            end = min(int(np.searchsorted(ends, before + room, side="right")), start + PAIRS)
            yield slice(start, max(end, start + 1))
            start = max(end, start + 1)

    @torch.inference_mode()
    def _part(self, sides, q: np.ndarray, p: np.ndarray) -> np.ndarray:
        device = self.ranker.ranker.encoder.device
        found, rows = [], []
        for side, places in zip(sides, (q, p), strict=True):
            some, row = np.unique(places, return_inverse=True)
            ids = [side[place] for place in some.tolist()]
            lengths = np.array([len(one) for one in ids])
            self.tokens += int((lengths[row] if _joins(self.ranker) else lengths).sum())
            found.append({name: x.to(device) for name, x in layout.padded(ids).items()})
            rows.append(torch.from_numpy(row))
        return self.ranker.ranker(*found, torch.stack(rows, 1).to(device)).float().cpu().numpy()


def _told(ranker: Opened, count: int, fresh: int, tokens: int, seconds: float) -> dict[str, Any]:
    """Figures of a run: two FLOPs a parameter and token, as everywhere, beside what a matrix product reaches here."""
    encoder = ranker.ranker.encoder
    flops = 2 * models.facts(encoder.config).body * tokens / seconds
    precision = "bf16" if encoder.dtype == torch.bfloat16 else "fp32"
    (peak,) = world.agree(max(matmul_speed(precision, 0.2)[0] for _ in range(3)))  # others may be at work
    return {
        "pairs": count,
        "scored": fresh,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "tflops": round(flops / 1e12, 7),
        "peak_tflops": round(peak / 1e12, 7),
        "share_of_peak": round(flops / peak, 3),
    }


def _said(told: dict[str, Any]) -> str:
    if not told["scored"]:
        return f"{told['pairs']} pairs, all scored before"
    speed = f"{console.count(told['tokens_per_second'])} tokens a second, {told['tflops']:.3g} TFLOP/s"
    share = f"{told['share_of_peak']:.0%} of what a matrix product reaches here ({told['peak_tflops']:.3g})"
    return f"{told['scored']} of {told['pairs']} pairs scored, {speed}: {share}"


def by_one(teacher: str, collection: Collection, groups: Groups, out: Path, context) -> dict[str, Any]:
    """The scores of a model or stage; what stage.json says of them."""
    label = f"scores of {teacher}"
    told = score(opened(context, teacher), collection, groups, out, label=label)
    return told | {"margins": world.first(lambda: stores.told(out, collection, groups, label))}


def by_several(
    teachers: Sequence[str], collection: Collection, groups: Groups, out: Path, context, *,
    weights: Sequence[float] | None, standardise: bool,
) -> dict[str, Any]:  # fmt: skip
    """Those of each in a store of its own, and their mean in `out`."""
    places = {teacher: out.with_name("teachers") / teacher for teacher in teachers}
    told = {teacher: by_one(teacher, collection, groups, place, context) for teacher, place in places.items()}

    def mean() -> dict[str, Any]:
        with files.committed(out, overwrite=True) as directory:
            found = stores.ensemble(list(places.values()), directory, weights=weights, standardise=standardise)
        console.say(f"{(stage := out.parent.name)}: {found}")
        return {"pairs": found.pairs, "teachers": told, "margins": stores.told(out, collection, groups, stage)}

    return world.first(mean)
