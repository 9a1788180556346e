"""Resume anywhere: from every ZeRO stage, number of ranks and precision to every other, against the run left in peace.

    OMP_NUM_THREADS=1 python benchmarks/resume_matrix.py [--out benchmarks/results/resume.md]

In each of 16 cells (ZeRO 0 to 3, ranks 1 and 2, fp32 and bf16) a small Llama trains for eight steps and leaves a
snapshot after four. New processes then go on from each of the 16 snapshots in each of the 16 cells. What must come
along: a sparse student with its masks, a learned projection into a wider teacher, dropout, schedules of the learning
rate and of a loss weight, the place in the data. A cell of the table says `=` where the weights at the end are those of
the run that was not interrupted, bit for bit, and else the largest difference of a weight, as a share of the largest of
its tensor. Ends with 1 if a cell that goes on with itself is not equal, or two of float32 differ by more than 1e-6.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the tiny models

from distill import world
from distill.context import Context
from distill.inputs import versions
from distill.recipe import Recipe
from growth import console

STEPS, SAVED, NEAR = 8, 4, 1e-6
STAGES, RANKS, PRECISIONS = range(4), (1, 2), ("fp32", "bf16")
RECIPE = {
    "recipe": "resume",
    "engine": {"micro_batch": 4},
    "models": {"teacher": {"from": "teacher"}, "student": {"from": "student"}},
    "corpora": {"text": {"source": "synthetic", "tokenizer": "student", "length": 32, "heldout": 0.1, "limit": 400}},
    "stages": [
        {"id": "sparse", "grow": {"from": "student", "ops": [{"sparsify": {"sparsity": 0.5, "how": "random"}}]}},
        {
            "id": "trained",
            "train": {
                "student": {"from": "sparse"},
                "data": "text",
                "hooks": [{"mask": {}}],
                "targets": {"t": {"from": "teacher"}},
                "loss": [
                    {"relation_kl": {"target": "t", "heads": 6, "relations": ["qq", "kk", "vv"]}},
                    {"hidden": {"target": "t", "project": True}},
                    {"ce": {"objective": "causal", "weight": {"points": [[0, 1.0], [STEPS, 0.2]]}}},
                ],
                "optim": {"batch": 8},
                "lr": {"unit": "fraction", "points": [[0, 0.0], [0.25, 0.003], [1, 0.0003]]},
                "stop": {"steps": STEPS},
                "save_every": SAVED,
                "dropout": True,
            },
        },
    ],
}


@dataclass(frozen=True)
class Cell:
    stage: int
    ranks: int
    precision: str

    def __str__(self) -> str:
        return f"{self.stage}x{self.ranks} {self.precision}"

    def train(self, place: Path, directory: Path) -> None:
        """The stage in `directory`, begun or gone on with under this engine."""
        from distill.train import train

        engine = RECIPE["engine"] | {"zero": self.stage, "precision": self.precision}
        recipe = Recipe.model_validate(RECIPE | {"engine": engine})
        directory.mkdir(exist_ok=True)
        train(recipe.stage("trained").train, Context(recipe, place / "run", 0), directory)


CELLS = [Cell(stage, ranks, precision) for precision in PRECISIONS for stage in STAGES for ranks in RANKS]


# In the ranks


def trained(place: Path) -> None:
    """All cells of this number of ranks, from the start."""
    for cell in here():
        cell.train(place, place / str(cell))
        world.first(lambda cell=cell: done(place, {"trained": str(cell)}))


def resumed(place: Path) -> None:
    """From every snapshot to all cells of this number of ranks."""
    for begun, cell in itertools.product(CELLS, here()):
        directory = place / f"{begun} to {cell}"
        world.first(lambda begun=begun, directory=directory: interrupted(place / str(begun), directory))
        cell.train(place, directory)
        world.first(lambda begun=begun, cell=cell, directory=directory: done(
            place, {"from": str(begun), "to": str(cell), "far": far(directory, place / str(begun))}))  # fmt: skip
        world.first(partial(shutil.rmtree, directory))


def here() -> list[Cell]:
    return [cell for cell in CELLS if cell.ranks == world.size()]


def interrupted(run: Path, directory: Path) -> None:
    """What a run leaves that was killed after its snapshot."""
    shutil.copytree(run, directory, ignore=lambda *_: ["model", "projections.safetensors"])


def done(place: Path, told: dict) -> None:
    with open(place / "told.jsonl", "a") as file:
        print(json.dumps(told), file=file)


def far(run: Path, other: Path) -> float:
    """The largest difference of a weight, as a share of the largest of its tensor."""
    files = "model/model.safetensors", "projections.safetensors"
    found, wanted = ({n: w for file in files for n, w in load_file(d / file).items()} for d in (run, other))
    return max(float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max()) for n in wanted)


# Around them


def prepared(place: Path) -> None:
    """The two models, the sparse student, the text."""
    import tiny

    from distill import stages

    os.chdir(place)
    llama = partial(tiny.model, "llama", "causal", num_hidden_layers=2)
    tiny.save(llama(seed=0, hidden_size=66, head_dim=10), place / "teacher", tiny.tokenizer())
    tiny.save(llama(seed=1, attention_dropout=0.1), place / "student", tiny.tokenizer())
    first = RECIPE | {"stages": RECIPE["stages"][:1]}
    stages.run(Recipe.model_validate(first), place / "run")
    Context(Recipe.model_validate(RECIPE), place / "run", 0).corpus("text")


def group(place: Path, work: str, ranks: int) -> list[subprocess.Popen]:
    """`work` in as many processes."""
    command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "--place", str(place), "--work", work]
    shared = {"WORLD_SIZE": str(ranks), world.STORE: str(place / f"store of {work} {ranks}")}
    return [
        subprocess.Popen(
            command,
            cwd=place,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=open(place / f"{work} {ranks} {rank}.txt", "w"),
        )
        for rank in range(ranks)
    ]


def told(place: Path) -> list[dict]:
    path = place / "told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measured(place: Path) -> dict[tuple[str, str], float]:
    """{(from, to): how far}."""
    with console.bar(len(CELLS) + len(CELLS) ** 2, "trained and resumed") as advance:
        seen = 0
        for work, ranks in itertools.product(("trained", "resumed"), RANKS):
            started = group(place, work, ranks)
            while any(process.poll() is None for process in started):
                time.sleep(0.5)
                now = told(place)
                advance(len(now) - seen, note=" to ".join(now[-1].values()) if work == "trained" and now else "")
                seen = len(now)
            for rank, process in enumerate(started):
                if process.returncode:
                    sys.exit((place / f"{work} {ranks} {rank}.txt").read_text()[-3000:])
    return {(one["from"], one["to"]): one["far"] for one in told(place) if "to" in one}


def table(found: dict, begun: str, ended: str) -> list[str]:
    """From cells of one precision to those of another."""
    rows, columns = ([cell for cell in CELLS if cell.precision == p] for p in (begun, ended))
    heads = [str(cell).split()[0] for cell in columns]
    yield f"### {begun} to {ended}\n"
    yield f"| from \\ to | {' | '.join(heads)} |"
    yield "|---|" + "---:|" * len(heads)
    for row in rows:
        cells = (found[str(row), str(column)] for column in columns)
        yield f"| {str(row).split()[0]} | {' | '.join(f'{x:.1e}' if x else '=' for x in cells)} |"
    yield ""


def summary(found: dict) -> list[str]:
    itself = [x for (a, b), x in found.items() if a == b]
    yield f"- the same cell: {itself.count(0.0)} of {len(itself)} equal bit for bit"
    for begun, ended in itertools.product(PRECISIONS, PRECISIONS):
        others = [x for (a, b), x in found.items() if a != b and a.endswith(begun) and b.endswith(ended)]
        yield (
            f"- {begun} to another cell of {ended}: {others.count(0.0)} of {len(others)} equal bit for bit, the "
            f"others within {max(others):.1e}"
        )


def report(found: dict) -> str:
    lines = [
        "# Resume anywhere",
        "",
        f"{STEPS - SAVED} steps after a snapshot, in another cell (ZeRO stage x ranks), against the run that was not",
        "interrupted: `=` equal bit for bit, else the largest difference of a weight as a share of the largest of its",
        "tensor. Between precisions it is the difference between training in one and in the other.",
        "",
        *summary(found),
        "",
        *(line for pair in itertools.product(PRECISIONS, PRECISIONS) for line in table(found, *pair)),
        f"Two CPU cores; {', '.join(f'{name} {version}' for name, version in versions().items())}.",
        "`OMP_NUM_THREADS=1 python benchmarks/resume_matrix.py --out benchmarks/results/resume.md`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", choices=("trained", "resumed"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.work:
        {"trained": trained, "resumed": resumed}[arguments.work](arguments.place)
        world.leave_at_once(SystemExit(0))
    out = arguments.out and arguments.out.absolute()
    with tempfile.TemporaryDirectory() as place:
        prepared(Path(place))
        found = measured(Path(place))
    text = report(found)
    print(text)
    if out:
        out.write_text(text)
    fp32 = [x for (a, b), x in found.items() if "bf16" not in a + b]
    sys.exit(any(found[str(cell), str(cell)] for cell in CELLS) or max(fp32) > NEAR)


if __name__ == "__main__":
    main()
