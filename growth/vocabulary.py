"""Another vocabulary: rows of the embeddings, and of the head, for tokens that the model has never seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect, once
from growth.errors import UsageError, UserError
from growth.masks import masks_of
from growth.noise import drawn
from growth.operate import PLAIN, Output, Result, delivered, opened
from growth.pieces import Computed, made
from growth.ranges import header
from growth.reindex import Stream, widely

HOW = ("mean", "normal", "multivariate")
ALIGNED = ("wechsel", "ofa")  # need static vectors in one space of the old tokens and the new ones
SPREAD = 1e-5  # of the multivariate normal around the mean, relative to the covariance (Hewitt 2021)
NEIGHBOURS, TEMPERATURE = 10, 0.1  # WECHSEL's and OFA's
RANK = 400  # of OFA's factors, of those published the one nearest to the whole table


@dataclass(frozen=True)
class Tokens:
    """What is known of each new token."""

    same: Any  # [new]: the old token that it is, or -1
    near: Any = None  # [new, n]: old tokens alike, where vectors say so
    weight: Any = None  # [new, n]: a softmax over them; a row of zeros has no vector

    def __len__(self) -> int:
        return len(self.same)


@dataclass(frozen=True)
class Rows:
    """How the row of a new token is made."""

    how: str
    rank: int
    seed: int

    def of(self, table, tokens: Tokens, name: str):
        """The new table [new, width] of an old one [old, width]; tokens that both have are copied to the bit."""
        unseen = (tokens.same < 0).nonzero()[:, 0]
        rows = table.index_select(0, tokens.same.clamp(min=0))
        if self.how == "ofa":
            coordinates, primitives = self._factored(table)
            rows[unseen] = self._unseen(coordinates, tokens, unseen, name) @ primitives
        else:
            rows[unseen] = self._unseen(table, tokens, unseen, name)
        return rows

    def _factored(self, table):
        """OFA's coordinates of tokens, and the primitives they are coordinates of: a truncated SVD."""
        import torch

        left, values, right = torch.linalg.svd(table, full_matrices=False)
        return left[:, : self.rank], values[: self.rank, None] * right[: self.rank]

    def _unseen(self, table, tokens: Tokens, unseen, name: str):
        from torch.nn.functional import embedding_bag

        fallback = self.how if self.how in HOW else "normal"
        rows = fresh(table, len(unseen), fallback, name, self.seed)
        if tokens.near is None:
            return rows
        weight, near = tokens.weight[unseen].to(table.dtype), tokens.near[unseen]
        mixed = embedding_bag(near, table, per_sample_weights=weight, mode="sum")  # [unseen, width]
        return mixed.where(weight.any(1, keepdim=True), rows)


def fresh(table, n: int, how: str, name: str, seed: int):
    """`n` rows beside those of the table, which know nothing of their tokens."""
    mean, centred = table.mean(0), table - table.mean(0)
    if how == "mean":
        return mean.expand(n, -1)
    if how == "normal":
        return mean + drawn((n, table.shape[1]), name, seed, table.dtype) * table.std(0)
    # any mixture of centred rows with normal weights has their covariance: no matrix to factor
    weights = drawn((n, len(table)), name, seed, table.dtype) * (SPREAD / len(table)) ** 0.5
    return mean + weights @ centred


