"""What the figures were measured on; no host name and no path."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("distill-growth", "torch", "transformers", "deepspeed", "safetensors", "tokenizers", "numpy")


def facts() -> dict:
    """The keys `machine`, `versions` and `command` of a report."""
    return {
        "machine": {"cores": cores(), "cpu": cpu(), "memory": memory(), "gpu": gpu()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
