"""Another vocabulary: rows of the embeddings, and of the head, for tokens that the model has never seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.errors import UsageError, UserError
from growth.families.table import Slot
from growth.noise import drawn
from growth.operate import PLAIN, Output, Result, delivered, opened
from growth.pieces import Computed
from growth.reindex import Stream, widely

HOW = ("mean", "normal", "multivariate")
SPREAD = 1e-5  # of the multivariate normal around the mean, relative to the covariance (Hewitt 2021)
NEIGHBOURS, TEMPERATURE = 10, 0.1  # WECHSEL's


@dataclass(frozen=True)
class Mixture:
    """New rows as sums of old ones: `index` and `weight` are [new, n]; a row of weights sums to one."""

    index: Any
    weight: Any

    def rows(self, table):
        return (table[self.index] * self.weight.to(table.dtype)[..., None]).sum(1)  # [new, width]


def vocabulary(
    src: Any,
    dst: str | Path | None = None,
    *,
    size: int | None = None,
    how: str = "mean",
    vectors: str | Path | Mapping[str, Any] | None = None,
    seed: int = 0,
    output: Output = PLAIN,
) -> Any:
    """More tokens behind the old ones (`size`), or other tokens in their place (`vectors`). Both tables follow.

    `mean`: the mean of all rows. `normal`: each channel as the rows have it. `multivariate`: around the mean, with a
    little of the rows' covariance (Hewitt 2021). `vectors`: aligned static vectors, `old` [tokens, n] and `new` [new
    tokens, n] (a safetensors file or tensors): a new row is the mean of the rows of the 10 nearest old tokens,
    weighted by a softmax (WECHSEL: Minixhofer et al. 2022, arXiv 2112.06598; OFA gives its factors as vectors);
    `same` [new tokens] names tokens that both have (-1: none), whose rows are copied.
    """
    if how not in HOW or (size is None) == (vectors is None):
        raise UsageError(f"give either size, with how one of {', '.join(HOW)}, or vectors")
    checkpoint = opened(src, dst, output)
    anatomy = dissect(checkpoint)
    old = anatomy.sizes["vocab"]
    if size is not None and size < old:
        raise UserError(f"{size} tokens are fewer than the source's {old}: `growth cut --vocab` keeps the first")
    mixture = None if vectors is None else _transferred(_tensors(vectors), old)
    size = size or len(mixture.index)
    config = anatomy.family.resized(anatomy.config, {"vocab": size})
    stream = _stream(checkpoint, anatomy, size, how, mixture, seed)
    arguments = {"size": size, "how": "vectors" if mixture else how, "seed": seed}
    facts = {"maps": {}, "new": {"vocab": list(range(0 if mixture else old, size))},
             "preserves": "no" if mixture else "exact"}  # fmt: skip
    return delivered(
        Result("vocabulary", arguments, config, stream, facts, carry=mixture is None), dst, output, checkpoint
    )


def _tensors(vectors: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(vectors, Mapping):
        return vectors
    from growth.pieces import made
    from growth.ranges import header

    if not Path(vectors).is_file():
        raise UserError(f"{vectors} is not a safetensors file of aligned vectors")
    return {name: made(entry) for name, entry in header(Path(vectors)).items()}


def _transferred(vectors: Mapping[str, Any], vocab: int) -> Mixture:
    import torch

    old, new = vectors.get("old"), vectors.get("new")
    if old is None or new is None or len(old) != vocab or old.dim() != 2 or old.shape[1:] != new.shape[1:]:
        raise UserError(f"vectors: `old` [{vocab}, n] and `new` [tokens, n] of the same n are expected")
    old, new = (torch.nn.functional.normalize(one.float(), dim=1) for one in (old, new))
    found = [(rows @ old.T).topk(min(NEIGHBOURS, vocab)) for rows in new.split(1024)]
    index = torch.cat([one.indices for one in found])
    weight = (torch.cat([one.values for one in found]) / TEMPERATURE).softmax(1)
    same = vectors.get("same")
    if same is not None:
        known = same >= 0
        index[known, 0], weight[known] = same[known].long(), torch.eye(1, index.shape[1])  # one row, to the bit
    return Mixture(index, weight)


def _stream(checkpoint: Any, anatomy: Anatomy, size: int, how: str, mixture: Mixture | None, seed: int) -> Stream:
    for slot, name in anatomy.places.items():
        entry = checkpoint[name]
        if slot.dims[0] == ("vocab",) and (mixture or size != entry.shape[0]):
            make = partial(_resized, checkpoint, name, slot, size, how, mixture, seed)
            yield slot.name, Computed(entry.dtype, (size, *entry.shape[1:]), make)
        else:
            yield slot.name, entry


def _resized(checkpoint: Any, name: str, slot: Slot, size: int, how: str, mixture: Mixture | None, seed: int):
    import torch

    def rows(table):
        flat = table.flatten(1) if table.dim() > 1 else table[:, None]
        new = mixture.rows(flat) if mixture else torch.cat([flat, _fresh(flat, size - len(flat), how, slot, seed)])
        return new.reshape(size, *table.shape[1:])

    return widely(rows, checkpoint.tensor(name))


def _fresh(table, n: int, how: str, slot: Slot, seed: int):
    """`n` rows beside those of the table."""
    mean, centred = table.mean(0), table - table.mean(0)
    if how == "mean":
        return mean.expand(n, -1)
    if how == "normal":
        return mean + drawn((n, table.shape[1]), slot.name, seed, table.dtype) * table.std(0)
    # any mixture of centred rows with normal weights has their covariance: no matrix to factor
    weights = drawn((n, len(table)), slot.name, seed, table.dtype) * (SPREAD / len(table)) ** 0.5
    return mean + weights @ centred
