"""Real text, read by two checkpoints: the loss before and after, or, without a head, how alike their vectors are.

Random tokens tell whether two models compute the same; text tells how much it matters where they do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.errors import UserError
from growth.operate import in_memory, seen
from growth.verify import load, longest

CHARACTERS = 1 << 16  # of the text that are read
LENGTH, PASSAGE, ROWS = 512, 128, 8  # tokens of a window with a head, without one; windows at a time
MASKED, SEED = 0.15, 0  # BERT's share of masked tokens; the same ones in both models
KINDS = {"next": ("ForCausalLM", "LMHeadModel"), "masked": ("ForMaskedLM", "ForPreTraining")}


@dataclass(frozen=True)
class Loss:
    """How well a model with a head predicts the text: the next token, or masked ones."""

    kind: str  # next | masked
    nats: float  # for each of the
    tokens: int  # that were predicted

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats, 700))  # beyond it there is no float64


@dataclass(frozen=True)
class Likeness:
    """How alike two models without a head see passages of the text: by the mean of their hidden states."""

    passages: int
    cosine: float  # of both models' vectors of a passage, over the channels that both have, on average
    least: float
    moved: float  # by how much the cosine of two passages is another in the second model, on average
    most: float


def on_text(a: Any, b: Any, text: str | Path, characters: int = CHARACTERS) -> list[Loss] | Likeness:
    """Both models on the beginning of a file, in float32, each with its own tokenizer if it has one."""
    sources = seen(a), seen(b)
    anatomies = [dissect(source) for source in sources]
    words = beginning(Path(text), characters)
    tokenizers = _tokenizers(a, b)
    kinds = [kind_of(anatomy) for anatomy in anatomies]
    both = list(zip(sources, anatomies, tokenizers, strict=True))
    if None in kinds or kinds[0] != kinds[1]:
        return _alike(*(_vectors(*each, words) for each in both))
    return [_loss(*each, words, kinds[0]) for each in both]


def beginning(path: Path, characters: int) -> str:
    if not path.is_file():
        raise UserError(f"{path} is not a text file")
    try:
        with path.open(encoding="utf-8") as file:
            words = file.read(characters)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not words.strip():
        raise UserError(f"{path} holds no text")
    return words


def kind_of(anatomy: Anatomy) -> str | None:
    name = next(iter(anatomy.config.get("architectures") or []), "")
    return next((kind for kind, ends in KINDS.items() if name.endswith(ends)), None)


def _tokenizers(a: Any, b: Any) -> list[Any]:
    """Each one's own, or the other's where there is none: a result with the same tokens may have come without."""
    found = [None if in_memory(one) else tokenizer_of(Path(one)) for one in (a, b)]
    if found == [None, None]:
        raise UserError(f"neither {a} nor {b} has a tokenizer (tokenizer.json), so no text can be read")
    return [one or other for one, other in (found, reversed(found))]


def tokenizer_of(path: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{path}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def windows(tokenizer: Any, words: str, length: int, anatomy: Anatomy, number: int = ROWS) -> Iterator[dict[str, Any]]:
    """Batches of windows that follow each other: ids, and which of them are text."""
    import torch

    length = min(longest(anatomy, length), anatomy.config.get("max_position_embeddings", length))
    how = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
    rows = tokenizer(words, **how, return_special_tokens_mask=True)
    if (worst := max(map(max, rows["input_ids"]))) >= anatomy.sizes["vocab"]:
        raise UserError(f"the tokenizer gives token {worst}, and the model has {anatomy.sizes['vocab']}")
    for at in range(0, len(rows["input_ids"]), number):
        ids, special = (rows[name][at : at + number] for name in ("input_ids", "special_tokens_mask"))
        wide = max(map(len, ids))
        yield {
            "input_ids": torch.tensor([row + [0] * (wide - len(row)) for row in ids]),  # [B, T]
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (wide - len(row)) for row in ids]),
            "text": torch.tensor([[1 - s for s in row] + [0] * (wide - len(row)) for row in special]).bool(),
        }


def _loss(checkpoint: Any, anatomy: Anatomy, tokenizer: Any, words: str, kind: str) -> Loss:
    import torch

    model = load(checkpoint, anatomy, torch.float32)
    predict = _next if kind == "next" else _hidden(tokenizer, checkpoint, SEED)
    total, tokens = 0.0, 0
    for batch in windows(tokenizer, words, LENGTH, anatomy):
        logits, targets = predict(model, batch)  # [N, V], [N]
        total += float(torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))
        tokens += len(targets)
    if not tokens:
        raise UserError(f"the text is too short for {checkpoint.path} to predict a token of it")
    return Loss(kind, total / tokens, tokens)


def _next(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """The logits of every token of the text that has one before it, and that token."""
    targets, wanted = batch["input_ids"][:, 1:], batch["text"][:, 1:]
    return _logits(model, batch["input_ids"], batch["attention_mask"])[:, :-1][wanted], targets[wanted]


def _hidden(tokenizer: Any, checkpoint: Any, seed: int):
    """The same for tokens under masks, which are drawn once and for all."""
    import torch

    if tokenizer.mask_token_id is None:
        raise UserError(f"{checkpoint.path} predicts masked tokens, and its tokenizer has no mask")
    draw = torch.Generator().manual_seed(seed)

    def predict(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        ids = batch["input_ids"]
        wanted = (torch.rand(ids.shape, generator=draw) < MASKED) & batch["text"]
        masked = ids.masked_fill(wanted, tokenizer.mask_token_id)
        return _logits(model, masked, batch["attention_mask"])[wanted], ids[wanted]

    return predict


def _logits(model: Any, ids: Any, real: Any):
    import torch

    with torch.no_grad():
        seen = model(input_ids=ids, attention_mask=real)
    return seen["logits" if "logits" in seen else "prediction_logits"]  # [B, T, V]


def _vectors(checkpoint: Any, anatomy: Anatomy, tokenizer: Any, words: str):
    """The mean hidden state of every passage: [passages, width]."""
    import torch

    model = load(checkpoint, anatomy, torch.float32)
    body = model.get_encoder() if anatomy.config.get("is_encoder_decoder") else model.base_model
    means = []
    for batch in windows(tokenizer, words, PASSAGE, anatomy):
        real = batch["attention_mask"]
        with torch.no_grad():
            hidden = body(input_ids=batch["input_ids"], attention_mask=real)["last_hidden_state"].double()  # [B, T, D]
        means.append((hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True))
    return torch.cat(means)


def _alike(one: Any, two: Any) -> Likeness:
    import torch

    rows, width = min(len(one), len(two)), min(one.shape[1], two.shape[1])
    pairs = torch.cosine_similarity(one[:rows, :width], two[:rows, :width])  # [passages]
    apart = (_between(one[:rows]) - _between(two[:rows])).abs()
    return Likeness(rows, float(pairs.mean()), float(pairs.min()), float(apart.mean()), float(apart.max()))


def _between(vectors: Any):
    """Cosines of all pairs of passages."""
    import torch

    unit = torch.nn.functional.normalize(vectors, dim=1)
    return (unit @ unit.T)[tuple(torch.triu_indices(len(unit), len(unit), 1))]  # [pairs]
