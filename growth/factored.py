"""A matrix as `scale * B A` and a few values at fixed places, and such matrices at rest.

SLTrain (Han et al. 2024, arXiv 2406.02214) trains B, A and the values; PELA (Guo et al. 2023, arXiv 2310.10700) only B
and A. At rest the matrix stands merged in an ordinary checkpoint, with what it was made of in two files beside it:
`factors.safetensors`, and `factors.json`, which says of which weights they are. Matrices here are out x in, also where
a checkpoint stores in x out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growth.errors import UserError
from growth.files import read_json, write_json
from growth.ranges import inside

WEIGHTS, STORY = "factors.safetensors", "factors.json"
VERSION = 1
KEYS = ("B", "A", "values", "indices")


@dataclass(frozen=True)
class Factors:
    """One matrix."""

    B: Tensor  # [out, rank]
    A: Tensor  # [rank, in]
    values: Tensor  # [n]
    indices: Tensor  # [n] into the flat matrix, ascending
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def merged(self) -> Tensor:
        """The matrix [out, in]."""
        return merged(self.B, self.A, self.values, self.indices, self.scale)


def merged(B: Tensor, A: Tensor, values: Tensor, indices: Tensor, scale: float) -> Tensor:
    W = torch.addmm(B.new_zeros(()), B, A, beta=0, alpha=scale)  # [out, in]
    W.view(-1).index_add_(0, indices, values)
    return W


# Making them


def rank_of(out: int, into: int, compress: float) -> int:
    """The rank at which a matrix has about 1 / compress of its numbers (PELA)."""
    return max(int(out * into // (compress * (out + into))), 1)


def places(out: int, into: int, density: float) -> int:
    """How many values stand beside the low rank."""
    return int(density * out * into + 1e-6)  # in floating point 3 % of 3000 is 89.999...


def index_type(numbers: int) -> torch.dtype:
    return torch.int32 if numbers <= 2**31 else torch.int64


def drawn(out: int, into: int, rank: int, n: int, scale: float, generator: torch.Generator) -> Factors:
    """SLTrain's start: B is zero, A Kaiming-uniform (a = sqrt 5), the values uniform, their places a random draw."""
    bound = into**-0.5
    A = torch.empty(rank, into).uniform_(-bound, bound, generator=generator)
    values = torch.empty(n).uniform_(-bound, bound, generator=generator)
    indices = torch.randperm(out * into, generator=generator)[:n].sort().values
    return Factors(torch.zeros(out, rank), A, values, indices.to(index_type(out * into)), scale)


def split(W: Tensor, rank: int, n: int, scale: float) -> Factors:
    """The best low rank of a matrix, the root of its singular values on both sides (PELA); then the n places where
    most is left over."""
    U, S, Vt = torch.linalg.svd(W.float(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    B, A = U[:, :rank] * root, root[:, None] * Vt[:rank]
    rest = (W.float() - scale * (B @ A)).view(-1)
    indices = rest.abs().topk(n).indices.sort().values
    return Factors(B, A, rest[indices], indices.to(index_type(W.numel())), scale)


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from orthogonal factors of equal weight: the SVD of B A, never written out (Glentis et al. 2025,
    arXiv 2505.22922)."""
    (Q, R), (P, T) = torch.linalg.qr(B.double()), torch.linalg.qr(A.T.double())
    U, S, Vt = torch.linalg.svd(R @ T.T)  # [rank, rank]
    root = S.sqrt()
    return (Q @ U * root).to(B.dtype), (root[:, None] * (Vt @ P.T)).to(A.dtype)  # [out, rank], [rank, in]


# At rest


def write(directory: Path, factors: Mapping[str, Factors], made: Mapping[str, Any]) -> None:
    """Beside the checkpoint in `directory`; `factors` by the name of the weight, `made` says how they were made."""
    from safetensors.torch import save_file

    tensors = {f"{name}.{key}": getattr(f, key).contiguous() for name, f in factors.items() for key in KEYS}
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    weights = {
        name: {"shape": list(f.shape), "rank": f.A.shape[0], "values": f.values.numel(), "scale": f.scale}
        for name, f in factors.items()
    }
    write_json(directory / STORY, {"version": VERSION, "made": dict(made), "weights": weights})


def has(directory: Path) -> bool:
    return (Path(directory) / STORY).is_file()


def read(directory: Path) -> dict[str, Factors]:
    """The factors beside a checkpoint, by the name of the weight; refused where they are not what the json says."""
    from safetensors.torch import load_file

    story = read_json(inside(Path(directory), STORY))
    if not isinstance(story, dict) or story.get("version") != VERSION or not isinstance(story.get("weights"), dict):
        raise UserError(f"{Path(directory) / STORY}: version {VERSION} of it, with its weights, is expected")
    held = load_file(inside(Path(directory), WEIGHTS))
    wanted = {f"{name}.{key}" for name in story["weights"] for key in KEYS}
    if odd := sorted(wanted ^ held.keys()):
        raise UserError(f"{Path(directory) / WEIGHTS} and {STORY} are not of one model: {odd[0]}")
    found = {
        name: Factors(*(held[f"{name}.{key}"] for key in KEYS), scale=facts["scale"])
        for name, facts in story["weights"].items()
    }
    for name, facts in story["weights"].items():
        _refuse_damaged(f"{Path(directory) / WEIGHTS}: {name}", found[name], facts)
    return found


def _refuse_damaged(where: str, f: Factors, facts: Mapping[str, Any]) -> None:
    (out, into), rank, n = facts["shape"], facts["rank"], facts["values"]
    shapes = {"B": (out, rank), "A": (rank, into), "values": (n,), "indices": (n,)}
    for key, shape in shapes.items():
        if tuple(getattr(f, key).shape) != shape:
            raise UserError(f"{where}.{key} is {list(getattr(f, key).shape)}, {STORY} says {list(shape)}")
    if not all(bool(t.isfinite().all()) for t in (f.B, f.A, f.values)) or not math.isfinite(f.scale):
        raise UserError(f"{where}: not finite (NaN or infinity)")
    ascending = bool((f.indices.diff() > 0).all())
    if n and not (ascending and int(f.indices[0]) >= 0 and int(f.indices[-1]) < out * into):
        raise UserError(f"{where}.indices: ascending places in a matrix of {out} x {into} are expected")
