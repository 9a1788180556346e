"""What a run was worth: one set of figures as report.json, report.md, a table on the terminal, plots and model cards.

Everything is made from what the stages left behind (recipe.yaml, evaluation.json, stage.json, log.jsonl), so a report
can be made again at any time. Heavy imports only where a plot is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from distill.evaluate import RESULT
from growth import console
from growth.errors import UserError
from growth.files import read_json, write_json, write_text

PUBLIC = ("mean", "seeds", "better")  # of a metric in report.json
PASSED_ON = ("machine", "versions", "command")


def rebuild(run: Path) -> dict:
    """Write report.json, report.md, the plots and the model cards of a run directory and print the table."""
    from distill import card, plots

    run = Path(run)
    report = gather(run)
    logs = training_logs(run, report["stages"])
    pictures = plots.draw(run, report, logs)
    write_json(run / "report.json", public(report))
    write_text(run / "report.md", markdown(report, pictures))
    card.write_all(run, report)
    show(report)
    console.say(f"report: {run / 'report.md'}")
    return public(report)


def gather(run: Path) -> dict:
    """The figures of all evaluate stages of a run, with what the recipe says about it."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run directory: no recipe.yaml in it")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    stages = [stage["id"] for stage in recipe["stages"] if "evaluate" in stage]
    found = {stage: read_json(run / stage / RESULT) for stage in stages if (run / stage / RESULT).is_file()}
    if not found:
        raise UserError(f"{run}: nothing was evaluated yet; `distill run` goes on where it stopped")
    last = list(found.values())[-1]
    return {
        "recipe": recipe["recipe"],
        "about": recipe.get("about", ""),
        "equal": recipe.get("equal", "steps"),
        "seeds": recipe.get("seeds", 1),
        "rows": [row for stage in found for row in _named(stage, found)],
        "metrics": {name: facts for result in found.values() for name, facts in result["metrics"].items()},
        "stages": [stage for stage in recipe["stages"] if "train" in stage],
        "corpora": recipe.get("corpora", {}),
        "models": recipe.get("models", {}),
        **{key: last[key] for key in PASSED_ON},
    }


def _named(stage: str, found: dict[str, dict]) -> Iterator[dict]:
    """The rows of a stage; `stage/name` where another stage has a row of that name."""
    others = {row["name"] for other, result in found.items() if other != stage for row in result["rows"]}
    for row in found[stage]["rows"]:
        yield {**row, "name": f"{stage}/{row['name']}" if row["name"] in others else row["name"]}


def public(report: dict) -> dict:
    """report.json."""
    rows = [
        {
            **{key: row[key] for key in ("name", "role", "params")},
            "metrics": {name: {key: found[key] for key in PUBLIC} for name, found in row["metrics"].items()},
        }
        for row in report["rows"]
    ]
    return {"recipe": report["recipe"], "equal": report["equal"], "rows": rows} | {k: report[k] for k in PASSED_ON}


# The table


