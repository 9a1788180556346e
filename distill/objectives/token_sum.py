"""Cross-entropy over a vocabulary in blocks of rows: no float32 copy of the logits, gradient in the forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.known import known, softmax_rows

LOGITS = 2**20  # of one block: 4 MiB in float32
IGNORED = -100


def scored(labels: Tensor, segments: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Flat positions b * T + t whose logits are scored [N], and their targets [N]; -100 is no label.

    Labels are unshifted. A causal position is scored with the label of the next one, if both are of one segment.
    """
    if causal:
        follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        labels = F.pad(labels[:, 1:].masked_fill(~follows, IGNORED), (0, 1), value=IGNORED)
    labels = labels.flatten()
    rows = (labels != IGNORED).nonzero().squeeze(1)
    return rows, labels[rows]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of rows [N, V] against targets [N]; 0 without rows. Float32 inside, whatever they are."""
    return cross_entropy_sum(logits, targets) / max(len(targets), 1)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of log-sum-exp minus the target's logit; its gradient softmax - one-hot is kept in their dtype."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    learns = torch.is_grad_enabled() and logits.requires_grad
    with torch.no_grad():
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.empty_like(logits) if learns else None  # [N, V]
        rows = max(1, LOGITS // logits.shape[-1])
        for block in (slice(i, i + rows) for i in range(0, len(targets), rows)):
            x, target = logits[block].to(dtype), targets[block, None]
            p = torch.empty_like(x)
            total += (softmax_rows(x, out=p) - x.gather(1, target).squeeze(1)).sum(dtype=torch.float64)
            if learns:
                gradient[block] = p.scatter_add_(1, target, torch.full_like(x[:, :1], -1))
    return known(total.to(dtype), {logits: gradient} if learns else {})
