"""What selections have kept of a corpus: refinement.md and a picture beside each of them, a section of report.md."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from distill.report.canvas import LINES, figure
from distill.report.words import markdown_table
from growth.console import count
from growth.files import read_json, write_text

PARTS = 12  # of a table; the rest is added up


def gather(run: Path) -> dict[str, dict[str, Any]]:
    """{directory of a stage: what its selection told}, in the order of their names."""
    found = {}
    for manifest in sorted(run.glob("*/stage.json")):
        metrics = read_json(manifest).get("metrics")
        if isinstance(metrics, dict) and "histogram" in (metrics.get("select") or {}):
            found[manifest.parent.name] = metrics["select"]
    return found


def write(run: Path, told: dict[str, dict[str, Any]]) -> None:
    """refinement.md and refinement.png in the directory of every selection."""
    for name, found in told.items():
        draw(run / name / "refinement.png", found)
        write_text(run / name / "refinement.md", markdown(name, found))


def section(told: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Of report.md: one line a stage, means over seeds."""
    if not told:
        return
    yield "## What was kept"
    for stage in dict.fromkeys(name.partition("@")[0] for name in told):
        seeds = [found for name, found in told.items() if name.partition("@")[0] == stage]
        where = ", ".join(f"[{name}]({name}/refinement.md)" for name in told if name.partition("@")[0] == stage)
        yield f"**{stage}** keeps {_share(seeds, 'kept', 'rows')} of the rows, by {seeds[0]['score']}. {where}."
        yield "\n".join(f"- {line}" for line in [_by_part(seeds), *_spotted(seeds)])


def _share(seeds: list[dict], kept: str, of: str) -> str:
    return f"{mean(found[kept] / found[of] for found in seeds):.1%}"


def _by_part(seeds: list[dict]) -> str:
    """The largest ones."""
    parts = seeds[0]["parts"]
    largest = sorted(parts, key=lambda name: -parts[name]["bytes"])[:PARTS]
    shares = [mean(found["parts"][name]["kept_bytes"] / found["parts"][name]["bytes"] for found in seeds if
                   name in found["parts"]) for name in largest]  # fmt: skip
    of = ", ".join(f"{escaped(name)} {share:.1%}" for name, share in zip(largest, shares, strict=True))
    rest = f" (and {len(parts) - PARTS} smaller parts)" if len(parts) > PARTS else ""
    return f"kept of the text: {of}{rest}"


def _spotted(seeds: list[dict]) -> Iterator[str]:
    told = [found["unwanted"] for found in seeds if found["unwanted"]]
    if told:
        names = escaped(", ".join(told[0]["parts"]))
        each = ", ".join(f"{one['precision']:.1%} and {one['recall']:.1%}" for one in told)
        yield (
            f"{names} is known to be worthless: precision and recall of discarding it are {each}"
            + (" (one pair a seed)" if len(told) > 1 else "")
            + f", by text; {told[0]['share']:.1%} of the text is {names}"
        )


def markdown(name: str, found: dict[str, Any]) -> str:
    """refinement.md."""
    parts = [
        f"# {name}: {found['kept']} of {found['rows']} rows",
        f"By {found['score']}; the {'highest' if found['better'] == 'high' else 'lowest'} are kept. "
        f"{count(found['kept_tokens'])} of {count(found['tokens'])} tokens; "
        f"{found['tokens'] / found['rows']:.1f} tokens a row before, {found['kept_tokens'] / found['kept']:.1f} after.",
        *(line[0].upper() + line[1:] + "." for line in _spotted([found])),
        "## Parts",
        markdown_table(*_parts(found["parts"])),
        "## Scores",
        markdown_table(*_quantiles(found["quantiles"])),
        "![Scores of all rows and of those that are kept](refinement.png)",
        "## Highest" if found["better"] == "high" else "## Lowest",
        markdown_table(*_examples(found["best"])),
        "## Lowest" if found["better"] == "high" else "## Highest",
        markdown_table(*_examples(found["worst"])),
    ]
    return "\n\n".join(parts) + "\n"


def _parts(parts: dict[str, dict[str, int]]) -> tuple[list[str], list[list[str]]]:
    """The largest first, and how long their pieces are before and after."""
    largest = sorted(parts, key=lambda name: -parts[name]["bytes"])
    rows = [[escaped(name), *_part(parts[name])] for name in largest[:PARTS]]
    if rest := [parts[name] for name in largest[PARTS:]]:
        rows.append([f"{len(rest)} more", *_part({key: sum(part[key] for part in rest) for key in rest[0]})])
    return ["part", "bytes", "kept", "of the text", "bytes a piece", "of those kept"], rows


def _part(part: dict[str, int]) -> list[str]:
    lengths = (f"{part[a] / part[b]:.0f}" if part[b] else "-" for a, b in
               (("bytes", "pieces"), ("kept_bytes", "kept_pieces")))  # fmt: skip
    return [f"{part['bytes']:,}", f"{part['kept_bytes']:,}", f"{part['kept_bytes'] / part['bytes']:.1%}", *lengths]


def _quantiles(quantiles: dict[str, list[float]]) -> tuple[list[str], list[list[str]]]:
    rows = [[name, *(f"{value:.3f}" for value in quantiles[name])] for name in ("all", "kept")]
    return ["", *(f"{at:.0%}" for at in quantiles["at"])], rows


def _examples(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    cells = [[f"{row['score']:.3f}", escaped(row["part"]), escaped(row["text"])] for row in rows]
    return ["score", "part", "text"], cells


def escaped(text: str) -> str:
    """Somebody else's text inside Markdown: it shows as it is and does nothing."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return "".join(f"\\{letter}" if letter in "\\`*_[]#!" else letter for letter in html.escape(printable, quote=False))


def draw(path: Path, found: dict[str, Any]) -> None:
    """The distribution of the scores, all and kept."""
    edges = found["histogram"]["edges"]
    with figure(path, 1, width=5.0, height=2.9) as (panel,):
        for name, colour in (("all", "#cccccc"), ("kept", LINES[0])):
            panel.stairs(found["histogram"][name], edges, fill=True, color=colour, label=name)
        panel.set_xlabel(found["score"])
        panel.set_ylabel("rows")
        panel.legend(frameon=False, fontsize=8)
