"""Ranks of one machine watch one another: one that hangs is named by those that wait, and the job ends. No torch.

Every rank counts its meetings with the others, and the parts of a step in which DeepSpeed has some, on a board that the
others can read. The one that is behind is waited for, for as long as it takes: loading, evaluating or writing alone is
no hang. It hangs when it is stopped, or when all that time it used no processor, read and wrote nothing, and no thread
of it was in the hands of a disk, a network or a debugger. Linux alone; ranks on several machines are not watched.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click

LOOKS = 9  # in a row, that see nothing done
SPEAKERS = 2  # of those that wait, the first ones look: one of them may be stopped itself
BOARD = struct.Struct("<qq?200s")  # meetings, parts since the last one, whether it waits there, the place
SLEEP = re.compile("futex|nanosleep|poll|select|pipe_read|signal_stop")  # the kernel's waits in which no work is done
TICKS = os.sysconf("SC_CLK_TCK")


class Board:
    """Where this rank is: memory that others find by a name below /proc, and that goes when the process goes."""

    def __init__(self):
        self.name = f"distill-{secrets.token_hex(8)}"
        self.file = os.memfd_create(self.name)
        self.address = os.getpid(), f"/proc/{os.getpid()}/fd/{self.file}", self.name
        self.meetings, self.part, self.waits, self.place = 0, 0, False, ""
        self.write()

    def write(self) -> None:
        os.pwrite(self.file, BOARD.pack(self.meetings, self.part, self.waits, self.place.encode()), 0)


_board: Board | None = None


def at(place: str) -> None:
    """Say where in the run this rank is."""
    if _board:
        _board.place = place
        _board.write()


def part() -> None:
    """The next part of a step begins: it may wait for the others, who have to reach it as well."""
    if _board:
        _board.part += 1
        _board.write()


@contextmanager
def meeting() -> Iterator[None]:
    """All ranks come here, and go on together."""
    if _board:
        _board.meetings, _board.part, _board.waits = _board.meetings + 1, 0, True
        _board.write()
    yield
    if _board:
        _board.waits = False
        _board.write()


@contextmanager
def over(rank: int, gathered: Callable[[tuple], list[tuple]], patience: float | None) -> Iterator[None]:
    """Inside, a rank that does nothing for `patience` seconds while others wait ends the job. `gathered`: of world."""
    global _board
    if patience is None or not hasattr(os, "memfd_create"):
        yield
        return
    _board = Board()
    watch = Watch(rank, [Peer(*address) for address in gathered(_board.address)], patience)
    watch.start()
    try:
        yield
    finally:
        watch.done.set()
        watch.join()
        os.close(_board.file)
        _board = None


@dataclass(frozen=True)
class Look:
    """What a process and its children have used up to now, in ticks and bytes."""

    asleep: bool
    stopped: bool
    main: int  # of its main thread
    ticks: int
    bytes: int
    family: frozenset[int]

    @classmethod
    def at(cls, pid: int) -> Look:
        state, main = _stat(f"/proc/{pid}/task/{pid}")
        family = frozenset(_family(pid))
        return cls(
            asleep=_sleeps(pid, pid) and all(_sleeps(p, thread) for p in family for thread in _threads(p)),
            stopped=state == "T",
            main=main,
            ticks=sum(_stat(f"/proc/{p}")[1] for p in family),
            bytes=sum(map(_transferred, family)),
            family=family,
        )

    def idle_since(self, then: Look, seconds: float) -> bool:
        """What sleeps for good uses nothing; its other threads may draw a bar."""
        return (
            self.asleep
            and self.family == then.family
            and self.main - then.main <= 2
            and self.ticks - then.ticks <= (0.02 * seconds + 0.1) * TICKS
            and self.bytes - then.bytes < 1_000_000
        )


def _stat(directory: str) -> tuple[str, int]:
    """State and ticks (user, system) of a process or thread."""
    fields = Path(directory, "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


def _threads(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def _family(pid: int) -> Iterator[int]:
    yield pid
    for thread in _threads(pid):
        for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
            yield from _family(int(child))


def _sleeps(pid: int, thread: int) -> bool:
    """Unknown counts as work for a main thread; another may be running, which its ticks tell."""
    wait = Path(f"/proc/{pid}/task/{thread}/wchan").read_text()
    return bool(SLEEP.search(wait)) or (thread != pid and wait == "0" and _stat(f"/proc/{pid}/task/{thread}")[0] != "D")


def _transferred(pid: int) -> int:
    return sum(int(line.split()[1]) for line in Path(f"/proc/{pid}/io").read_text().splitlines()[:2])


class Told(NamedTuple):
    """What stands on a board."""

    reached: tuple[int, int]  # of meetings, and parts since
    waits: bool
    place: str


@dataclass
class Peer:
    """Another rank, or this one, from outside."""

    pid: int
    file: str
    name: str
    first: Look | None = None  # since when nothing was seen to be done
    looks: int = 0

    def read(self) -> Told:
        """OSError: it is not on this machine, or gone."""
        if self.name not in os.readlink(self.file):
            raise ProcessLookupError(self.pid)
        with open(self.file, "rb") as file:
            meetings, part, waits, place = BOARD.unpack(file.read())
        return Told((meetings, part), waits, place.rstrip(b"\0").decode(errors="replace"))

    def look(self, interval: float) -> Look:
        now = Look.at(self.pid)
        if self.first and now.idle_since(self.first, self.looks * interval):
            self.looks += 1
        else:
            self.first, self.looks = now, 0
        return now


class Watch(threading.Thread):
    def __init__(self, rank: int, peers: list[Peer], patience: float):
        super().__init__(daemon=True)
        self.rank, self.peers, self.patience = rank, peers, patience
        self.done, self.lowest = threading.Event(), None

    def run(self) -> None:
        while not self.done.wait(self.patience / LOOKS):
            try:
                hanging = self.hanging()
            except OSError:
                continue  # one has ended, or is out of sight: whoever started it will know
            if hanging:
                self.end(hanging)

    def hanging(self) -> dict[int, str]:
        """The ranks for which the others have waited long enough, and their places."""
        boards = {rank: peer.read() for rank, peer in enumerate(self.peers)}
        before, self.lowest = self.lowest, min(told.reached for told in boards.values())
        behind = [rank for rank, told in boards.items() if told.reached == self.lowest]
        waiting = [rank for rank in boards if rank not in behind] or behind
        if self.lowest != before:
            for peer in self.peers:
                peer.first = None
        if self.lowest != before or self.rank not in waiting[:SPEAKERS]:
            return {}
        looks = {rank: self.peers[rank].look(self.patience / LOOKS) for rank in behind}
        still = [rank for rank in behind if self.peers[rank].looks >= LOOKS + waiting.index(self.rank)]
        found = [rank for rank in still if looks[rank].stopped]
        if len(still) == len(behind) and not any(boards[rank].waits for rank in behind):  # else they wait themselves
            found = found or still
        return {rank: boards[rank].place for rank in found}

    def end(self, hanging: dict[int, str]) -> None:
        """Say it, and end those that would not end by themselves; whoever started us ends the rest."""
        who = " and ".join(f"rank {rank} ({place})" for rank, place in hanging.items())
        others = "nobody goes on" if self.rank in hanging else f"rank {self.rank} waits"
        click.echo(
            f"error: {who} did nothing for {self.patience:.0f} s and {others}, so the job ends here. "
            f"The next run goes on from the last snapshot; engine.timeout=null would wait for ever",
            err=True,
        )
        for rank in hanging:
            if rank != self.rank:
                os.kill(self.peers[rank].pid, signal.SIGKILL)
        os._exit(1)
