"""`distill`: one command that runs a recipe, and those around it. Heavy imports wait until they are needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from distill import world
from growth.console import Commands

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="distill-growth")
def main() -> None:
    """Models in motion: teach small models what big ones know.

    \b
    distill list                 recipes that come with it
    distill run minilm           run one; the table comes last
    """


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory, such as --out runs/try-1.  [default: runs/RECIPE]"
)
@click.option(
    "--dry-run", is_flag=True, help="Check everything and forecast cost; write nothing. A config.json is enough."
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), metavar="FLOPS",
    help="For --dry-run: FLOPs a second of one GPU's matrix product, such as --rate 4e14.  [default: measured here]",
)  # fmt: skip
@click.option(
    "--from", "start_from", metavar="STAGE", help="Do this stage and what follows it again, such as --from student."
)
@click.option("--fresh", is_flag=True, help="Do every stage again; removes the stage directories of this recipe.")
@click.option(
    "--accept-changes",
    is_flag=True,
    help="Go on with an interrupted stage though its recipe, models or text have changed; the report will say so.",
)
@click.option(
    "--ranks", type=click.IntRange(1), default=1, help="Processes on this machine, such as --ranks 2.  [default: 1]"
)
def run(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    dry_run: bool,
    rate: float | None,
    start_from: str | None,
    fresh: bool,
    accept_changes: bool,
    ranks: int,
) -> None:
    """Run RECIPE: a file, or the name of a packaged one. Finished stages are kept, an interrupted one goes on.

    \b
    distill run minilm
    distill run recipes/minilm.yaml student.train.stop.steps=10 seed=1
    distill run minilm engine.zero=2 --ranks 2 --out runs/two-ranks
    distill run minilm --dry-run --ranks 8 --rate 4e14
    """
    from distill import launch
    from distill.recipe import load

    read = load(recipe, overrides)
    out = out or Path("runs") / read.recipe
    if rate and not dry_run:
        raise click.UsageError("--rate is for --dry-run; a run takes the time it takes")
    if dry_run:
        from distill.forecast import show

        show(read, out, ranks, rate)
    elif ranks > 1 and not launch.is_rank():
        sys.exit(launch.launch(ranks, sys.argv[1:]))
    else:
        from distill import stages

        launch.refuse_other(ranks)
        stages.run(read, out, start_from=start_from, fresh=fresh, accept_changes=accept_changes)


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory, for its finished stages.  [default: runs/RECIPE]"
)
@click.option("--ranks", type=click.IntRange(1), default=1, help="Processes on this machine.  [default: 1]")
def check(recipe: str, overrides: tuple[str, ...], out: Path | None, ranks: int) -> None:
    """Try each training stage of RECIPE on one real batch: ids, masks, teachers, one loss however rows are cut, time.

    Nothing is kept. A stage that needs another one is tried once that has run.

    \b
    distill check minilm
    distill check recipes/minilm.yaml engine.micro_batch=4 --ranks 2
    """
    from distill import launch
    from distill.recipe import load

    read = load(recipe, overrides)
    if ranks > 1 and not launch.is_rank():
        sys.exit(launch.launch(ranks, sys.argv[1:]))
    from distill import trial

    launch.refuse_other(ranks)
    trial.show(read, out or Path("runs") / read.recipe)


@main.command("list")
def list_() -> None:
    """What a recipe can name: recipes, objectives, operators, metrics, sources of text.

    \b
    distill list
    """
    from distill.listing import show

    show()


@main.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors.

    \b
    distill schema > recipe.schema.json
    """
    from distill.recipe import schema

    click.echo(json.dumps(schema(), indent=2, ensure_ascii=False))


@main.command()
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
def report(directory: Path) -> None:
    """Make the table, plots and model cards of the run directory RUN again.

    \b
    distill report runs/minilm
    """
    from distill.report import rebuild

    rebuild(directory)


def program() -> None:
    """The command: `main`, and an end that nothing can spoil."""
    try:
        main(prog_name="distill")
    except SystemExit as end:
        world.leave_at_once(end)


if __name__ == "__main__":
    program()
