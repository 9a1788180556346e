"""What a rank holds while a student comes to be and is exported under ZeRO 3: whole, and in shares.

    OMP_NUM_THREADS=1 python benchmarks/zero_start.py [--hidden 512] [--layers 8] [--vocab 4000] [--ranks 2]

A causal student, mapped from its file, on its way to the first step of training: what no loss reaches is found, then
the engine is made. Memory is anonymous, which stands for that of a device; the file's pages are the system's. `whole`
is how it was until then: all of it copied to the device, for DeepSpeed to cut, and all masters gathered before a file
is written. In the number of largest tensors; exporting is above what was kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from snapshots import OPTIM, Rise, resident, said_by_ranks
from start_memory import config

from distill import engine, loading, models, world
from distill.drawn import Drawn, planned
from distill.lesson import Data, Lesson, freeze_unreachable
from distill.objectives import OBJECTIVES
from distill.teachers.targets import Targets
from growth.console import table


class Rows:
    """One short document a row."""

    def at(self, positions, mask=None) -> dict:
        ids = torch.tensor([[5 + (7 * p + t) % 90 for t in range(16)] for p in positions])
        return {"input_ids": ids, "segment_ids": torch.ones_like(ids), "labels": ids}


def write(given, dst: Path) -> None:
    drawn = Drawn(planned(loading.configuration(config(given)), "causal"), 0)
    models.save(drawn.model, dst, carry=None, tensors=drawn.pieces())


def lesson_of(path: Path, whole: bool) -> Lesson:
    lesson = Lesson(models.load(path, "causal"), {"ce": OBJECTIVES["ce"](objective="causal")})
    for p in lesson.parameters() if whole else ():
        p.data = p.data.clone()  # what `to` does on a device
    return lesson


def start(path: Path, precision: str, whole: bool) -> tuple[engine.Engine, int, int]:
    """As a training stage does; and the most memory held before the engine was made, and meanwhile."""
    with Rise() as first:
        lesson = lesson_of(path, whole)
        data = Data(Rows(), OPTIM["batch"], 1, True, torch.device("cpu"))
        with engine.placed(lesson, 0 if whole else 3) as run:
            freeze_unreachable(lesson, Targets({}, lesson.objectives), data, run=run)
    if whole:
        engine._cut = lambda *_: None  # DeepSpeed does, once it has all of it
    with Rise() as second:
        spec = SimpleNamespace(zero=3, precision=precision, deepspeed={})
        made = engine.Engine(lesson, spec, SimpleNamespace(**OPTIM), 1)
    return made, first.most, second.most


def export(made: engine.Engine, path: Path, whole: bool) -> int:
    """The most memory held meanwhile, above what was held before."""

    def write(masters: dict) -> None:
        models.export(path, {name.removeprefix("student."): make for name, make in masters.items()}, path / "model")

    with Rise() as rise:
        if whole:
            found = {name: tensor for name, tensor in made.state("master") if world.rank() == 0}
            world.first(lambda: write({name: lambda x=tensor: x for name, tensor in found.items()}))
        else:
            made.lend(write)
    return rise.bytes


def rank(given) -> None:
    torch.set_num_threads(1)
    small, student, whole = given.place / "small", given.place / "student", given.way == "whole"
    first, *_ = start(small, given.precision, False)  # what is imported late is not the model's
    export(first, small, False)
    first.close()
    before = resident()
    made, *most = start(student, given.precision, whole)
    sizes = [p.ds_numel for p in made.engine.module.parameters()]
    numbers = [4 * sum(sizes), *(n - before for n in (*most, resident())), export(made, student, whole)]
    row = [given.way, str(world.rank()), *(f"{n / (4 * max(sizes)):.1f}" for n in numbers)]
    print("\t".join(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("hidden", 512), ("layers", 8), ("vocab", 4000), ("ranks", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=engine.DTYPES, default="fp32")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.place:
        rank(given)
        world.leave_at_once(SystemExit(0))
    with TemporaryDirectory() as place:
        write(given, Path(place) / "student")
        write(SimpleNamespace(hidden=256, layers=1, vocab=99), Path(place) / "small")
        rows = [
            row for way in ("whole", "in shares") for row in said_by_ranks(Path(place), "--way", way, ranks=given.ranks)
        ]
    heads = ["student", "rank", "weights, float32", "most before the engine", "while it is made", "kept", "exporting"]
    table(heads, rows, title=f"{given.precision}, in largest tensors")


if __name__ == "__main__":
    main()
