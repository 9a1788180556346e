"""What a snapshot costs: seconds to save and to restore, local and canonical, and what memory it takes meanwhile.

    OMP_NUM_THREADS=1 python benchmarks/snapshots.py [--layers 80] [--width 512] [--times 3]

Two ranks on one machine, fp32, ZeRO 1 and 3: `--layers` square matrices of `--width`, by default 21 M parameters, one
step done, 252 MB of masters and moments. Seconds are the smallest of `--times`, to the rename, files on the disk.
Memory is the most that a rank allocates meanwhile beyond what it held (anonymous pages; the cache of files is the
system's), in the number of largest tensors: a matrix in float32, an eightieth of a file. Restoring is into an engine
that was just made; its share of both moments, which it keeps, is not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from distill import snapshot, world
from distill.engine import Engine
from growth import console

OPTIM = {"batch": 2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0}


class Squares(nn.Module):
    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x.float().square().mean()


class Rise:
    """The most anonymous memory of this process inside the block, above what it was before."""

    def __enter__(self) -> Rise:
        self.before = self.most = resident()
        self.over, self.watch = threading.Event(), threading.Thread(target=self._look)
        self.watch.start()
        return self

    def _look(self) -> None:
        while not self.over.wait(0.001):
            self.most = max(self.most, resident())

    def __exit__(self, *_) -> None:
        self.over.set()
        self.watch.join()

    @property
    def bytes(self) -> int:
        return self.most - self.before


def resident() -> int:
    """Bytes of memory that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024


def timed(work: Callable[[], object]) -> float:
    world.barrier()
    began = time.perf_counter()
    work()
    world.barrier()
    return time.perf_counter() - began


def engine_of(arguments) -> Engine:
    spec = SimpleNamespace(zero=arguments.stage, precision="fp32", deepspeed={})
    return Engine(Squares(arguments.layers, arguments.width), spec, SimpleNamespace(**OPTIM), 1)


def rank(arguments) -> None:
    """What every rank does, for one stage; the first says a row for each kind of snapshot."""
    torch.set_num_threads(1)
    engine = engine_of(arguments)
    engine.backward(engine(torch.ones(1, arguments.width)))
    engine.step(0.001)
    parents, rows = {local: arguments.place / f"{arguments.stage} {local}" for local in (False, True)}, {}
    for local, parent in parents.items():
        saves = []
        for time_ in range(arguments.times):
            with Rise() as saving:
                saves.append(timed(lambda: snapshot.save(parent, time_, engine, {}, {}, local=local)))  # noqa: B023
        rows[local] = [min(saves), saving.bytes]
    engine.close()
    largest, moments = 4 * arguments.width**2, 2 * 4 * arguments.layers * arguments.width**2 // world.size()
    for local, parent in parents.items():
        fresh = engine_of(arguments)
        found = snapshot.latest(parent)
        with Rise() as restoring:
            seconds = timed(lambda: snapshot.restore(found, fresh, {}))  # noqa: B023
        fresh.close()
        save, saving = rows[local]
        held = [f"{n / largest:.1f}" for n in (*world.gathered(saving), *world.gathered(restoring.bytes - moments))]
        if world.rank() == 0:
            kind = "local" if local else "canonical"
            print("\t".join([str(arguments.stage), kind, f"{save:.2f}", f"{seconds:.2f}", *held]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.place:
        rank(arguments)
        world.leave_at_once(SystemExit(0))
    rows = []
    with tempfile.TemporaryDirectory() as place, console.bar(2, "ZeRO stages") as advance:
        for stage in (1, 3):
            rows += said_by_ranks(Path(place), "--stage", str(stage))
            advance()
    heads = [
        "ZeRO",
        "snapshot",
        "save s",
        "restore s",
        *(f"{r}, {does}" for does in ("saving", "restoring") for r in "01"),
    ]
    title = (
        f"{console.count(arguments.layers * arguments.width**2)} parameters, two ranks; largest tensors held by each"
    )
    console.table(heads, rows, title=title)


def said_by_ranks(place: Path, *arguments: str, ranks: int = 2) -> list[list[str]]:
    """The lines that this script's ranks say, one process each."""
    command = [sys.executable, "-W", "ignore", *sys.argv, *arguments, "--place", str(place)]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), world.STORE: str(place / f"store {' '.join(arguments)}")}
    shared["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is the system's again, or the heap's holes would count
    started = [
        subprocess.Popen(command, env=shared | {"RANK": n, "LOCAL_RANK": n}, stdout=subprocess.PIPE, text=True)
        for n in map(str, range(ranks))
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a rank failed")
    return [line.split("\t") for out in said for line in out.splitlines() if "\t" in line]


if __name__ == "__main__":
    main()
