"""What a cache keeps of a teacher at every token that it predicts: columns of a store, made of logits and read back.

Each class is one choice of `keep`: `columns` of the store, `kept` from the rows of a teacher's head (the tokens that
follow, numbers drawn from 0 to 1) to the values of those rows, `restored` from values to what a loss compares a student
with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from distill.heads import Logits
from distill.objectives.sparse import Sampled, Spoken, TopK
from distill.objectives.token_sum import strips
from distill.refine.likelihood import log_probabilities
from distill.scores.shards import Column, Ragged
from distill.teachers import topk
from growth import files
from growth.errors import UserError

HEAD = "head.safetensors"
Values = dict[str, Tensor | Ragged]
"""One value a row [N, ...], or several: end to end, and how many each row has."""


@dataclass(frozen=True)
class KeepTopK:
    """The k likeliest tokens and what the others have together: 4 + 2 bytes for each in float16."""

    k: int
    dtype: str
    vocabulary: int
    temperature: float

    def columns(self) -> dict[str, Column]:
        return topk.columns(self.k, self.dtype)

    def kept(self, head: Logits, following: Tensor, starts: Tensor) -> Values:
        found: list[tuple[Tensor, ...]] = [self._of(x / self.temperature) for _, x in strips(head)]
        ids, log_probs, rest = map(torch.cat, zip(*found, strict=True))
        dtype = getattr(torch, self.dtype)
        least = torch.finfo(dtype).min  # the logarithm of nothing; its exponential is 0
        narrow = [x.clamp(min=least).to(dtype) for x in (log_probs, rest)]
        return {"ids": ids.int(), "log_probs": narrow[0], "rest": narrow[1]}

    def _of(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best, log_sum = logits.topk(self.k), logits.logsumexp(-1)
        rest = logits.scatter(1, best.indices, float("-inf")).logsumexp(-1)
        return best.indices, best.values - log_sum[:, None], rest - log_sum

    def restored(self, values: Values) -> TopK:
        ids, log_probs, rest = values["ids"], values["log_probs"], values["rest"]
        topk.check(ids.numpy(), log_probs.numpy(), rest.numpy(), self.vocabulary)
        return TopK(ids.long(), log_probs, rest, self.vocabulary, self.temperature)


@dataclass(frozen=True)
class KeepSampled:
    """Draws from the teacher, five bytes for each different token, and the entropy of all of it.

    The draws of a row are evenly spaced from one random start along its summed probabilities (systematic sampling), so
    that a token is drawn `draws` times its probability on average, and never off by a whole draw: as unbiased as
    independent draws, and far less noisy.
    """

    draws: int
    vocabulary: int
    temperature: float

    def columns(self) -> dict[str, Column]:
        return {
            "ids": Column("int32", ragged=True, unit="token"),
            "counts": Column("uint8", ragged=True, unit="draw"),
            "entries": Column("uint8", ragged=True, unit="different token"),  # of each row
            "entropy": Column("float32", ragged=True, unit="nat"),
        }

    def kept(self, head: Logits, following: Tensor, starts: Tensor) -> Values:
        found = [self._of(x / self.temperature, starts[rows]) for rows, x in strips(head)]
        ids, counts, entries, entropy = map(torch.cat, zip(*found, strict=True))
        several = {"ids": ids.int(), "counts": counts.to(torch.uint8)}
        return {
            **{name: Ragged(values, entries) for name, values in several.items()},
            "entries": entries.to(torch.uint8),
            "entropy": entropy.float(),
        }

    def _of(self, logits: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        summed = p.cumsum(-1, dtype=torch.float64)  # in float32 a vocabulary's sum is off by more than its rare tokens
        even = torch.arange(self.draws, dtype=torch.float64, device=p.device)
        points = (starts[:, None].to(summed) + even) / self.draws * summed[:, -1:]
        drawn = torch.searchsorted(summed, points, right=True).clamp(max=self.vocabulary - 1)  # [n, draws], ascending
        first = torch.ones_like(drawn, dtype=torch.bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        place = first.flatten().nonzero().squeeze(1)
        counts = torch.diff(place, append=place.new_tensor([first.numel()]))
        entropy = -(p * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
        return drawn.flatten()[place], counts, first.sum(1), entropy

    def restored(self, values: Values) -> Sampled:
        entries = values["entries"].long()
        there = torch.arange(int(entries.max()) if len(entries) else 0) < entries[:, None]  # [N, m]
        ids, counts = values["ids"].long(), values["counts"].float()
        if len(ids) != len(counts) or len(ids) != int(entries.sum()):
            raise UserError("a cached sample has more or fewer tokens than it says")
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise UserError(
                f"cached token ids {ids.min()} to {ids.max()}; the vocabulary ends at {self.vocabulary - 1}"
            )
        weights = torch.zeros(there.shape).masked_scatter_(there, counts)
        if not bool((weights.sum(1) == self.draws).all()):
            raise UserError(f"cached samples are not of {self.draws} draws each")
        if not bool((values["entropy"] >= -1e-4).all()):  # NaN is not
            raise UserError("a cached entropy is below zero or no number")
        padded = torch.zeros(there.shape, dtype=torch.long).masked_scatter_(there, ids)
        return Sampled(padded, weights / self.draws, values["entropy"], self.vocabulary, self.temperature)


@dataclass(frozen=True)
class KeepHidden:
    """What the teacher's last linear layer is given: with that layer every divergence is exact, at any temperature."""

    width: int
    dtype: str
    vocabulary: int
    scale: float
    softcap: float | None
    layer: Mapping[str, Tensor] = field(default_factory=dict)  # weight [V, D] and, where there is one, bias [V]

    @classmethod
    def of(cls, head: Logits, dtype: str | None) -> KeepHidden:
        there = {"weight": head.weight, "bias": head.bias}
        layer = {name: tensor for name, tensor in there.items() if tensor is not None}
        dtype = dtype or str(head.hidden.dtype).removeprefix("torch.")
        return cls(head.hidden.shape[1], dtype, head.vocabulary, head.scale, head.softcap, layer)

    def columns(self) -> dict[str, Column]:
        return {"hidden": Column(self.dtype, (self.width,), ragged=True)}

    def kept(self, head: Logits, following: Tensor, starts: Tensor) -> Values:
        return {"hidden": head.hidden.detach().to(getattr(torch, self.dtype))}

    def restored(self, values: Values) -> Logits:
        hidden = values["hidden"]
        if not bool(hidden.isfinite().all()):
            raise UserError("cached hidden states are NaN or infinite")
        weight = self.layer["weight"]
        return Logits(hidden.to(weight), weight, self.layer.get("bias"), self.scale, self.softcap)

    def save(self, path: Path) -> None:
        """The layer, beside the states that it reads."""
        path.mkdir(parents=True, exist_ok=True)
        layer = {name: tensor.detach().cpu().contiguous() for name, tensor in self.layer.items()}
        files.write_bytes(path / HEAD, [safetensors.save(layer)])

    def load(self, path: Path, device: torch.device) -> KeepHidden:
        layer = safetensors.load_file(path / HEAD, device=str(device))
        return replace(self, layer=layer)


@dataclass(frozen=True)
class KeepLikelihood:
    """How likely each token was that is there, in tokens of the teacher's own: four bytes."""

    def columns(self) -> dict[str, Column]:
        return {"log_probs": Column("float32", ragged=True, unit="nat")}

    def kept(self, head: Logits, following: Tensor, starts: Tensor) -> Values:
        return {"log_probs": log_probabilities(head, following).float()}

    def restored(self, values: Values) -> Spoken:
        if not bool((values["log_probs"] <= 1e-4).all()):  # NaN is not
            raise UserError("a cached log-probability is above zero or no number")
        return Spoken(values["log_probs"])


Keep = KeepTopK | KeepSampled | KeepHidden | KeepLikelihood
KEEPS: dict[str, type[Keep]] = {
    "topk": KeepTopK,
    "sampled": KeepSampled,
    "hidden": KeepHidden,
    "likelihood": KeepLikelihood,
}


def settings(keep: Keep) -> dict[str, Any]:
    """All of it that JSON can hold: `KEEPS[kind](**settings)` is it again."""
    return {one.name: getattr(keep, one.name) for one in fields(keep) if one.name != "layer"}
