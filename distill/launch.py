"""`--ranks N`: this program N times on this machine, as one job. No torch.

Each child gets the variables that launchers set, and a file through which the ranks meet (no port to collide on). A
signal to the parent reaches every child; when one fails the others end within seconds. One that hangs and does not
fail is named and ended by those that wait for it (`distill.watch`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from distill.world import STORE
from growth.errors import UsageError

GRACE = 3.0  # seconds in which the other ranks may say something themselves, and again after SIGTERM
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ECHO = "error: stopped: another rank failed"  # what the ranks say that did not fail


def is_rank() -> bool:
    """Whether a launcher (ours, torchrun, deepspeed) started this process as one of many."""
    return "RANK" in os.environ


def refuse_other(ranks: int) -> None:
    """A launcher has decided the number already."""
    given = os.environ.get("WORLD_SIZE", "1")
    if ranks > 1 and given != str(ranks):
        raise UsageError(f"--ranks {ranks}, but the launcher started {given} ranks; leave --ranks out under a launcher")


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run `distill ARGUMENTS` as `ranks` processes; returns the exit code of the one that failed first, or 0."""
    with tempfile.TemporaryDirectory() as scratch:
        children = [_start(rank, ranks, arguments, Path(scratch) / "store") for rank in range(ranks)]
        with _forwarding(children):
            return _wait(children)


def command(arguments: Sequence[str]) -> list[str]:
    """What every rank runs."""
    return [sys.executable, "-m", "distill.cli", *arguments]


def _start(rank: int, ranks: int, arguments: Sequence[str], store: Path) -> subprocess.Popen:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, STORE: store}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {"OMP_NUM_THREADS": str(max(cores // ranks, 1))}
    relayed = rank > 0 or not sys.stderr.isatty()  # the first rank draws its bar on the terminal itself
    child = subprocess.Popen(
        command(arguments),
        env={**threads, **os.environ, **{key: str(value) for key, value in places.items()}},
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=subprocess.PIPE if relayed else None,
        start_new_session=True,  # Ctrl-C comes from us alone, once
        preexec_fn=_die_with_parent,
    )
    child.relay = threading.Thread(target=_relay, args=(rank, child.stderr), daemon=True) if relayed else None
    if child.relay:
        child.relay.start()
    return child


def _die_with_parent() -> None:
    """Linux: a killed parent takes its ranks along."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _relay(rank: int, lines) -> None:
    """A rank's words, said to be its own; that it stopped because another one failed is no news."""
    for line in lines:
        text = line.decode(errors="replace")
        if not text.startswith(ECHO):
            click.echo(text if rank == 0 else f"rank {rank}: {text}", err=True, nl=False)


@contextmanager
def _forwarding(children: list[subprocess.Popen]) -> Iterator[None]:
    def forward(number, frame):
        _signal(children, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signal(children, signal.SIGKILL)


def _signal(children: list[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _wait(children: list[subprocess.Popen]) -> int:
    while any(child.poll() is None for child in children) and not _failed(children):
        time.sleep(0.05)
    failed = _failed(children)
    if failed:
        _end(children)
    for child in children:
        child.wait()
        if child.relay:
            child.relay.join(GRACE)
    if failed and failed[0].returncode < 0:
        name = signal.Signals(-failed[0].returncode).name
        click.echo(f"error: rank {children.index(failed[0])} was ended by {name}", err=True)
    return _code(failed[0]) if failed else 0


def _failed(children: list[subprocess.Popen]) -> list[subprocess.Popen]:
    return [child for child in children if child.poll()]


def _code(child: subprocess.Popen) -> int:
    return child.returncode if child.returncode > 0 else 128 - child.returncode


def _end(children: list[subprocess.Popen]) -> None:
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number:
            _signal(children, number)
        until = time.monotonic() + GRACE
        while time.monotonic() < until and any(child.poll() is None for child in children):
            time.sleep(0.05)
