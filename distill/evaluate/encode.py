"""Texts to vectors: the mean of the last hidden states over real tokens, the same for any batch and any padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill import layout

TOKENS = 2048  # of a batch, padding counted


@torch.inference_mode()
def encode(model: nn.Module, tokenizer, texts: list[str], length: int, tokens: int = TOKENS) -> Tensor:
    """Embeddings in the order of the texts, [N, D] float32 on the CPU; sorted by length so that padding is rare."""
    ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    pooled = [_pooled(model, [ids[i] for i in group]) for group in _groups(order, ids, tokens)]
    place = torch.empty(len(order), dtype=torch.long)
    place[order] = torch.arange(len(order))
    return torch.cat(pooled)[place]


def _groups(order: list[int], ids: list[list[int]], tokens: int) -> list[list[int]]:
    """Runs of the order whose rows, padded to their longest (the last), hold at most `tokens`; at least one row."""
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(ids[i]) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _pooled(model: nn.Module, rows: list[list[int]]) -> Tensor:
    batch = {key: value.to(model.device) for key, value in layout.padded(rows).items()}
    hidden = model(**layout.inputs(model, batch)).last_hidden_state.float()  # [B, T, D]
    real = batch["segment_ids"][:, :, None] > 0
    return (hidden.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp_min(1)).cpu()
