"""The figures of a run, gathered from what its stages left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from distill.evaluate import RESULT
from distill.evaluate.saving import read_log
from distill.report import costs, savings
from growth.errors import UserError
from growth.files import read_json

PUBLIC = ("mean", "seeds", "better")  # of a metric in report.json
ALIKE = ("data", "depth", "retrieve")  # of an evaluation: rows are compared where these are the same
PASSED_ON = ("machine", "versions", "command")


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
    on = {
        stage["id"]: [stage["evaluate"].get(key) for key in ALIKE] for stage in recipe["stages"] if "evaluate" in stage
    }
    rows = [{**row, "on": on[stage]} for stage in found for row in _named(stage, found)]
    raced = [row for row in rows if "saving" in found[row["stage"]]["metrics"]]
    return {
        "recipe": recipe["recipe"],
        "about": recipe.get("about", ""),
        "equal": recipe.get("equal", "steps"),
        "seeds": recipe.get("seeds", 1),
        "rows": rows,
        "comparisons": [told for stage in found for told in _compared(stage, found)],
        "runners": savings.gather(run, raced) if raced else [],
        "costs": costs.gather(run, rows),
        "metrics": {name: facts for result in found.values() for name, facts in result["metrics"].items()},
        "notes": list(dict.fromkeys((facts["title"], facts["note"]) for result in found.values() for facts in
                                    result["metrics"].values())),
        "stages": [stage for stage in recipe["stages"] if "train" in stage],
        "overridden": [said for stage in recipe["stages"] if "train" in stage for said in _changed(run, stage["id"])],
        "corpora": recipe.get("corpora", {}),
        "collections": recipe.get("collections", {}),
        "refined": {stage["id"]: stage["data"] for stage in recipe["stages"] if "data" in stage},
        "models": recipe.get("models", {}),
        **{key: last[key] for key in PASSED_ON},
    }  # fmt: skip


def _changed(run: Path, stage: str) -> Iterator[str]:
    """What was changed under way (--accept-changes), in sentences."""
    for path in sorted([*run.glob(f"{stage}/stage.json"), *run.glob(f"{stage}@*/stage.json")]):
        for one in (read_json(path).get("metrics") or {}).get("overridden", []):
            yield f"{path.parent.name} was changed after step {one['step']:,}: {', '.join(one['changes'])}."


def _compared(stage: str, found: dict[str, dict]) -> Iterator[dict]:
    """What was compared item by item, by the names that the rows have in the report."""
    names = {row["name"]: named["name"] for row, named in zip(found[stage]["rows"], _named(stage, found), strict=True)}
    for told in found[stage].get("comparisons", []):
        yield {**told, "row": names[told["row"]], "against": names[told["against"]]}


def _named(stage: str, found: dict[str, dict]) -> Iterator[dict]:
    """The rows of a stage; `stage/name` where another stage has a row of that name."""
    others = {row["name"] for other, result in found.items() if other != stage for row in result["rows"]}
    for row in found[stage]["rows"]:
        yield {**row, "stage": stage, "name": f"{stage}/{row['name']}" if row["name"] in others else row["name"]}


def public(report: dict) -> dict:
    """report.json."""
    rows = [
        {
            **{key: row[key] for key in ("name", "role", "params")},
            "metrics": {name: {key: found[key] for key in PUBLIC} for name, found in row["metrics"].items()},
            **costs.public(report, row),
        }
        for row in report["rows"]
    ]
    passed_on = {key: report[key] for key in PASSED_ON}
    told = {key: report[key] for key in ("comparisons", "overridden") if report[key]}
    return {"recipe": report["recipe"], "equal": report["equal"], "rows": rows} | told | passed_on


def training_logs(run: Path, stages: list[dict]) -> dict[str, list[list[dict]]]:
    """Stage -> the log of each of its seeds."""
    files = {stage["id"]: sorted([*run.glob(f"{stage['id']}/log.jsonl"), *run.glob(f"{stage['id']}@*/log.jsonl")])
             for stage in stages}  # fmt: skip
    return {stage: [read_log(file) for file in found] for stage, found in files.items() if found}
