"""What growth keeps: the largest difference of logits in float64, for every family and every operator.

    python benchmarks/preservation.py [--only llama,bert] [--out benchmarks/results/preservation]

Tiny random models with weights, gains and biases of standard deviation 0.3 around where a new model starts, an epsilon
of 0.001, which is felt, and noise of 0.3 between copies. A dash: the architecture cannot have it, or no way to it would
keep the function, so the operator refuses. The last table is of constructions that look right and are not: no operator
makes them, the same maps with one fact left out do. Ends with exit code 1 if a promise is broken, or if one of those
goes unnoticed. `--out` writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
import transformers

import growth
from distill.evaluate.machine import facts
from growth.console import table
from growth.errors import UserError
from growth.families import FAMILIES
from growth.files import write_json, write_text
from growth.maps import Units, kept_first, padded, tiled

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the tiny models, and widening by other maps
from test_width import EPSILON, FUSED, RMS, by_hand, outputs, with_maps
from tiny_families import CONFIGS, save

EXACT, NOTICED = 1e-12, 1e-3  # of the largest logit
NOISE = 0.3
TABLES = {"RMS norms": [*RMS, "t5"], "layer norms": FUSED}
ODD = {  # a width of no common divisor with seven more: whole heads of seven, where heads divide the width
    **{kind: {"hidden_size": 49, "num_attention_heads": 7, "num_key_value_heads": 1} for kind in RMS},
    **{"gpt2": {"n_embd": 35}, "t5": {}},
}


@dataclass(frozen=True)
class Cell:
    """One model before and after."""

    change: str
    family: str
    promised: str  # exact | approximate | no | (by hand)
    absolute: float
    relative: float  # to the largest logit
    asked: str

    @property
    def right(self) -> bool:
        """A promise is kept, and what must not be taken for exact is not."""
        return self.relative <= EXACT if self.promised == "exact" else self.relative > NOTICED

    def __str__(self) -> str:
        return f"{self.absolute:.0e}" if self.promised == "exact" else f"{self.absolute:.2g}"


@cache
def source(home: Path, kind: str, changes: tuple = ()) -> Path:
    epsilon = EPSILON.get(kind, "rms_norm_eps" if kind in RMS else "layer_norm_eps")
    name = "-".join([kind, *(f"{key}={value}" for key, value in changes)])
    felt = {epsilon: 1e-3} if epsilon else {}
    return save(home / name, kind, dtype=torch.float64, **{**felt, **dict(changes)})


def _doubled(kind: str) -> dict[str, int]:
    return {"hidden": 96 if kind in RMS else 60}


def _half(kind: str) -> dict[str, int]:
    return {"hidden": 72 if kind in RMS else 45 if kind == "t5" else 48}  # whole heads of 6 where they divide the width


def _seven(kind: str) -> dict[str, int] | None:
    return {"hidden": {"gpt2": 42, "t5": 37}.get(kind, 56)} if kind in ODD else None


def _heads(kind: str) -> dict[str, int] | None:
    return {"heads": 12, "kv_heads": 6} if kind in RMS else {"heads": 7} if kind == "t5" else None


def _kv_heads(kind: str) -> dict[str, int] | None:
    return {"kv_heads": 6} if kind in RMS else None


def _head_size(kind: str) -> dict[str, int]:
    if kind in (*RMS, "t5"):
        return {"head_size": 20 if kind in RMS else 7}
    m = {"modernbert": 16, "gpt_neox": 4}.get(kind, 2)  # ModernBERT turns in float32: powers of two round nothing
    return {"hidden": 30 * m, "heads": 5, "head_size": 6 * m}


def _all(kind: str) -> dict[str, int]:
    return {**_doubled(kind), "ffn": 58, "vocab": 64, **({"heads": 12, "kv_heads": 6} if kind in RMS else {})}


def wide(asked: Callable[[str], dict | None], how: str = "exact", **changes):
    """A row of widening: `changes` of the source come first."""

    def row(home: Path, kind: str) -> Cell | None:
        sizes = asked(kind)
        if sizes is None:
            return None
        first = ODD[kind] if asked is _seven else changes
        made = source(home, kind, tuple(first.items()))
        return measured(
            made, growth.widen, **sizes, how=how, noise=NOISE if how in ("exact", "weighted", "zero") else 0.0
        )

    return row


def plain(operator: Callable, kinds: tuple[str, ...] = (), **asked):
    """A row of any operator with the same arguments for every family."""
    return lambda home, kind: measured(source(home, kind), operator, **asked) if not kinds or kind in kinds else None


DENSE = ("llama", "mistral", "qwen2")
ROWS = {
    "hidden x2": wide(_doubled),
    "hidden x2, head tied": wide(_doubled, tie_word_embeddings=True),
    "hidden x2, head not tied": wide(_doubled, tie_word_embeddings=False),
    "hidden x1.5 or x1.6": wide(_half),
    "the same, head tied": wide(_half, tie_word_embeddings=True),
    "hidden +7": wide(_seven),
    "heads": wide(_heads),
    "key-value heads to one a query": wide(_kv_heads),
    "ffn 41 to 58": wide(lambda kind: {"ffn": 58}),
    "head size": wide(_head_size),
    "rows of the vocabulary to 64": wide(lambda kind: {"vocab": 64}),
    "all of these": wide(_all),
    "new tokens (mean)": plain(growth.vocabulary, size=60),
    "3 blocks inserted": plain(growth.insert, after=[0, 0, 1]),
    "stack x2, silent": plain(growth.stack, how="zero"),
    "upcycle to 5 experts": plain(growth.upcycle, DENSE, experts=5),
    "stack x2": plain(growth.stack),
    "interleave x2": plain(growth.stack, order="interleave"),
    "stack x2, random": plain(growth.stack, how="random"),
    "one layer cut": plain(growth.cut, layers=[0]),
    "zero channels, x1.5 or x1.6": wide(_half, "zero"),
    "random channels, x1.5 or x1.6": wide(_half, "random"),
    "3 blocks near the identity": lambda home, kind: (
        None
        if FAMILIES[kind].norms != "post"
        else measured(source(home, kind), growth.insert, after=[0, 0, 1], approximate=True)
    ),
    "FPI, hidden x1.5 or x1.6": wide(_half, "fpi"),
    "AKI, hidden x2": wide(_doubled, "aki"),
    "AKI, hidden x1.5 or x1.6": wide(_half, "aki"),
    "mean channels, x1.6": lambda home, kind: None if kind not in FUSED else wide(_half, "mean")(home, kind),
    "upcycle, noise between experts": plain(growth.upcycle, DENSE, experts=5, noise=0.1),
}


def measured(src: Path, operator: Callable, **asked) -> Cell | None:
    """None where the operator refuses."""
    with tempfile.TemporaryDirectory(dir=src.parent) as home:
        try:
            made = operator(src, Path(home) / "x", **asked)
        except UserError:
            return None
        promised = growth.inspect(made).lineage["preserves"]
        return compared(src, made, promised, ", ".join(f"{key} {value}" for key, value in asked.items()))


def compared(src: Path, made: Path, promised: str, asked: str) -> Cell:
    a, b = outputs(src)["logits"], outputs.__wrapped__(made)["logits"]
    n = min(a.shape[-1], b.shape[-1])
    apart = float((a[..., :n] - b[..., :n]).abs().max())
    return Cell("", growth.open(src).config["model_type"], promised, apart, apart / float(a.abs().max()), asked)


# what no operator makes


def _no_tie(widening):
    return replace(widening, tied=False)


BROKEN = [  # family, changes of the source, sizes, the maps with one fact left out, which fact
    ("llama", {}, {"hidden": 72}, with_maps(embed=Units(tiled(48, 72), 48)), "copies of some channels, not weighted"),
    ("llama", {}, {"hidden": 72}, with_maps(embed=Units(padded(48, 72), 48)), "zero channels, the rest not scaled"),
    ("gpt2", {}, {"hidden": 48}, with_maps(embed=Units(tiled(30, 48), 30)), "copies of some channels, not their mean"),
    ("bert", {}, {"hidden": 60}, _no_tie, "tied head not corrected, x2"),
    ("gpt2", {}, {"hidden": 60}, _no_tie, "tied head not corrected, x2"),
    ("t5", {}, {"hidden": 60}, _no_tie, "tied head not corrected, x2"),
    ("llama", {"tie_word_embeddings": True}, {"hidden": 96}, _no_tie, "tied head not corrected, x2"),
    ("t5", {}, {"hidden": 60}, lambda w: replace(w, root=1.0), "tied head without the root of the growth"),
    ("llama", {}, {"kv_heads": 6, "heads": 12},
     with_maps(kv_group=Units(tuple(i for i in range(6) for _ in range(2)), 6)), "queries dealt one way, keys another"),
    ("llama", {}, {"head_size": 20}, with_maps(head=Units(kept_first(10, 20), 10)), "rotary channels kept in front"),
    ("gpt2", {}, {"hidden": 60}, with_maps(qkv_heads_head=Units(tiled(90, 180), 90)), "fused projection as one block"),
    ("gpt_neox", {}, {"hidden": 60},
     with_maps(heads_qkv_head=Units(tuple(t * 30 + i for t in range(3) for i in tiled(30, 60)), 90)),
     "projection fused per head by thirds"),
]  # fmt: skip
EDITED = [  # family, operator, the change of its result, which fact
    ("llama", lambda s, d: growth.insert(s, d, after=[0]), {"model.layers.1.mlp.down_proj.weight": 0},
     "inserted block with one writer left"),
    ("gpt2", lambda s, d: growth.insert(s, d, after=[0]), {"transformer.h.1.mlp.c_proj.bias": 0},
     "inserted block with one bias left"),
    ("qwen2", lambda s, d: growth.upcycle(s, d, experts=5), {"norm_topk_prob": False}, "experts not summing to one"),
    ("gemma2", lambda s, d: growth.insert(s, d, after=[0]),
     {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"], "sliding_window": 3},
     "kinds of layers by number, not by their source"),
]  # fmt: skip


def broken(home: Path, only: set[str]) -> Iterator[Cell]:
    for kind, changes, asked, change, fact in BROKEN:
        if kind in only:
            src = source(home, kind, tuple(changes.items()))
            with tempfile.TemporaryDirectory(dir=home) as place:
                made = by_hand(src, Path(place) / "x", asked, change)
                yield replace(compared(src, made, "(by hand)", str(asked)), change=fact)
    for kind, operator, edits, fact in EDITED:
        if kind in only:
            yield replace(edited(home, kind, operator, edits), change=fact)


def edited(home: Path, kind: str, operator: Callable, edits: dict) -> Cell:
    """A result with some keys of its config changed, or some tensors as the named layer of the source has them."""
    changes = {"sliding_window": edits["sliding_window"]} if "sliding_window" in edits else {}
    src = source(home, kind, tuple(changes.items()))
    with tempfile.TemporaryDirectory(dir=home) as place:
        new, old = growth.open(operator(src, Path(place) / "x")), growth.open(src)
        tensors = {name: old.tensor(name.replace(".1.", f".{edits[name]}.")) if name in edits else new.tensor(name)
                   for name in new}  # fmt: skip
        config = new.config | {key: value for key, value in edits.items() if key in new.config}
        made = growth.write(Path(place) / "y", config, tensors.items())
        return compared(src, made, "(by hand)", str(edits))


# what is shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CONFIGS), help="families, with commas between them")
    parser.add_argument("--out", type=Path, help="without an end: .md and .json are added")
    asked = parser.parse_args()
    transformers.logging.disable_progress_bar()
    only, began = set(asked.only.split(",")), time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        cells = [replace(cell, change=change) for change, row in ROWS.items() for kind in CONFIGS if kind in only
                 if (cell := row(Path(home), kind))]  # fmt: skip
        guards = list(broken(Path(home), only))
    wrong = [cell for cell in [*cells, *guards] if not cell.right]
    tables = list(shown(cells, guards, only))
    for title, columns, rows in tables:
        table(columns, rows, title)
        print()
    said = f"{len(cells)} changes and {len(guards)} wrong ones: {verdict(wrong)}"
    print(said)
    if asked.out:
        seconds = round(time.perf_counter() - began)
        about = {**facts(), "date": time.strftime("%Y-%m-%d"), "seconds": seconds, "verdict": said}
        written(asked.out, cells, guards, about, tables)
    sys.exit(bool(wrong))


def verdict(wrong: list[Cell]) -> str:
    said = [f"{cell.family}: {cell.change}: promised {cell.promised}, {cell.relative:.2g}" for cell in wrong]
    return "; ".join(said) or "every promise is kept, and nothing that is wrong goes unnoticed"


def shown(cells: list[Cell], guards: list[Cell], only: set[str]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """The tables: title, columns, rows."""
    at = {(cell.change, cell.family): cell for cell in cells}
    for title, kinds in TABLES.items():
        kinds = [kind for kind in kinds if kind in only]
        rows = [[change, *(str(at.get((change, kind), "-")) for kind in kinds)] for change in ROWS]
        yield title, ["change", *kinds], [row for row in rows if set(row[1:]) - {"-"}]
    yield (
        "what no operator makes",
        ["what is wrong", "family", "difference", "of the largest logit"],
        [[cell.change, cell.family, str(cell), f"{cell.relative:.2g}"] for cell in guards],
    )


def written(out: Path, cells: list[Cell], guards: list[Cell], about: dict, tables: list) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    made = {"cells": [asdict(cell) for cell in cells], "wrong on purpose": [asdict(cell) for cell in guards]}
    write_json(out.with_suffix(".json"), {**about, **made})
    lines = [
        *("# What growth keeps", ""),
        f"Largest difference of logits in float64, {about['date']}, by `python benchmarks/{about['command']}`:",
        f"{about['verdict']}. Bold: no promise to keep the function. A dash: refused.",
    ]
    bold = {str(cell) for cell in cells if cell.promised != "exact"}
    for title, columns, rows in tables:
        body = [[f"**{text}**" if text in bold and title in TABLES else text for text in row] for row in rows]
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", *map(_line, [columns, ["---"] * len(columns), *body])]
    machine, versions = ([f"{key} {value}" for key, value in about[part].items()] for part in ("machine", "versions"))
    lines += ["", f"Made in {about['seconds']} s on: {', '.join(machine)}; {', '.join(versions)}.", ""]
    write_text(out.with_suffix(".md"), "\n".join(lines))


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
