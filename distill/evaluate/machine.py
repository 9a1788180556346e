"""What the figures were measured on; no host name and no path."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = ("distill-growth", "torch", "transformers", "deepspeed", "safetensors", "tokenizers", "numpy")


def facts() -> dict:
    """The keys `machine`, `versions` and `command` of a report."""
    return {
        "machine": {"cores": cores(), "cpu": cpu(), "memory": memory(), "gpu": gpu()},
        "versions": {"python": platform.python_version(), **versions()},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def versions() -> dict[str, str]:
    """Of what is installed."""
    return {name: found.version for name in PACKAGES for found in distributions(name=name)}


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


def matmul_speed(precision: str, duration: float = 0.5) -> tuple[float, str]:
    """(FLOPs a second of a plain matrix product here and now, CPU or GPU)."""
    import torch

    gpu = torch.cuda.is_available()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    n = 8192 if gpu else 1024
    a = torch.ones(n, n, dtype=dtype, device="cuda" if gpu else "cpu")
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < duration:
        a @ a
        if gpu:
            torch.cuda.synchronize()
        done += 1
    return 2 * n**3 * done / (time.perf_counter() - began), "GPU" if gpu else "CPU"
