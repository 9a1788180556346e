"""Logits as what makes them: rows of hidden states and the head's own weights, never rows x vocabulary at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from growth.errors import UserError

HALF = (torch.bfloat16, torch.float16)
PROBES = (0.0, 1e-6, 1.0, 1e30)  # nothing, where a cap is not felt, between, where only the cap is left


@dataclass(frozen=True)
class Logits:
    """N rows of cap(scale * (hidden W^T + bias)), cap(x) = softcap * tanh(x / softcap); without a weight, `hidden`."""

    hidden: Tensor  # [N, D]
    weight: Tensor | None = None  # [V, D]; under ZeRO-3 read inside the module that goes through the engine
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def rows(self) -> int:
        return len(self.hidden)

    @property
    def vocabulary(self) -> int:
        return self.hidden.shape[1] if self.weight is None else len(self.weight)

    @property
    def there(self) -> bool:
        """Whether the logits are there already, all of them."""
        return self.weight is None

    @property
    def learns(self) -> bool:
        return any(x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias))

    def frozen(self) -> Logits:
        """To be read when the parameters it is made of are no longer there: a share of them may be all that is kept."""
        weight, bias = (x if x is None else x.detach() for x in (self.weight, self.bias))
        return replace(self, weight=weight, bias=bias)

    def at(self, rows: Tensor) -> Logits:
        """Some of the rows."""
        return replace(self, hidden=self.hidden[rows])

    def trimmed(self, vocabulary: int) -> Logits:
        """Without the entries after the first `vocabulary`: a padded head has rows that stand for no token."""
        if vocabulary == self.vocabulary:
            return self
        if self.weight is None:
            return replace(self, hidden=self.hidden[:, :vocabulary])
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)

    def product(self, rows: slice) -> Tensor:
        """hidden W^T + bias of some rows [n, V], in float32 or float64; logits that are there come as they are."""
        if self.weight is None:
            return self.hidden[rows]
        x = wide_product(self.hidden[rows], self.weight.mT)
        return x if self.bias is None else x.add_(self.bias)

    def finish(self, product: Tensor) -> Tensor:
        """Logits of a product."""
        scaled = product if self.scale == 1 else product * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def through(self, slope: Tensor, logits: Tensor) -> Tensor:
        """A derivative by the logits, as one by the product."""
        if self.softcap is not None:
            slope = slope * (1 - (logits / self.softcap) ** 2)
        return slope if self.scale == 1 else slope * self.scale

    def whole(self) -> Tensor:
        """All of them [N, V]: for a few rows."""
        return self.finish(self.product(slice(None)))


@dataclass(frozen=True)
class Mixture:
    """What several teachers say of the same N rows, as the logarithm of one distribution, made chunk by chunk.

    `mean_prob` is the mean of their probabilities. `mean_logprob` is that of their log-probabilities, brought to one:
    what one of them rules out is ruled out.
    """

    members: tuple[Logits, ...]
    combine: Literal["mean_prob", "mean_logprob"] = "mean_prob"
    there = False

    @property
    def rows(self) -> int:
        return self.members[0].rows

    @property
    def vocabulary(self) -> int:
        """What all of them have: entries behind it are padding of a head."""
        return min(member.vocabulary for member in self.members)

    def trimmed(self, vocabulary: int) -> Mixture:
        return replace(self, members=tuple(member.trimmed(vocabulary) for member in self.members))

    def product(self, rows: slice) -> Tensor:
        """Log-probabilities of some rows [n, V], in float32 or float64."""
        first, *others = self.members
        total, add = self._log_probs(first, rows), torch.logaddexp if self.combine == "mean_prob" else torch.add
        for member in others:
            add(total, self._log_probs(member, rows), out=total)
        if self.combine == "mean_prob":
            return total.sub_(math.log(len(self.members)))
        return torch.log_softmax(total.div_(len(self.members)), -1)

    def _log_probs(self, member: Logits, rows: slice) -> Tensor:
        member = member.trimmed(self.vocabulary)
        logits = member.finish(member.product(rows))
        return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def finish(self, product: Tensor) -> Tensor:
        """They are logits as they are."""
        return product

    def whole(self) -> Tensor:
        return self.product(slice(None))


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, not rounded to half precision: a logit of 20 in bfloat16 may be off by 0.06."""
    if left.dtype in HALF and left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, likewise; half precision on CUDA alone, where float32 would be many times slower."""
    if right.dtype in HALF and right.is_cuda:
        torch.addmm(total, left.to(right.dtype), right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left, right.to(total.dtype))


@contextmanager
def unmade(model: nn.Module) -> Iterator[list]:
    """Inside, the model's last linear layer keeps what it is given in the list handed out and makes no logits.

    It answers with a few numbers instead. `of` reads from what the model makes of them how it scales and caps logits:
    no table of families.
    """
    head, kept = model.get_output_embeddings(), []
    if head is None:
        raise UserError(f"{type(model).__name__} has no language-model head, so there are no logits to take")
    if len(head.weight) != model.config.vocab_size:  # DeBERTa's newer head
        raise UserError(f"{type(model).__name__} makes its logits behind its output embeddings; they cannot be taken")

    def keep(hidden: Tensor) -> Tensor:
        kept.append(hidden)
        return torch.tensor(PROBES, dtype=torch.float64, device=hidden.device).view(1, -1, 1)

    head.forward = keep
    try:
        yield kept
    finally:
        del head.forward


def of(model: nn.Module, hidden: Tensor, answer: Tensor) -> Logits:
    """The logits of hidden rows [N, D], given the model's `answer` to the probes."""
    nothing, least, one, most = answer.flatten().tolist()
    softcap = most if most < 1e6 else None
    scale = least / PROBES[1] if softcap else one
    head = model.get_output_embeddings()
    found = Logits(hidden, head.weight, head.bias, scale if abs(scale - 1) > 1e-6 else 1.0, softcap)
    expected = float(found.finish(torch.tensor(1.0, dtype=torch.float64)))
    if nothing != 0 or abs(expected - one) > 1e-5 * abs(one):
        raise UserError(f"{type(model).__name__} does more to its logits than scale and cap them")
    return found
