"""What a run saved, in words: every row with a held-out curve against the scratch row, seed by seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from distill import recipe as recipes
from distill.context import Context
from distill.evaluate.saving import CONFIDENCE, Curve, Outcome, curve, interval, speed_up
from distill.recipe import Recipe


@dataclass(frozen=True)
class Runner:
    """A row with its curves, one a seed."""

    name: str
    curves: list[Curve]
    before: list[list[Curve]]  # of the stages that it was made from, the first one first
    outcomes: list[Outcome]  # of its seeds; none without a scratch that learned, or for scratch itself
    scratch: bool

    @property
    def shares(self) -> list[float] | None:
        """None where a seed did not reach the loss: a mean over the others would flatter."""
        shares = [outcome.share for outcome in self.outcomes]
        return None if None in shares or not shares else shares


def gather(run: Path, rows: list[dict]) -> list[Runner]:
    """The rows that are train stages and were evaluated on the way."""
    recipe = recipes.load(run / "recipe.yaml")
    curves = {row["reference"]: found for row in rows if (found := _curves(run, recipe, row["reference"]))}
    scratch = next((row["reference"] for row in rows if row["role"] == "scratch" and row["reference"] in curves), None)
    return [
        runner(row["name"], curves[row["reference"]], curves.get(scratch, []), _before(run, recipe, row["reference"]))
        for row in rows
        if row["reference"] in curves
    ]


def runner(name: str, curves: list[Curve], scratch: list[Curve], before: list[list[Curve]]) -> Runner:
    outcomes = [mine.outcome(its) for mine, its in zip(curves, scratch, strict=False)]
    compared = curves is not scratch and outcomes and None not in outcomes
    return Runner(name, curves, before, outcomes if compared else [], curves is scratch)


def _curves(run: Path, recipe: Recipe, reference: str) -> list[Curve]:
    """One a seed; none where a seed has none."""
    if reference not in [stage.id for stage in recipe.stages if stage.train]:
        return []
    seeds = [Context(recipe, run, recipe.seed + n).directory(reference) for n in range(recipe.seeds)]
    found = [curve(directory) for directory in seeds]
    return [] if None in found else found


def _before(run: Path, recipe: Recipe, reference: str) -> list[list[Curve]]:
    earlier = [stage.id for stage in recipe.made_from(reference) if stage.id != reference]
    return [found for stage in reversed(earlier) if (found := _curves(run, recipe, stage))]


# Words


def sentences(runners: list[Runner]) -> list[str]:
    """One for each that raced against scratch."""
    scratch = next((runner.name for runner in runners if runner.scratch), "")
    return [sentence(runner, scratch) for runner in runners if runner.outcomes]


def sentence(runner: Runner, scratch: str) -> str:
    """`grown reaches the loss of scratch with 31% fewer FLOPs (95% interval 24% to 38%, 3 seeds), ...`"""
    if runner.shares is None:
        return "".join(_not_reached(runner, scratch))
    share = mean(runner.shares)
    faster = f", a speed-up of {speed_up(share):.0%}" if share > 0 else ""
    return f"{runner.name} reaches the loss of {scratch} with {percent(runner)}{faster}."


def percent(runner: Runner) -> str:
    """`31% fewer FLOPs (95% interval 24% to 38%, 3 seeds)`."""
    share = mean(runner.shares)
    sign, word = (1, "fewer") if share >= 0 else (-1, "more")
    return f"{sign * share:.0%} {word} FLOPs ({_interval(runner.shares, sign)})"


def _interval(shares: list[float], sign: int) -> str:
    if (found := interval(shares)) is None:
        return "one seed, so no interval"
    low, high = sorted(sign * end for end in found)
    doubt = ", within the noise" if low <= 0 <= high else ""
    return f"{CONFIDENCE:.0%} interval {low:.0%} to {high:.0%}, {len(shares)} seeds{doubt}"


def _not_reached(runner: Runner, scratch: str) -> Iterator[str]:
    gaps = [outcome.gap for outcome in runner.outcomes if outcome.share is None]
    n = len(runner.outcomes)
    some = f" in {len(gaps)} of {n} seeds" if n > 1 else ""
    yield f"{runner.name} does not reach the loss of {scratch}{some}: {mean(gaps):.3f} nats a token remain"
    if reached := [f"{outcome.share:.0%}" for outcome in runner.outcomes if outcome.share is not None]:
        yield f"; the FLOPs saved in the others are {', '.join(reached)}"
    yield "."


def bounds(runner: Runner | None, digits: int) -> str:
    """What stands behind the mean in the table."""
    found = interval(runner.shares) if runner and runner.shares else None
    return "" if found is None else f" ({found[0]:.{digits}f} to {found[1]:.{digits}f})"
