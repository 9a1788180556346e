"""The figures in words: table, meaning, report.md. The same numbers everywhere."""

from __future__ import annotations

from collections.abc import Iterator

from distill.evaluate import BELOW
from distill.ranking.significance import LEVEL, ROUNDS
from distill.report import costs, savings
from growth import console

KEPT = ("probe", "sts", "ndcg")  # metrics of which a student keeps a share of its teacher's
SPEEDS = ("speed", "pair_speed")
DOUBT = 0.05  # a larger p is not called significant

# The table


def table(report: dict, mark: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; the best value below the teacher stands in `mark`s."""
    metrics = report["metrics"]
    columns = ["", "parameters", *(heading(facts) for facts in metrics.values())]
    rows = [[row["name"], console.count(row["params"]) if row["params"] else "-"] for row in report["rows"]]
    for cells, row in zip(rows, report["rows"], strict=True):
        for name in metrics:
            text = value_text(report, row, name)
            wins = row["role"] != "teacher" and text == best_text(report, name, row["on"])
            cells.append((f"{mark}{text}{mark}" if wins else text) + error_text(report, row, name))
    return columns, rows


def heading(facts: dict) -> str:
    return facts["title"] + {"high": " ↑", "low": " ↓", "none": ""}[facts["better"]]


def value_text(report: dict, row: dict, metric: str) -> str:
    """A figure as it is printed everywhere."""
    if metric not in row["metrics"]:
        return "not reached" if metric == "saving" and _raced(report, row) else "-"
    return f"{row['metrics'][metric]['mean']:,.{report['metrics'][metric]['digits']}f}"


def error_text(report: dict, row: dict, metric: str) -> str:
    """The noise of the test items; of a saving, which has none, that of the seeds."""
    if metric == "saving":
        return savings.bounds(_raced(report, row), report["metrics"][metric]["digits"])
    error = row["metrics"].get(metric, {}).get("error")
    return "" if error is None else f" ± {error:.{report['metrics'][metric]['digits']}f}"


def _raced(report: dict, row: dict) -> savings.Runner | None:
    return next((runner for runner in report["runners"] if runner.name == row["name"] and runner.outcomes), None)


def best_text(report: dict, metric: str, on: list) -> str | None:
    """The best figure of the rows below the teacher on the same data; None where there is nothing to choose from."""
    rows = [row for row in _alike(report, on) if row["role"] != "teacher" and metric in row["metrics"]]
    better = report["metrics"][metric]["better"]
    if better == "none" or len({value_text(report, row, metric) for row in rows}) < 2:
        return None
    choose = max if better == "high" else min
    return value_text(report, choose(rows, key=lambda row: row["metrics"][metric]["mean"]), metric)


def _alike(report: dict, on: list) -> list[dict]:
    """Rows that were measured on the same data."""
    return [row for row in report["rows"] if row["on"] == on]


def show(report: dict) -> None:
    """The table and its meaning on the terminal."""
    columns, rows = table(report, mark="*")
    title = f"{report['recipe']}: {_seeds(report)}, equal {report['equal']}"
    console.table(columns, rows, title=title)
    console.say("\n".join([f"* {_marked(report)}; ± standard error of one value", *sentences(report)]))
    if report["costs"]:
        console.table(*costs.table(report), title=f"what it cost, {_seeds(report)}")
        console.say("\n".join(costs.legend(report)))


def _marked(report: dict) -> str:
    taught = any(row["role"] == "teacher" for row in report["rows"])
    return "best below the teacher" if taught else "best"


def _seeds(report: dict) -> str:
    return f"mean of {report['seeds']} seeds" if report["seeds"] > 1 else "one seed"


# What it means


def sentences(report: dict) -> list[str]:
    """What it was worth, computed from the figures: what training saved, and one sentence a student.

    What was compared item by item (rankers, sentence encoders) has a sentence for each that a student is compared with.
    """
    found = [*report["overridden"], *savings.sentences(report["runners"])]
    for row in report["rows"]:
        if row["role"] == "student":
            found += [text for text in (_sentence(report, row), *_paired(report, row["name"])) if text]
    return found


def _paired(report: dict, student: str) -> Iterator[str]:
    for told in report["comparisons"]:
        if told["row"] == student:
            yield f"{student} against {told['against']}: {comparison(told)}."


def comparison(told: dict) -> str:
    """`nDCG@10 +0.031 (95% interval +0.012 to +0.050; p 0.0004; 300 queries)`."""
    doubt = "" if told["p"] < DOUBT else ", not significant"
    return (
        f"{told['measure']} {told['difference']:+.3f}{doubt} ({LEVEL:.0%} interval {told['low']:+.3f} to "
        f"{told['high']:+.3f}; p {told['p']:.2g}; {told['items']:,} {told['of']})"
    )


def _sentence(report: dict, student: dict) -> str:
    parts = [text for text in (_against_teacher(report, student), *_against_others(report, student)) if text]
    if not parts:
        compared = any(told["row"] == student["name"] for told in report["comparisons"])
        return "" if compared or _raced(report, student) else f"{student['name']}: nothing to compare with."
    return f"{student['name']}: {'; '.join(parts)}."


def _against_teacher(report: dict, student: dict) -> str:
    teacher = next((row for row in _alike(report, student["on"]) if row["role"] == "teacher"), None)
    if teacher is None:
        return ""
    kept = [
        f"{_ratio(student, teacher, name):.1%} of its {facts['title']}"
        for name, facts in report["metrics"].items()
        if name in KEPT and name in student["metrics"] and teacher["metrics"].get(name, {}).get("mean")
    ]
    size = f"{student['params'] / teacher['params']:.0%} of the teacher's parameters"
    measured = next((name for name in SPEEDS if _both(student, teacher, name)), None)
    speed = f" at {_ratio(student, teacher, measured):.1f} times its speed" if measured else ""
    return size + speed + (", keeps " + " and ".join(kept) if kept else "")


def _ratio(one: dict, other: dict, metric: str) -> float:
    return one["metrics"][metric]["mean"] / other["metrics"][metric]["mean"]


def _against_others(report: dict, student: dict) -> Iterator[str]:
    for other in _alike(report, student["on"]):
        if other["role"] in BELOW and (shared := _unpaired(report, student, other)):
            differences = ", ".join(_difference(report, student, other, name) for name in shared)
            yield f"against {other['name']}: {differences}"


def _unpaired(report: dict, student: dict, other: dict) -> list[str]:
    """The metrics of both rows that have no sentence of their own, item by item; of rankers none."""
    rows = student["name"], other["name"]
    paired = {told["measure"]: told["of"] for told in report["comparisons"] if (told["row"], told["against"]) == rows}
    if "queries" in paired.values():
        return []
    quality = (name for name, facts in report["metrics"].items() if facts["quality"] and facts["title"] not in paired)
    return [name for name in quality if _both(student, other, name)]


def _both(one: dict, other: dict, metric: str) -> bool:
    return metric in one["metrics"] and metric in other["metrics"]


def _difference(report: dict, student: dict, other: dict, metric: str) -> str:
    """`probe +0.031 (better in 3 of 3 seeds)`; a difference below two standard errors is called what it is."""
    facts, (mine, theirs) = report["metrics"][metric], (row["metrics"][metric] for row in (student, other))
    difference = mine["mean"] - theirs["mean"]
    won, n = wins(mine, theirs)
    noise = max(mine["error"] or 0.0, theirs["error"] or 0.0)
    doubt = ", within the noise" if abs(difference) < 2 * noise else ""
    return f"{facts['title']} {difference:+.{facts['digits']}f} (better in {won} of {n} seed{'s'[: n != 1]}{doubt})"


def wins(mine: dict, theirs: dict) -> tuple[int, int]:
    """In how many seeds the first is better, of how many; what was measured once meets every seed."""
    n = max(len(mine["seeds"]), len(theirs["seeds"]))
    pairs = zip(_spread(mine["seeds"], n), _spread(theirs["seeds"], n), strict=True)
    return sum(a > b if mine["better"] == "high" else a < b for a, b in pairs), n


def _spread(values: list[float], n: int) -> list[float]:
    return values * n if len(values) == 1 else values


# Markdown


def markdown(report: dict, pictures: dict[str, str], sections: list[str]) -> str:
    """report.md; `pictures` maps a caption to a file name, `sections` are those of its own that a run has."""
    machine = report["machine"]
    parts = [
        f"# {report['recipe']}",
        report["about"],
        markdown_table(*table(report, mark="**")),
        f"{_seeds(report).capitalize()}, equal {report['equal']}; bold: {_marked(report)}; ± standard error of "
        "one value (test items, not seeds).",
        *(f"**{sentence}**" for sentence in sentences(report)),
        *_costs(report),
        "## How it was measured",
        "\n".join(f"- **{title}**: {note}." for title, note in report["notes"]),
        *_every_pair(report),
        *_every_seed(report),
        *sections,
        *(f"![{caption}]({file})" for caption, file in pictures.items()),
        "## Where",
        f"{machine['cores']} core{'s'[: machine['cores'] != 1]} of {machine['cpu']}, "
        f"{console.size(machine['memory'])} memory, GPU: {machine['gpu'] or 'none'}. "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items())
        + ".",
        f"```\n{report['command']}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [columns, rule, *rows]
    )


def _costs(report: dict) -> Iterator[str]:
    if report["costs"]:
        yield "## What it cost"
        yield markdown_table(*costs.table(report))
        yield "\n".join(f"- {line}." for line in costs.legend(report))


def _every_pair(report: dict) -> Iterator[str]:
    if not report["comparisons"]:
        return
    yield "## Compared item by item"
    rows = [
        [told["row"], told["against"], f"{told['measure']} {told['difference']:+.3f}",
         f"{told['low']:+.3f} to {told['high']:+.3f}", f"{told['p']:.2g}", f"{told['items']:,} {told['of']}"]
        for told in report["comparisons"]
    ]  # fmt: skip
    yield markdown_table(["row", "against", "difference", f"{LEVEL:.0%} interval", "p", "over"], rows)
    yield (
        "p is how often chance alone would make the difference as large: the two values of each item change places at "
        f"random, {ROUNDS:,} times (every way there is, where there are fewer). The interval draws items with "
        "replacement. Of several seeds the mean is compared. None of the p is corrected for how many there are."
    )


def _every_seed(report: dict) -> Iterator[str]:
    if report["seeds"] < 2:
        return
    columns = ["", *(f"{facts['title']}" for facts in report["metrics"].values())]
    rows = [[row["name"], *(_seed_text(report, row, name) for name in report["metrics"])] for row in report["rows"]]
    yield "## Every seed"
    yield markdown_table(columns, rows)


def _seed_text(report: dict, row: dict, metric: str) -> str:
    digits = report["metrics"][metric]["digits"]
    return ", ".join(f"{value:,.{digits}f}" for value in row["metrics"].get(metric, {}).get("seeds", [])) or "-"
