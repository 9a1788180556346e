"""The pictures of a report: what the rows are worth, what their training saved, and how it went."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from distill.report.canvas import COLOURS, LINES, figure
from distill.report.curves import DASHES, race

SMOOTH = 20  # steps of the running median behind which single steps are faint
LOOKS = [(colour, dash) for dash in DASHES for colour in LINES]  # of the terms of a loss, of which there may be many
APART = 10  # times: terms so far from each other are drawn on a logarithmic axis, or the small ones would lie at zero


def draw(run: Path, report: dict, logs: dict[str, list[list[dict]]]) -> dict[str, str]:
    """Write the pictures into the run directory; caption -> file name."""
    pictures = {}
    if metrics := compared(report):
        quality(run / "quality.png", report["rows"], metrics)
        pictures["Quality of the rows: means, standard errors, and seeds as dots"] = "quality.png"
    if report["runners"]:
        race(run / "saving.png", report["runners"])
        pictures["Held-out loss over training FLOPs: seeds thin, their mean bold"] = "saving.png"
    for stage, seeds in logs.items():
        if any(seeds):
            training(run / f"training-{stage}.png", stage, [log for log in seeds if log])
            pictures[f"Training of {stage}: single steps faint, running median of {SMOOTH}"] = f"training-{stage}.png"
    return pictures


def compared(report: dict) -> dict[str, dict]:
    """The metrics of quality in which there is something to compare."""
    found = [name for row in report["rows"] for name in row["metrics"]]
    return {name: facts for name, facts in report["metrics"].items() if facts["quality"] and found.count(name) > 1}


def quality(path: Path, rows: list[dict], metrics: dict[str, dict]) -> None:
    """One panel a metric, one bar a row."""
    rows = rows[::-1]  # the first one on top
    with figure(path, len(metrics), width=3.6, height=0.5 * len(rows) + 0.9, names=True) as panels:
        for panel, (name, facts) in zip(panels, metrics.items(), strict=True):
            for place, row in enumerate(rows):
                _bar(panel, place, row, name, facts["digits"])
            arrow = {"high": " (higher is better)", "low": " (lower is better)", "none": ""}[facts["better"]]
            panel.set_xlabel(facts["title"] + arrow)
            panel.set_yticks(range(len(rows)), [row["name"] for row in rows])
            panel.tick_params(axis="y", length=0)
            panel.margins(x=0.2)
            panel.set_xlim(left=min(0, *panel.get_xlim()))


def _bar(panel, place: int, row: dict, metric: str, digits: int) -> None:
    found = row["metrics"].get(metric)
    if found is None:
        panel.text(0.02, place, "none", va="center", size=8, color="#999999", transform=panel.get_yaxis_transform())
        return
    whisker = {"elinewidth": 1.2, "capsize": 3, "ecolor": "#333333"}
    panel.barh(place, found["mean"], height=0.62, color=COLOURS[row["role"]], xerr=found["error"], error_kw=whisker)
    several = found["seeds"] if len(found["seeds"]) > 1 else []
    panel.plot(several, [place - 0.17] * len(several), "o", ms=4, mfc="white", mec="#222222", mew=0.8)
    end = max([found["mean"] + (found["error"] or 0), *found["seeds"]])
    panel.annotate(f"{found['mean']:.{digits}f}", (end, place), (5, 0), textcoords="offset points", va="center", size=8)


def training(path: Path, stage: str, logs: list[list[dict]]) -> None:
    """Loss terms, learning rate, gradient norm and throughput against steps; one line a seed."""
    seeds = [[entry for entry in log if "terms" in entry] for log in logs]  # without the evaluation before the first
    terms = list(seeds[0][0]["terms"])
    with figure(path, 4, width=3.6, height=2.9, columns=2) as (loss, rate, norm, speed):
        for (colour, dash), term in zip(LOOKS * len(terms), terms, strict=False):
            for log in seeds:
                _line(loss, log, lambda entry, term=term: entry["terms"].get(term), colour, term, dash, smooth=True)
        if _far_apart(seeds[0]):
            _logarithmic(loss)
        for log in logs:
            _line(loss, log, lambda entry: entry.get("heldout"), "#222222", "held-out")
        for log in seeds:
            _line(rate, log, lambda entry: entry["lr"], LINES[0], "")
            _line(norm, log, lambda entry: entry["grad_norm"], LINES[0], "", smooth=True)
            _line(speed, log, lambda entry: entry["tokens_per_second"], LINES[0], "all", smooth=True)
        labels = ("loss, mean of a step", "learning rate", "gradient norm", "tokens/s")
        for panel, label in zip((loss, rate, norm, speed), labels, strict=True):
            panel.set_xlabel("step")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.set_ylabel(label)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
        rate.yaxis.get_offset_text().set_size(8)
        speed.set_ylim(bottom=0)
        norm.set_ylim(bottom=0)
        _legend(loss)
        share = median(entry["teacher_share"] for log in seeds for entry in log)
        speed.set_title(f"{share:.0%} of the time in the teacher" if share else "", fontsize=8, color="#555555")
        speed.yaxis.set_major_formatter("{x:,.0f}")
        loss.set_title(stage if len(seeds) == 1 else f"{stage}, {len(seeds)} seeds", fontsize=8, color="#555555")


def _far_apart(log: list[dict]) -> bool:
    usual = [median(entry["terms"].get(term, first) for entry in log) for term, first in log[0]["terms"].items()]
    return min(usual) > 0 and max(usual) > APART * min(usual)


def _logarithmic(panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _line(panel, log: list[dict], value, colour: str, label: str, dash="-", smooth: bool = False) -> None:
    """The values over steps; with `smooth`, faint, and their running median in front."""
    points = [(entry["step"], v) for entry in log if (v := value(entry)) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    smooth = smooth and len(values) >= 2 * SMOOTH
    panel.plot(steps, values, color=colour, lw=0.8 if smooth else 1.4, ls="-" if smooth else dash,
               alpha=0.3 if smooth else 1.0, label=None if smooth else label)  # fmt: skip
    if smooth:
        panel.plot(steps, _running_median(values), color=colour, lw=1.4, ls=dash, label=label)


def _running_median(values: tuple[float, ...]) -> list[float]:
    """Over windows that shrink towards the start, where losses fall fastest."""
    reach = [min(SMOOTH // 2, i) for i in range(len(values))]
    return [median(values[i - r : i + r + 1]) for i, r in enumerate(reach)]


def _legend(panel) -> None:
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))  # one entry for all seeds
    panel.legend(handles.values(), handles.keys(), framealpha=0.8, edgecolor="none", fontsize=8)  # lines shine through
