"""Text as batches with labels, for what learns a little from it: the next token, or hidden ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growth.anatomy import dissect
from growth.errors import UserError
from growth.noise import generator
from growth.operate import in_memory, seen
from growth.reading import MASKED, beginning, kind_of, tokenizer_of, windows

LENGTH, ROWS = 128, 16  # tokens of a window, windows of a batch
CHARACTERS = 16  # of the text that are read for a token, at most
HIDDEN, RANDOM = 0.8, 0.1  # of what is predicted: behind the mask, behind another word (Devlin et al. 2018)


def batches(src: Any, text: str | Path, *, number: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """So many batches (input_ids, attention_mask, labels [B, T]) for the head of a checkpoint, by its own tokenizer.

    A file that is too short is read again, in another order.
    """
    checkpoint = seen(src)
    anatomy = dissect(checkpoint)
    tokenizer, objective = None if in_memory(src) else tokenizer_of(Path(src)), kind_of(anatomy)
    if tokenizer is None:
        raise UserError(f"{src} has no tokenizer (tokenizer.json), so no text can be read")
    if objective is None:
        name = next(iter(anatomy.config.get("architectures") or []), "it")
        raise UserError(f"{src}: {name} predicts neither next nor masked tokens, so it cannot learn from plain text")
    if objective == "masked" and tokenizer.mask_token_id is None:
        raise UserError(f"{src} predicts masked tokens, and its tokenizer has no mask")
    words = beginning(Path(text), number * ROWS * LENGTH * CHARACTERS)
    rows = list(windows(tokenizer, words, LENGTH, anatomy, ROWS))
    return _drawn(rows, tokenizer if objective == "masked" else None, number, seed)


def _drawn(rows: list[dict[str, Any]], tokenizer: Any, number: int, seed: int) -> Iterator[dict[str, Any]]:
    import torch

    draw = generator("text", seed)
    order = [i for _ in range(-(-number // len(rows))) for i in torch.randperm(len(rows), generator=draw).tolist()]
    for i in order[:number]:
        yield _hidden(rows[i], tokenizer, draw) if tokenizer else _next(rows[i])


def _next(row: dict[str, Any]) -> dict[str, Any]:
    ids, real = row["input_ids"], row["attention_mask"]
    return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(~row["text"], -100)}


def _hidden(row: dict[str, Any], tokenizer: Any, draw: Any) -> dict[str, Any]:
    import torch

    ids = row["input_ids"]
    chosen = (torch.rand(ids.shape, generator=draw) < MASKED) & row["text"]
    words = torch.tensor(sorted({*range(len(tokenizer))} - {*tokenizer.all_special_ids}))
    others = words[torch.randint(len(words), ids.shape, generator=draw)]
    behind = torch.rand(ids.shape, generator=draw)
    put = ids.where(behind >= HIDDEN + RANDOM, others).masked_fill(behind < HIDDEN, tokenizer.mask_token_id)
    hidden, labels = put.where(chosen, ids), ids.masked_fill(~chosen, -100)
    return {"input_ids": hidden, "attention_mask": row["attention_mask"], "labels": labels}
