"""Peak memory of this process: of the device's allocator on CUDA, of the whole process elsewhere."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch


def peak() -> int:
    """Bytes, since it was last forgotten."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """What comes next has a peak of its own; where the kernel does not let it be forgotten, that of all so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is resident now