def vocabulary(
    src: Any,
    dst: str | Path | None = None,
    *,
    size: int | None = None,
    vectors: str | Path | Mapping[str, Any] | None = None,
    how: str | None = None,
    rank: int = RANK,
    seed: int = 0,
    output: Output = PLAIN,
) -> Any:
    """More tokens behind the old ones (`size`), or other tokens in their place (`vectors`). Both tables follow.

    `vectors` is a safetensors file or tensors: `same` [new tokens] names the old token that each of them is (-1: none),
    and rows of those are copied; `old` [old tokens, n] and `new` [new tokens, n] are static vectors in one space. How
    other rows are made: `mean`, of all old rows (the default of `size`); `normal`, each channel as the rows have it;
    `multivariate`, around the mean with a little of the rows' covariance (Hewitt 2021); `wechsel` (the default of
    `vectors`), a mean of the rows of the 10 nearest old tokens, weighted by a softmax (Minixhofer et al. 2022, arXiv
    2112.06598); `ofa`, the same on the first `rank` factors of the table (Liu et al. 2023, arXiv 2311.08849). What has
    no vector (zeros) is `normal`.
    """
    how = how or ("mean" if vectors is None else "wechsel")
    if how not in (*HOW, *ALIGNED):
        raise UsageError(f"how {how!r}: one of {', '.join((*HOW, *ALIGNED))}")
    if (size is None) == (vectors is None) or rank < 1:
        raise UsageError("give either the size, for more tokens, or vectors, for others; a rank is at least 1")
    if how in ALIGNED and vectors is None:
        raise UsageError(f"{how} needs aligned vectors of the old and the new tokens; {', '.join(HOW)} need none")
    checkpoint = opened(src, dst, output)
    anatomy = once(checkpoint, dissect(checkpoint))
    tokens = _more(anatomy, size) if vectors is None else _others(anatomy, _tensors(vectors), how)
    config = anatomy.family.resized(anatomy.config, {"vocab": len(tokens)})
    stream = _stream(checkpoint, anatomy, tokens, Rows(how, rank, seed))
    arguments = {"size": len(tokens), "how": how, "rank": rank, "seed": seed}
    first = anatomy.sizes["vocab"] if vectors is None else 0
    story = {"maps": {}, "new": {"vocab": list(range(first, len(tokens)))},
             "preserves": "exact" if vectors is None else "no"}  # fmt: skip
    masks = masks_of(checkpoint, anatomy)
    result = Result("vocabulary", arguments, config, stream, story, carry=vectors is None, masks=masks)
    return delivered(result, dst, output, checkpoint)


def _more(anatomy: Anatomy, size: int) -> Tokens:
    import torch

    old = anatomy.sizes["vocab"]
    if size < old:
        raise UserError(f"{size} tokens are fewer than the source's {old}: `growth cut --vocab` keeps the first")
    same = torch.full((size,), -1)
    same[:old] = torch.arange(old)
    return Tokens(same)


def _tensors(vectors: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(vectors, Mapping):
        return vectors
    if not Path(vectors).is_file():
        raise UserError(f"{vectors} is not a safetensors file of aligned vectors")
    return {name: made(entry) for name, entry in header(Path(vectors)).items()}


def _others(anatomy: Anatomy, vectors: Mapping[str, Any], how: str) -> Tokens:
    import torch

    vocab, old, new = anatomy.sizes["vocab"], vectors.get("old"), vectors.get("new")
    same = vectors.get("same", None if new is None else torch.full((len(new),), -1))
    if same is None or same.dim() != 1 or same.is_floating_point() or (len(same) and int(same.max()) >= vocab):
        raise UserError(f"vectors: `same` [tokens] names old tokens, 0 to {vocab - 1}, or -1")
    same = same.long()
    if how not in ALIGNED:
        return Tokens(same)
    if old is None or new is None or old.dim() != 2 or old.shape != (vocab, *new.shape[1:]) or len(new) != len(same):
        raise UserError(f"vectors: `old` [{vocab}, n] and `new` [tokens, n] of the same n are expected")
    if not (old.isfinite().all() and new.isfinite().all()):
        raise UserError("vectors: not finite (NaN or infinity); a token without a vector has zeros")
    return Tokens(same, *_neighbours(old, new))


def _neighbours(old, new):
    """The nearest old tokens of each new one by the angle between their vectors, and a softmax of its cosine."""
    import torch

    lone, nothing = (old == 0).all(1), (new == 0).all(1)
    count = min(NEIGHBOURS, int((~lone).sum()))
    if count == 0:
        raise UserError("vectors: every row of `old` is zero")
    old, new = (torch.nn.functional.normalize(one.float(), dim=1) for one in (old, new))
    found = [(rows @ old.T).masked_fill(lone, -torch.inf).topk(count) for rows in new.split(1024)]
    near = torch.cat([one.indices for one in found])
    weight = (torch.cat([one.values for one in found]) / TEMPERATURE).softmax(1)
    return near, weight.masked_fill(nothing[:, None], 0.0)


def _stream(checkpoint: Any, anatomy: Anatomy, tokens: Tokens, rows: Rows) -> Stream:
    for slot, name in anatomy.places.items():
        entry = checkpoint[name]
        if slot.dims[0] == ("vocab",):
            make = partial(_made, checkpoint, name, slot.name, tokens, rows)
            yield slot.name, Computed(entry.dtype, (len(tokens), *entry.shape[1:]), make)
        else:
            yield slot.name, entry


def _made(checkpoint: Any, name: str, as_name: str, tokens: Tokens, rows: Rows):
    def change(table):
        flat = table.flatten(1) if table.dim() > 1 else table[:, None]
        return rows.of(flat, tokens, as_name).reshape(len(tokens), *table.shape[1:])

    return widely(change, checkpoint.tensor(name))
