"""Log-probabilities of tokens from hidden states and a head, in memory that does not know how large the vocabulary is.

The products are made in tiles of rows x pieces of the vocabulary, and of each tile only the log-sum-exp of its rows is
kept. Tiles are as large as a cache likes them; no matrix over the vocabulary exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from distill.heads import Logits

# Rows and tokens of a tile. Measured on two cores (benchmarks/LOG.md); on a GPU a guess.
TILE, TILE_ON_A_GPU = (1024, 2048), (8192, 8192)


def log_probabilities(logits: Logits, targets: Tensor) -> Tensor:
    """Of one token a row [N], in float32 or float64."""
    return _over_rows(logits, targets)[0]


def likelier(logits: Logits, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and how many tokens the model likes better than this one [N]."""
    return _over_rows(logits, targets, count=True)


def _over_rows(logits: Logits, targets: Tensor, count: bool = False) -> tuple[Tensor, Tensor]:
    rows, width = TILE if logits.hidden.device.type == "cpu" else TILE_ON_A_GPU
    cuts = [slice(first, first + rows) for first in range(0, max(logits.rows, 1), rows)]
    with torch.no_grad(), torch.autocast(logits.hidden.device.type, enabled=False):
        found = [_of_rows(replace(logits, hidden=logits.hidden[cut]), targets[cut], width, count) for cut in cuts]
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def _of_rows(logits: Logits, targets: Tensor, width: int, count: bool) -> tuple[Tensor, Tensor]:
    gold, total, better = _gold(logits, targets), None, torch.zeros_like(targets)
    for first, tile in _tiles(logits, width):
        mass = torch.logsumexp(tile, 1)
        total = mass if total is None else torch.logaddexp(total, mass)
        if count:
            inside = (targets - first).clamp(0, tile.shape[1] - 1)[:, None]
            is_here = (targets >= first) & (targets < first + tile.shape[1])
            # another order of summation may put a token above itself
            better += (tile > gold[:, None]).sum(1) - ((tile.gather(1, inside)[:, 0] > gold) & is_here).long()
    return gold - total, better


def _tiles(logits: Logits, width: int) -> Iterator[tuple[int, Tensor]]:
    """(first token, finished logits of some tokens [n, width])."""
    for first in range(0, logits.vocabulary, width):
        cut = slice(first, first + width)
        if logits.weight is None:
            part = replace(logits, hidden=logits.hidden[:, cut])
        else:
            part = replace(logits, weight=logits.weight[cut], bias=None if logits.bias is None else logits.bias[cut])
        tile = part.product(slice(None))
        yield first, part.finish(tile.to(torch.promote_types(tile.dtype, torch.float32)))


def _gold(logits: Logits, targets: Tensor) -> Tensor:
    """The logit of each row's token [N]."""
    if logits.weight is None:
        found = logits.hidden.gather(1, targets[:, None])
    else:
        wide = torch.promote_types(logits.hidden.dtype, torch.float32)
        found = (logits.hidden.to(wide)[:, None] @ logits.weight[targets].to(wide)[:, :, None])[:, 0]  # [N, 1]
        found = found if logits.bias is None else found + logits.bias[targets, None]
    return logits.finish(found.to(torch.promote_types(found.dtype, torch.float32)))[:, 0]