def table(report: dict, mark: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; the best value below the teacher stands in `mark`s."""
    metrics = report["metrics"]
    best = {name: best_text(report, name) for name in metrics}
    columns = ["", "parameters", *(heading(facts) for facts in metrics.values())]
    rows = [[row["name"], console.count(row["params"])] for row in report["rows"]]
    for cells, row in zip(rows, report["rows"], strict=True):
        for name in metrics:
            text = value_text(report, row, name)
            wins = row["role"] != "teacher" and text == best[name]
            cells.append((f"{mark}{text}{mark}" if wins else text) + error_text(report, row, name))
    return columns, rows


def heading(facts: dict) -> str:
    return facts["title"] + {"high": " ↑", "low": " ↓", "none": ""}[facts["better"]]


def value_text(report: dict, row: dict, metric: str) -> str:
    """A figure as it is printed everywhere."""
    if metric not in row["metrics"]:
        return "-"
    return f"{row['metrics'][metric]['mean']:,.{report['metrics'][metric]['digits']}f}"


def error_text(report: dict, row: dict, metric: str) -> str:
    error = row["metrics"].get(metric, {}).get("error")
    return "" if error is None else f" ± {error:.{report['metrics'][metric]['digits']}f}"


def best_text(report: dict, metric: str) -> str | None:
    """The best figure of the rows below the teacher; None where there is nothing to choose between."""
    rows = [row for row in report["rows"] if row["role"] != "teacher" and metric in row["metrics"]]
    better = report["metrics"][metric]["better"]
    if better == "none" or len({value_text(report, row, metric) for row in rows}) < 2:
        return None
    choose = max if better == "high" else min
    return value_text(report, choose(rows, key=lambda row: row["metrics"][metric]["mean"]), metric)


def show(report: dict) -> None:
    """The table and its meaning on the terminal."""
    columns, rows = table(report, mark="*")
    title = f"{report['recipe']}: {_seeds(report)}, equal {report['equal']}"
    console.table(columns, rows, title=title)
    console.say("\n".join(["* best below the teacher; ± standard error of one value", *sentences(report)]))


def _seeds(report: dict) -> str:
    return f"mean of {report['seeds']} seeds" if report["seeds"] > 1 else "one seed"


# What it means


def sentences(report: dict) -> list[str]:
    """What distillation was worth: one sentence a student, computed from the figures."""
    return [" ".join(_sentence(report, row)) for row in report["rows"] if row["role"] == "student"]


def _sentence(report: dict, student: dict) -> Iterator[str]:
    parts = [text for text in (_against_teacher(report, student), *_against_others(report, student)) if text]
    yield f"{student['name']}: " + ("; ".join(parts) if parts else "nothing to compare with") + "."


def _against_teacher(report: dict, student: dict) -> str:
    teacher = next((row for row in report["rows"] if row["role"] == "teacher"), None)
    if teacher is None:
        return ""
    kept = [
        f"{_ratio(student, teacher, name):.1%} of its {facts['title']}"
        for name, facts in report["metrics"].items()
        if name == "probe" and name in student["metrics"] and teacher["metrics"].get(name, {}).get("mean")
    ]
    size = f"{student['params'] / teacher['params']:.0%} of the teacher's parameters"
    speed = f" at {_ratio(student, teacher, 'speed'):.1f} times its speed" if "speed" in student["metrics"] else ""
    return size + speed + (", keeps " + " and ".join(kept) if kept else "")


def _ratio(one: dict, other: dict, metric: str) -> float:
    return one["metrics"][metric]["mean"] / other["metrics"][metric]["mean"]


def _against_others(report: dict, student: dict) -> Iterator[str]:
    for other in report["rows"]:
        if other["role"] in ("baseline", "scratch"):
            shared = [n for n, facts in report["metrics"].items() if facts["quality"] and _both(student, other, n)]
            if shared:
                differences = ", ".join(_difference(report, student, other, name) for name in shared)
                yield f"against {other['name']}: {differences}"


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


def markdown(report: dict, pictures: dict[str, str]) -> str:
    """report.md; `pictures` maps a caption to a file name."""
    machine = report["machine"]
    parts = [
        f"# {report['recipe']}",
        report["about"],
        markdown_table(*table(report, mark="**")),
        f"{_seeds(report).capitalize()}, equal {report['equal']}; bold: best below the teacher; ± standard error of "
        "one value (test items, not seeds).",
        *(f"**{sentence}**" for sentence in sentences(report)),
        "## How it was measured",
        "\n".join(f"- **{facts['title']}**: {facts['note']}." for facts in report["metrics"].values()),
        *_every_seed(report),
        *(f"![{caption}]({file})" for caption, file in pictures.items()),
        "## Where",
        f"{machine['cores']} cores of {machine['cpu']}, {console.size(machine['memory'])} memory, "
        f"GPU: {machine['gpu'] or 'none'}. " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".",
        f"```\n{report['command']}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [columns, rule, *rows]
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


# Logs


def training_logs(run: Path, stages: list[dict]) -> dict[str, list[list[dict]]]:
    """Stage -> the log of each of its seeds."""
    files = {stage["id"]: sorted([*run.glob(f"{stage['id']}/log.jsonl"), *run.glob(f"{stage['id']}@*/log.jsonl")])
             for stage in stages}  # fmt: skip
    return {stage: [read_log(file) for file in found] for stage, found in files.items() if found}


def read_log(path: Path) -> list[dict]:
    """The entries of a log; a last line that a killed run left unfinished is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
