"""The mean of channels behind an activation, as well as one channel in front of it can tell.

The layer norm in BERT's head stands behind an activation f, and f of a mean is not the mean of f. The channels are
y = W x + b, and x comes out of another layer norm: x = gain n + bias, with n close to normal. So the expected mean of
f(y) is an integral over one normal variable for each channel, and so is its slope in x, the mean of E[f'(y_i)] W_i
(Stein's lemma). A channel f(v + g x) of that value and that slope is right to first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from growth.anatomy import Anatomy
from growth.families.table import Slot

POINTS = 64  # of the quadrature
RISES_FROM = -0.7  # where gelu and silu are past their minimum
FLATTEST = 0.1  # slope of f that is divided by


def told(checkpoint: Any, anatomy: Anatomy) -> Callable[[Slot], Any]:
    """What extra channels are to hold in a matrix, or its bias, in front of an activation; None elsewhere."""
    places = {(slot.row.name, slot.part): (slot, name) for slot, name in anatomy.places.items()}  # of a layer the last

    def tensor(row: str, part: str):
        return checkpoint.tensor(places[row, part][1]).double()

    @cache
    def channel() -> tuple[Any, Any]:
        row, norm, key = anatomy.family.activated
        parts = [tensor(row, part) for part in (".weight", ".bias")]
        return first_order(*parts, tensor(norm, ".weight"), tensor(norm, ".bias"), _function(anatomy, key))

    def hold(slot: Slot):
        row, norm, key = anatomy.family.activated or ("", "", "")
        known = slot.row.name == row and (row, ".bias") in places and (norm, ".bias") in places
        return channel()[slot.part == ".bias"] if known and _function(anatomy, key) else None

    return hold


def _function(anatomy: Anatomy, key: str) -> Callable[[Any], Any] | None:
    from torch.nn import functional

    name = getattr(anatomy.family.view(anatomy.config), key)
    return {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}.get(name)


def first_order(weight, bias, gain, shift, f: Callable[[Any], Any]) -> tuple[Any, Any]:
    """A row [1, width] and its bias [1] that tell the mean of f(weight x + bias) for x = gain n + shift."""
    import torch

    reach = weight * gain
    spread = (reach - reach.mean(1, keepdim=True)).norm(dim=1)  # a layer norm's n has no mean
    points, share = _normal()
    y = ((weight @ shift + bias)[:, None] + spread[:, None] * points).requires_grad_()  # [channels, points]
    (slopes,) = torch.autograd.grad(f(y).sum(), y)
    value = (f(y.detach()) @ share).mean()
    slope = ((slopes @ share)[:, None] * weight).mean(0)  # [width]
    v, steep = _inverse(f, value)
    row = slope / steep
    return row[None], (v - row @ shift)[None]


def _normal():
    """Points and weights of an expectation over a normal variable (Gauss and Hermite)."""
    import numpy as np
    import torch

    points, weights = np.polynomial.hermite_e.hermegauss(POINTS)
    return torch.from_numpy(points), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def _inverse(f: Callable[[Any], Any], value):
    """Where f has a value, by halving, and how steep it is there."""
    import torch

    low, high = value.new_tensor(RISES_FROM), value.abs() + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < value else (low, middle)
    low = low.requires_grad_()
    (steep,) = torch.autograd.grad(f(low), low)
    return low.detach(), steep.clamp(min=FLATTEST)
