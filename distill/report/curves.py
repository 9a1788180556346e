"""The picture of a saving: held-out loss over all the FLOPs that a row has cost."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from statistics import mean

from distill.evaluate.saving import Curve
from distill.report.canvas import COLOURS, LINES, figure
from distill.report.savings import Runner, percent

DASHES = ("-", "-.", (0, (5, 1, 1, 1, 1, 1)), ":")  # told apart without colour; scratch is dashed
DIM = "#8c8c8c"
SHOWN = 0.08  # of the dearest row's FLOPs: what lies left of it does not decide how high the picture is


def race(path: Path, runners: list[Runner]) -> None:
    """Seeds thin and their mean bold; dimmer, what a row was made from; the level that scratch ended on."""
    made_from = [seeds for runner in runners for seeds in runner.before]
    runners = [runner for runner in runners if runner.curves not in made_from]  # drawn, as that, already
    with figure(path, 1, width=6.6, height=4.4) as (panel,):
        _scales(panel, runners)
        styles = zip(cycle(DASHES), cycle(colour for colour in LINES if colour != COLOURS["scratch"]))
        for runner in sorted(runners, key=lambda runner: not runner.scratch):
            dash, colour = ((0, (5, 2)), COLOURS["scratch"]) if runner.scratch else next(styles)
            _before(panel, runner)
            _seeds(panel, runner.curves, colour, dash, runner.name)
        if scratch := next((runner for runner in runners if runner.scratch), None):
            _level(panel, scratch, [runner for runner in runners if runner.shares])
        panel.set_xlabel("training FLOPs so far, with those of the stages before")
        panel.set_ylabel("held-out loss, nats a token")
        panel.legend(frameon=False, fontsize=8, loc="upper right", handlelength=4)


def average(seeds: list[Curve]) -> Curve:
    """Evaluation by evaluation: seeds of one recipe are evaluated at the same steps."""
    together = zip(*(curve.points for curve in seeds), strict=False)
    return Curve.of([(mean(x for x, _ in points), mean(y for _, y in points)) for points in together])


def _seeds(panel, seeds: list[Curve], colour: str, dash, label: str, width: float = 2.2) -> None:
    for curve in seeds if len(seeds) > 1 else []:
        panel.plot(*_drawable(panel, curve), color=colour, lw=0.6, alpha=0.6)
    panel.plot(*_drawable(panel, average(seeds)), color=colour, lw=width, ls=dash, label=label)


def _drawable(panel, curve: Curve) -> list[tuple[float, ...]]:
    """Without the start from nothing, which has no place on a logarithmic axis."""
    points = [(x, y) for x, y in curve.points if x or panel.get_xscale() == "linear"]
    return list(zip(*points, strict=True))


def _before(panel, runner: Runner) -> None:
    """What the row was made from, and thin where one stage hands on to the next."""
    stages = [*runner.before, runner.curves]
    for i, seeds in enumerate(runner.before):
        _seeds(panel, seeds, DIM, "-", "" if i else f"what {runner.name} was made from", width=1.3)
        last, first = average(seeds), average(stages[i + 1])
        panel.plot([last.flops[-1], first.flops[0]], [last.loss[-1], first.loss[0]], color=DIM, lw=0.8, ls=":")


def _scales(panel, runners: list[Runner]) -> None:
    """Logarithmic FLOPs beyond a decade; the first steps from random weights may leave the picture at the top."""
    own = [point for runner in runners for curve in runner.curves for point in curve.points]
    drawn = own + [point for runner in runners for seeds in runner.before for c in seeds for point in c.points]
    dearest = max(x for x, _ in own)
    low, top = min(y for _, y in own), max(y for x, y in own if x >= SHOWN * dearest)
    panel.set_ylim(low - 0.16 * (top - low), top + 0.1 * (top - low))
    if dearest > 10 * min(x for x, _ in drawn if x):
        panel.set_xscale("log")
    left = min(x for x, y in drawn if x and y <= top)
    panel.set_xlim(0.8 * left if panel.get_xscale() == "log" else 0, 1.1 * dearest)


def _level(panel, scratch: Runner, raced: list[Runner]) -> None:
    """The loss that scratch ended with, and along it back to where the others met it."""
    level = mean(curve.loss[-1] for curve in scratch.curves)
    cost = mean(curve.reach(curve.loss[-1]) for curve in scratch.curves)
    panel.axhline(level, color="#555555", lw=0.9, ls=(0, (1, 2)))
    panel.annotate(f"{scratch.name} ended at {level:.3f}", (0.01, level), (0, 3), size=8, color="#555555",
                   xycoords=panel.get_yaxis_transform(), textcoords="offset points")  # fmt: skip
    for i, runner in enumerate(raced):
        met = cost * (1 - mean(runner.shares))
        panel.annotate("", (met, level), (cost, level), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.3})
        panel.text(0.01, 0.02 + 0.045 * i, f"{runner.name}: {percent(runner)}", size=8, transform=panel.transAxes)
