"""What growth saves against training from scratch, when both arms get the same search for their learning rate.

    python benchmarks/growth_savings.py RECIPE [KEY.SUB=VALUE ...] [--rates 0.5 1 2] [--seeds 3] [--jobs 2]
                                        [--runs runs/savings] [--out benchmarks/results]

A rate is a factor on the recipe's own learning rates of the big model: of every stage after the growth in one arm, of
the scratch stage in the other. What is trained before the growth keeps its rate, so it is trained once a seed and
copied. Every rate and seed is a run directory of its own (one process, one thread); a finished one is not done again.
Each arm is judged at its best rate, by the final held-out loss, mean over seeds. Writes RECIPE.json and RECIPE.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from distill import recipe as recipes
from distill import strict_yaml
from distill.evaluate import machine, role
from distill.kinds import Stage
from distill.recipe import Recipe
from distill.report import savings
from distill.report.curves import race
from distill.report.savings import Runner
from growth.console import say, seconds, table
from growth.errors import UsageError
from growth.files import read_json

Arm = dict[float, Runner]  # rate -> the curves of all seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/savings"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_intermixed_args()
    began = time.perf_counter()
    sweep = Sweep(asked.recipe, asked.overrides, recipes.load(asked.recipe, asked.overrides), asked.runs)
    plans = [(rate, sweep.recipe.seed + n) for rate in asked.rates for n in range(asked.seeds)]
    with ThreadPoolExecutor(asked.jobs) as pool:
        list(pool.map(lambda plan: sweep.run(*plan), plans))
    grown, scratch = sweep.arms(plans)
    found = summary(sweep.recipe.recipe, grown, scratch)
    found |= machine.facts() | {"wall_seconds": round(time.perf_counter() - began)}
    show(found)
    write(asked.out, found, grown, scratch)


def write(out: Path, found: dict, grown: Arm, scratch: Arm) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{found['recipe']}.json").write_text(json.dumps(found | {"curves": points(grown, scratch)}) + "\n")
    race(out / f"{found['recipe']}.png", [against(grown[best(grown)], scratch[best(scratch)]), scratch[best(scratch)]])


# The runs


def arms(recipe: Recipe) -> tuple[str, str]:
    """(the last grown stage, the scratch stage) among the rows of the evaluation that has `saving` as a metric."""
    rows = next((s.evaluate.rows for s in recipe.stages if s.evaluate and "saving" in s.evaluate.on), {})
    scratch = [reference for label, reference in rows.items() if role(label, reference, None) == "scratch"]
    trained = [stage.id for stage in recipe.stages if stage.train and stage.id in rows.values()]
    grown = [stage for stage in trained if any(map(grows, lineage(recipe, stage)))]
    if not scratch or not grown:
        raise UsageError(f"{recipe.recipe}: no evaluation with `saving` that has a grown stage and scratch as rows")
    return grown[-1], scratch[0]


def lineage(recipe: Recipe, reference: str | None) -> Iterator[Stage]:
    """The stages that a model was made from, itself first, back to the growth that made it big."""
    while reference and reference not in recipe.models:
        stage = recipe.stage(reference)
        yield stage
        reference = None if grows(stage) else stage.origin


def grows(stage: Stage) -> bool:
    return bool(stage.grow or stage.train.student.grow)


def big(recipe: Recipe, reference: str) -> list[str]:
    return [stage.id for stage in lineage(recipe, reference) if stage.train]


@dataclass(frozen=True)
class Sweep:
    """A recipe, run for rates and seeds."""

    name: str  # as the command line has it
    overrides: list[str]
    recipe: Recipe  # what both come to
    runs: Path

    def out(self, rate: float, seed: int) -> Path:
        return self.runs / self.recipe.recipe / f"rate-{rate:g}-seed-{seed}"

    def run(self, rate: float, seed: int) -> None:
        """By the command: it finds what is finished, and goes on with what was interrupted."""
        out, began = self.out(rate, seed), time.perf_counter()
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            borrow(out, out.parent.glob(f"rate-*-seed-{seed}"), self.before())
        command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", self.name, *self.overrides]
        command += [*self.changes(rate, seed), "--out", str(out)]
        log = Path(f"{out}.log")
        with open(log, "w") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
        if code:
            raise SystemExit(f"{out} failed with {code}; {log} ends in: {log.read_text()[-400:].strip()}")
        say(f"{out}: done in {seconds(time.perf_counter() - began)}")

    def before(self) -> list[str]:
        """The stages that do not depend on the rate."""
        grown, _ = arms(self.recipe)
        stages = [stage.id for stage in self.recipe.made_from(grown)]
        return [stage for stage in stages if stage not in big(self.recipe, grown)]

    def changes(self, rate: float, seed: int) -> Iterator[str]:
        """What the command line changes in the recipe."""
        grown, scratch = arms(self.recipe)
        yield from (f"seed={seed}", "seeds=1")
        for stage in [*big(self.recipe, grown), *big(self.recipe, scratch)]:
            lr = self.recipe.stage(stage).train.lr
            scaled = lr.model_copy(update={"points": tuple((x, y * rate) for x, y in lr.points)})
            yield f"stages.{stage}.train.lr={strict_yaml.dump(scaled.model_dump(mode='json'))}"

    def arms(self, plans: list[tuple[float, int]]) -> tuple[Arm, Arm]:
        """The curves of both arms, read from the logs."""
        rows = [{"name": role, "role": role, "reference": stage}
                for role, stage in zip(("grown", "scratch"), arms(self.recipe), strict=True)]  # fmt: skip
        found: dict[tuple[str, float], list[Runner]] = {}
        for rate, seed in plans:
            for runner in savings.gather(self.out(rate, seed), rows):
                found.setdefault((runner.name, rate), []).append(runner)
        grown, scratch = ({rate: together(r) for (name, rate), r in found.items() if name == arm}
                          for arm in ("grown", "scratch"))  # fmt: skip
        return grown, scratch


def borrow(out: Path, others: Iterator[Path], stages: list[str]) -> None:
    """What another run of the same seed has finished already; `distill run` checks that it would make the same."""
    for other in others:
        if (other / "recipe.yaml").is_file() and all(finished(other / stage) for stage in stages):
            part = out.with_name(f".{out.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            for name in ("corpora", *stages):
                shutil.copytree(other / name, part / name, ignore=shutil.ignore_patterns("snapshots"))
            shutil.copy(other / "recipe.yaml", part)  # without one it is no run directory; it is written anew
            part.rename(out)
            return


def finished(stage: Path) -> bool:
    return (stage / "stage.json").is_file() and read_json(stage / "stage.json")["state"] == "done"


def together(seeds: list[Runner]) -> Runner:
    """One seed a run, joined to a row of several."""
    before = [[curve for seed in stage for curve in seed] for stage in zip(*(r.before for r in seeds), strict=True)]
    return replace(seeds[0], curves=[runner.curves[0] for runner in seeds], before=before, outcomes=[])


# What they come to


def final(runner: Runner) -> list[float]:
    return [curve.loss[-1] for curve in runner.curves]


def spent(runner: Runner) -> list[float]:
    return [curve.flops[-1] for curve in runner.curves]


def best(arm: Arm) -> float:
    return min(arm, key=lambda rate: mean(final(arm[rate])))


def against(grown: Runner, scratch: Runner) -> Runner:
    """The grown arm with its outcomes against these seeds of scratch."""
    return savings.runner(grown.name, grown.curves, scratch.curves, grown.before)


def summary(recipe: str, grown: Arm, scratch: Arm) -> dict:
    """Every figure that is printed."""
    chosen = against(grown[best(grown)], scratch[best(scratch)])
    return {
        "recipe": recipe,
        "seeds": len(chosen.curves),
        "arms": {name: {f"{rate:g}": {"heldout": final(arm[rate]), "flops": spent(arm[rate])} for rate in arm}
                 for name, arm in (("grown", grown), ("scratch", scratch))},
        "best": {"grown": best(grown), "scratch": best(scratch), **said(chosen)},
        "same_rate": {f"{rate:g}": said(against(grown[rate], scratch[rate])) for rate in grown},
    }  # fmt: skip


def said(runner: Runner) -> dict:
    """Shares seed by seed (null: not reached), what remained, and the sentence."""
    shares, gaps = ([outcome[i] for outcome in runner.outcomes] for i in (0, 1))
    return {"saved": shares, "gaps": gaps, "sentence": savings.sentence(runner, "scratch") if shares else ""}


def points(grown: Arm, scratch: Arm) -> dict:
    """arm -> rate -> seed -> [[FLOPs, held-out loss], ...]; `before` is what the grown arm was made from."""

    def rounded(curves) -> list:
        return [[[round(x), round(y, 5)] for x, y in curve.points] for curve in curves]

    arms = {name: {f"{rate:g}": rounded(arm[rate].curves) for rate in arm}
            for name, arm in (("grown", grown), ("scratch", scratch))}  # fmt: skip
    return {**arms, "before": [rounded(seeds) for seeds in grown[best(grown)].before]}


def show(found: dict) -> None:
    rows = [(arm, rate, spread(values["heldout"]), f"{mean(values['flops']):.3g}",
             "*" * (float(rate) == found["best"][arm]))
            for arm, rates in found["arms"].items() for rate, values in rates.items()]  # fmt: skip
    n = found["seeds"]
    table(("arm", "rate x", "final held-out loss", "FLOPs", "best"), rows,
          f"{found['recipe']}: {n} seed{'s'[: n != 1]}, mean ± standard deviation")  # fmt: skip
    for rate, told in found["same_rate"].items():
        print(f"both at rate x {rate}: {told['sentence']}")
    print(f"best against best: {found['best']['sentence']}")


def spread(values: list[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
