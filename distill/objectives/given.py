"""What a plain loss is given in a loop that is not ours, judged before it computes. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from growth.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


def one_of(what: str, given: str, known: Iterable[str]) -> None:
    if given not in known:
        raise UserError(f"no {what} {given!r}{did_you_mean(given, known)}; there are {', '.join(known)}")


def placed(segments: Tensor, **states: Tensor) -> None:
    """Segments [B, T] are those of all states [B, T, W] or [B, heads, T, head]."""
    if segments.dim() != 2 or any(segments.shape != (len(x), x.shape[-2]) for x in states.values()):
        raise wrong_shapes("segments are [B, T], with the rows and places of all states", segments=segments, **states)


def wrong_shapes(rule: str, **tensors: Tensor) -> UserError:
    return UserError(f"{rule}: " + ", ".join(f"{name} is {list(x.shape)}" for name, x in tensors.items()))


def divisors(width: int, heads: int) -> str:
    """The counts nearest below `heads` that would do."""
    fitting = [str(n) for n in range(max(heads, 2) - 1, 0, -1) if width % n == 0][:4]
    return f"{', '.join(fitting)} {'do' if len(fitting) > 1 else 'does'}"
