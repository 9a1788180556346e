"""What a user sees: bars, lines and tables; plain text when nobody looks at a terminal."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import click

from growth.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of the disk, of what a user may have, of one file
INTERRUPTED = 130  # the shell's code for SIGINT
LONGEST = 4000  # characters of a message
EVERY = 10.0  # seconds between progress lines in a log file


class Commands(click.Group):
    """A group of commands in which a mistake is one line on stderr, never a traceback."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except UserError as error:
            self._fail(context, str(error), error.exit_code)
        except KeyboardInterrupt:
            self._fail(context, "interrupted", INTERRUPTED)
        except BrokenPipeError:
            raise  # `| head` is not a mistake; click ends quietly
        except OSError as error:
            if error.filename is None and error.errno not in FULL:
                raise  # not about a file of the user's
            where = "" if error.filename is None else f"{error.filename}: "
            self._fail(context, f"{where}{error.strerror}", UserError.exit_code)

    def _fail(self, context: click.Context, message: str, code: int) -> None:
        click.echo(f"error: {plain(message)}", err=True)
        context.exit(code)


def plain(text: str) -> str:
    """What comes from a file may hold anything, a terminal's commands too, or be endless."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text[:LONGEST])
    return shown + " ..." * (len(text) > LONGEST)


def first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def on_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at it; there is none where it was closed."""
    return stream is not None and stream.isatty()


def say(text: str) -> None:
    """A line for the user; one of many processes says it."""
    if first_rank():
        click.echo(plain(text), err=True)


@contextmanager
def bar(total: int | None, label: str) -> Iterator[Callable[..., None]]:
    """Progress of `total` things: `with bar(10, "writing") as advance: advance(1, note="...")`."""
    if not first_rank():
        yield lambda n=1, note="": None
        return
    draw = _terminal_bar if on_terminal(sys.stderr) else _plain_bar
    with draw(total, label) as advance:
        yield advance


@contextmanager
def _terminal_bar(total: int | None, label: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            progress.update(task, advance=n, **({"note": note} if note else {}))

        yield advance


@contextmanager
def _plain_bar(total: int | None, label: str) -> Iterator[Callable[..., None]]:
    started = spoken = time.monotonic()
    done, last_note = 0, ""

    def line() -> None:
        of = "" if total is None else f"/{total}"
        click.echo(f"{label}: {done}{of} in {seconds(time.monotonic() - started)}  {last_note}".rstrip(), err=True)

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last_note, spoken
        done, last_note = done + n, note or last_note
        if time.monotonic() - spoken >= EVERY:
            spoken = time.monotonic()
            line()

    yield advance
    line()


def table(columns: Sequence[str], rows: Sequence[Sequence], title: str = "") -> None:
    """Rows under headings: drawn on a terminal, plainly aligned in a file or pipe."""
    cells, title = [[plain(str(cell)) for cell in row] for row in rows], plain(title)
    if on_terminal(sys.stdout):
        _terminal_table(columns, cells, title)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [[title], columns, *cells] if title else [columns, *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())


def _terminal_table(columns: Sequence[str], cells: list[list[str]], title: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen, drawn = Console(), Table(*columns, title=title or None)
    for row in cells:
        drawn.add_row(*map(Text, row))  # Text: names with brackets are not markup
    below = [[row[n] for row in cells] for n in range(len(columns))]
    wide = sum(max(map(len, [heading, *texts])) + 3 for heading, texts in zip(columns, below, strict=True))
    if wide >= screen.width:  # figures stay whole; headings, and names in the first column, take several lines
        drawn.box, drawn.padding, drawn.columns[0].overflow = SIMPLE_HEAD, (0, 1, 0, 0), "fold"
        for heading, texts, column in list(zip(columns, below, drawn.columns, strict=True))[1:]:
            column.width = max(map(len, [*heading.split(), *texts]), default=0)
    screen.print(drawn)


def size(n_bytes: float) -> str:
    """1400000 -> `1.4 MB`."""
    return _scaled(n_bytes, ["B", "kB", "MB", "GB", "TB", "PB"])


def count(n: float) -> str:
    """22700000 -> `22.7 M`."""
    return _scaled(n, ["", "k", "M", "B", "T"])


def _scaled(n: float, units: list[str]) -> str:
    for unit in units:
        if abs(n) < 999.95 or unit == units[-1]:
            return (f"{n:.0f} {unit}" if unit == units[0] else f"{n:.1f} {unit}").strip()
        n /= 1000
    raise AssertionError("the last unit takes every number")


def seconds(s: float) -> str:
    """200 -> `3 min 20 s`."""
    if s < 59.95:
        return f"{s:.1f} s"
    minutes, rest = divmod(round(s), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
