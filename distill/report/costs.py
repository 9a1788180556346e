"""What the rows of a report cost to make. FLOPs are counted and seconds measured; neither is ever told as the other.

Of a row count all train stages that it was made from. Where masks are kept, modelled FLOPs are those that would remain
if dead weights cost nothing, executed ones those that matrix products did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from distill import recipe as recipes
from distill import sources
from distill.context import MANIFEST, Context
from distill.recipe import Recipe
from growth import console
from growth.bits import FILE, read_masks
from growth.files import read_json
from growth.gradual import average

DENSE = "none"  # of what is executed sparse


@dataclass(frozen=True)
class Cost:
    """Of one seed, or the mean of several."""

    flops_modelled: float
    flops_executed: float
    executed_sparse: str  # none, 2:4 or csr
    teacher_flops: float
    seconds: float
    memory: float | None  # peak, of the largest stage; None where it was not kept
    density_mean: float  # share of the weights of masked matrices that are alive, over all tokens of training
    density: float  # the same of the model that came out

    @property
    def dense(self) -> bool:
        return self.density_mean == self.density == 1


def gather(run: Path, rows: Sequence[dict]) -> dict[str, Cost]:
    """Reference -> what it cost, of all rows that finished train stages have made."""
    recipe = recipes.load(run / "recipe.yaml")
    contexts = [Context(recipe, run, recipe.seed + n) for n in range(recipe.seeds)]
    made = [stage.id for stage in recipe.stages if stage.train or stage.grow]
    references = dict.fromkeys(row["reference"] for row in rows if row["reference"].partition(".")[0] in made)
    found = {reference: [_of_seed(recipe, context, reference) for context in contexts] for reference in references}
    return {reference: _mean(seeds) for reference, seeds in found.items() if None not in seeds}


def _of_seed(recipe: Recipe, context: Context, reference: str) -> Cost | None:
    stages = [_metrics(context.directory(stage.id)) for stage in recipe.made_from(reference)]
    if not stages or any("flops" not in metrics for metrics in stages):
        return None
    memory = [metrics.get("memory") for metrics in stages]
    return Cost(
        flops_modelled=sum(_modelled(metrics) for metrics in stages),
        flops_executed=sum(metrics["flops"] for metrics in stages),
        executed_sparse=next(filter(None, (_sparse(metrics) for metrics in stages)), DENSE),
        teacher_flops=sum(metrics["teacher_flops"] for metrics in stages),
        seconds=sum(metrics["seconds"] for metrics in stages),
        memory=None if None in memory else max(memory),
        density_mean=average((metrics["tokens"], _density(metrics)) for metrics in stages),
        density=_final(context, reference),
    )


def _metrics(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    return (read_json(path).get("metrics") or {}) if path.is_file() else {}


def _modelled(metrics: dict) -> float:
    return metrics.get("sparsity", {}).get("flops_modelled", metrics["flops"])


def _sparse(metrics: dict) -> str | None:
    return metrics.get("sparsity", {}).get("executed_sparse") or None


def _density(metrics: dict) -> float:
    """Over a stage; of matrices that are factors, the numbers that they are held as."""
    if lowrank := metrics.get("lowrank"):
        return lowrank["held"] / lowrank["whole"]
    return metrics.get("sparsity", {}).get("density_mean", 1.0)


def _final(context: Context, reference: str) -> float:
    stage, _, start = reference.partition(".")
    file = sources.encoder(context.directory(stage) / (start or "model")) / FILE
    if file.is_file():
        masks = read_masks(file).values()
        return sum(mask.kept for mask in masks) / sum(mask.size for mask in masks)
    metrics = _metrics(context.directory(stage))
    return _density(metrics) if "lowrank" in metrics and not start else 1.0


def _mean(seeds: Sequence[Cost]) -> Cost:
    """Of what is executed sparse, and of memory that one of them has not kept, there is no mean."""
    of = {key: [asdict(seed)[key] for seed in seeds] for key in asdict(seeds[0])}
    told = {key: None if None in values else mean(values) for key, values in of.items() if key != "executed_sparse"}
    return Cost(executed_sparse=of["executed_sparse"][0], **told)


# In words


def table(report: dict) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, a line for each checkpoint; of sparsity and teachers only where there were any."""
    lines = list(_lines(report))
    sparse = any(not cost.dense for _, cost, _ in lines)
    taught = any(cost.teacher_flops for _, cost, _ in lines)
    cells = [_cells(*line, sparse, taught) for line in lines]
    return list(cells[0]), [list(line.values()) for line in cells]


def _cells(name: str, cost: Cost, dense: Cost | None, sparse: bool, taught: bool) -> dict[str, str]:
    run = f" ({cost.executed_sparse})" if cost.executed_sparse != DENSE else ""
    share = of_dense(cost, dense)
    return {
        "": name,
        "FLOPs modelled" if sparse else "FLOPs": flops(cost.flops_modelled),
        **({"of dense": "-" if share is None else f"{share:.2f}", "executed": f"{flops(cost.flops_executed)}{run}",
            "density": f"{cost.density_mean:.2f}", "final": f"{cost.density:.2f}"} if sparse else {}),
        **({"teachers": flops(cost.teacher_flops)} if taught else {}),
        "time": console.seconds(cost.seconds),
        "memory": "-" if cost.memory is None else console.size(cost.memory),
    }  # fmt: skip


def _lines(report: dict) -> Iterator[tuple[str, Cost, Cost | None]]:
    """(name, cost, that of the dense one beside it) of every checkpoint that was trained; one is named as at first."""
    first: dict[str, dict] = {}
    for row in report["rows"]:
        if row["reference"] in report["costs"]:
            first.setdefault(row["reference"], row)
    short = [row["name"].removeprefix(f"{row['stage']}/") for row in first.values()]
    for name, row in zip(short, first.values(), strict=True):
        told = name if short.count(name) == 1 else row["name"]
        yield told, report["costs"][row["reference"]], _dense(report, row)


def _dense(report: dict, row: dict) -> Cost | None:
    """The dearest of the dense ones that were measured with it."""
    beside = (report["costs"].get(other["reference"]) for other in report["rows"] if other["stage"] == row["stage"])
    return max((cost for cost in beside if cost and cost.dense), key=lambda cost: cost.flops_executed, default=None)


def of_dense(cost: Cost, dense: Cost | None) -> float | None:
    """The share of modelled FLOPs: alike where a sparse one and a small dense one are said to cost the same."""
    return dense and cost.flops_modelled / dense.flops_modelled


def flops(n: float) -> str:
    """902000000000 -> `9.02e11`."""
    return f"{n:.2e}".replace("e+", "e") if n else "-"


def legend(report: dict) -> list[str]:
    """What the columns mean."""
    said = ["FLOPs: counted by formula, of all stages that a row was made from; they tell no seconds"]
    if not all(cost.dense for cost in report["costs"].values()):
        said += [
            "modelled: those that would remain if dead weights cost nothing; executed: those that ran, dense unless "
            "(2:4) or (csr) is said",
            "of dense: modelled FLOPs over those of the dense row that was measured with it",
            "density: live weights of masked matrices, or the numbers that low-rank ones are held as, on average over "
            "training; final: at its end",
        ]
    return [*said, "memory: peak of the process"]


def public(report: dict, row: dict) -> dict[str, Any]:
    """Of a row in report.json; nothing where no train stage made it."""
    cost = report["costs"].get(row["reference"])
    return {"cost": asdict(cost) | {"of_dense": of_dense(cost, _dense(report, row))}} if cost else {}
