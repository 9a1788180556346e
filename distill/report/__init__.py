"""What a run was worth: one set of figures as report.json, report.md, a table on the terminal, plots and model cards.

Everything is made from what the stages left behind (recipe.yaml, evaluation.json, stage.json, log.jsonl), so a report
can be made again at any time.
"""

from __future__ import annotations

from pathlib import Path

from growth.console import say
from growth.files import write_json, write_text


def rebuild(run: Path) -> dict:
    """Write report.json, report.md, the plots and the model cards of a run directory and print the table."""
    from distill.report import card, plots, refinement
    from distill.report.figures import gather, public, training_logs
    from distill.report.words import markdown, show

    run = Path(run)
    report = gather(run)
    logs = training_logs(run, report["stages"])
    pictures = plots.draw(run, report, logs)
    write_json(run / "report.json", public(report))
    told = refinement.gather(run)
    refinement.write(run, told)
    write_text(run / "report.md", markdown(report, pictures, list(refinement.section(told))))
    card.write_all(run, report)
    show(report)
    say(f"report: {run / 'report.md'}")
    return public(report)
