"""Making a student of random weights: what memory it takes to write it tensor by tensor, and all of it at once.

    python benchmarks/start_memory.py [--hidden 1024] [--layers 8] [--vocab 8000]

Each way in a process of its own; memory is the rise of its resident size while it works, next to its CPU seconds. The
files of weights must be the same to the byte.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from distill import loading, models
from distill.drawn import Drawn, planned
from growth.console import size, table
from growth.files import sha256


def config(given) -> dict:
    sizes = {"hidden_size": given.hidden, "intermediate_size": 3 * given.hidden, "vocab_size": given.vocab}
    heads = {"num_hidden_layers": given.layers, "num_attention_heads": given.hidden // 64, "num_key_value_heads": 4}
    return {"model_type": "llama", **sizes, **heads}


def whole(read, dst: Path) -> None:
    models.save(models.fresh(read, "causal", 0), dst, carry=None)


def streamed(read, dst: Path) -> None:
    drawn = Drawn(planned(read, "causal"), 0)
    models.save(drawn.model, dst, carry=None, tensors=drawn.pieces())


WAYS = {"whole": whole, "streamed": streamed}


def measure(given, dst: Path) -> dict:
    read = loading.configuration(config(given))
    small = loading.configuration({**config(given), "num_hidden_layers": 1, "hidden_size": 256, "vocab_size": 99})
    WAYS[given.way](small, dst / "warm")  # what is imported late is not the model's
    before, began = _resident(), time.process_time()
    WAYS[given.way](read, dst / given.way)
    return {"memory": _resident() - before, "seconds": time.process_time() - began}


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("layers", 8), ("vocab", 8000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--dst", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        torch.set_num_threads(1)
        print(json.dumps(measure(given, given.dst)))
        return
    lines, digests = [], set()
    with TemporaryDirectory() as place:
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--dst", f"{place}/{way}"]
            told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            weights = Path(place) / way / way / "model.safetensors"
            digests.add(sha256(weights))
            lines.append([way, size(weights.stat().st_size), size(told["memory"]), f"{told['seconds']:.1f} s"])
    table(["start", "weights", "memory", "CPU"], lines, f"the same bytes: {len(digests) == 1}")


if __name__ == "__main__":
    main()
