"""BM25 on collections in BEIR's layout: the figures that a trained ranker has to beat.

    python benchmarks/ranking_bm25.py DIRECTORY [DIRECTORY ...] [--depth 1000] [--runs OUT]

Words in lower case, no stemming, no stop words, k1 0.9, b 0.4, Lucene's variant; title and text are searched as one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from distill.ranking import collection, measures, search, trec
from growth.console import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--split")
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--runs", type=Path, help="a directory for TREC run files")
    asked = parser.parse_args()
    rows = [measured(directory, asked.split, asked.depth, asked.runs) for directory in asked.directories]
    table(("collection", *measures.MEASURES, "queries", "documents", "seconds"), rows, "BM25")


def measured(directory: Path, split: str | None, depth: int, runs: Path | None) -> tuple[str, ...]:
    found = collection.beir(directory, split)
    start = time.perf_counter()
    run = search.BM25(found.documents).run(found.queries, depth)
    took = time.perf_counter() - start
    if runs:
        runs.mkdir(parents=True, exist_ok=True)
        trec.write(runs / f"{directory.name}.bm25.run", run, "bm25")
    result = measures.evaluate(run, found.judgements, found.queries)
    print(f"{directory.name}: {result}")
    counted = len(result.queries[measures.MEASURES[0]])
    figures = [f"{result.means[name]:.4f}" for name in measures.MEASURES]
    return directory.name, *figures, str(counted), str(len(found.documents)), f"{took:.1f}"


if __name__ == "__main__":
    main()
