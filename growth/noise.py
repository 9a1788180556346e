"""Random numbers that depend on a tensor's name and a seed alone, and noise between copies that no reader sees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from growth.maps import Units


def drawn(shape: tuple[int, ...], name: str, seed: int, dtype):
    """Normal numbers, the same for a tensor's name and seed whatever is drawn before."""
    import torch

    return torch.randn(shape, generator=generator(name, seed), dtype=dtype)


def generator(name: str, seed: int):
    """A source of random numbers that no other name and seed has."""
    import torch

    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))


def between_copies(noise, dim: int, units: Units, free: Sequence[bool]):
    """Noise that tells the readers of copies apart at no cost: it sums to zero over the copies of each unit.

    What reads an extra channel is free where nothing comes from there, and gets none elsewhere.
    """
    import torch

    noise = noise.movedim(dim, 0)
    old = torch.tensor(units.index)
    copies = torch.tensor(units.copies, dtype=noise.dtype).view([-1] + [1] * (noise.dim() - 1))
    real = old >= 0
    noise[~real & ~torch.tensor(free)] = 0
    sums = noise.new_zeros([units.old, *noise.shape[1:]]).index_add_(0, old[real], noise[real])
    noise[real] -= sums[old[real]] / copies[real]
    return noise.movedim(0, dim)
