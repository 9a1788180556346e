"""`growth stack` of a synthetic 2 GB Llama against `cp`, and against mergekit's passthrough, in interleaved runs.

    python benchmarks/growth_stack.py [--pairs 7] [--mergekit VENV] [--directory DIR] [--out results/growth_stack.json]

Every run starts a process of its own, ends with its bytes on the disk (fsync of files and directories), and removes
what it wrote before the next one begins. `cp` copies the source twice, which is what the stack writes to within the
embeddings. Wall times; peak memory is the process's own resident set. Needs 10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from growth.console import seconds, size, table

CONFIG = dict(
    **dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=2048, intermediate_size=5632),
    **dict(num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, head_dim=64, vocab_size=32000),
    **dict(max_position_embeddings=2048, rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False),
    **dict(bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16"),
)  # TinyLlama's sizes: 1.1 billion parameters, 2.2 GB
BIN = Path(sys.executable).parent
COPY = 'for i in 1 2; do cp --reflink=never -r "$1" "$2/$i" || exit 1; done; sync "$2"/*/* "$2"/* "$2"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--mergekit", type=Path, help="a virtual environment with mergekit")
    parser.add_argument("--merges", type=int, default=3, help="runs of mergekit, after the first pairs")
    parser.add_argument("--directory", type=Path, help="where to work; the system's temporary directory by default")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as home:
        found = measured(Path(home), asked)
    report(found)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def measured(home: Path, asked: argparse.Namespace) -> dict:
    load, src = os.getloadavg(), home / "src"
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(src, asked.layers))
    maker.start()  # a process of its own: what a child inherits counts in its peak memory
    maker.join()
    runs = {"growth": [], "cp": [], "mergekit": [], "inspect": []}
    for pair in range(asked.pairs):
        kinds = ["growth", "cp"] if pair % 2 else ["cp", "growth"]  # neither always comes first
        for kind in kinds + (["mergekit"] if asked.mergekit and pair < asked.merges else []):
            runs[kind].append(timed(kind, home, src, asked.mergekit))
    runs["inspect"] = [timed("inspect", home, src, None) for _ in range(5)]
    equal = same(home, src, asked.mergekit) if asked.mergekit else None
    return {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load": {"before": load, "after": os.getloadavg()}, "source_bytes": on_disk(src), "runs": runs,
            "tensors_equal_mergekit": equal}  # fmt: skip


def make(src: Path, layers: int) -> None:
    """Random bytes of small floats under a proper header: what they are worth does not matter here."""
    import torch

    from growth import checkpoint, families
    from growth.pieces import Computed

    config = {**CONFIG, "num_hidden_layers": layers}
    draw = torch.Generator().manual_seed(0)
    slots = families.of(config).slots(config, "model.").values()
    heads = [slot for slot in slots if slot.row.body or slot.row.name == "lm_head"]

    def one(slot):
        return lambda: torch.randn(slot.shape, generator=draw).mul_(0.02).bfloat16()

    checkpoint.write(src, config, [(s.name, Computed("BF16", s.shape, one(s))) for s in heads], shard_size="1GB")


def on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def timed(kind: str, home: Path, src: Path, venv: Path | None) -> dict:
    """One run from a quiet disk; the bytes it left, its wall time and its peak memory."""
    dst = home / "dst"
    dst.mkdir()
    os.sync()
    command = commands(home, src, dst, venv)[kind]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if kind == "mergekit":
        flush(dst)
    took = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{kind} failed: {said.decode()[-2000:]}")
    facts = {"seconds": took, "bytes": on_disk(dst), "peak_rss": usage.ru_maxrss * 1024}
    shutil.rmtree(dst)
    return facts


def commands(home: Path, src: Path, dst: Path, venv: Path | None) -> dict[str, list[str]]:
    plan = home / "plan.yaml"
    layers = json.loads((src / "config.json").read_text())["num_hidden_layers"]
    piece = {"sources": [{"model": str(src), "layer_range": [0, layers]}]}
    plan.write_text(json.dumps({"slices": [piece, piece], "merge_method": "passthrough", "dtype": "bfloat16"}))
    return {
        "growth": [str(BIN / "growth"), "stack", str(src), str(dst / "x2"), "--shard-size", "1GB"],
        "cp": ["bash", "-c", COPY, "cp", str(src), str(dst)],
        "mergekit": [str(venv / "bin" / "mergekit-yaml") if venv else "", str(plan), str(dst / "x2"),
                     "--out-shard-size", "1B", "--no-copy-tokenizer"],
        "inspect": [str(BIN / "growth"), "inspect", str(src)],
    }  # fmt: skip


def flush(dst: Path) -> None:
    """The others put their bytes on the disk themselves."""
    for file in dst.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def same(home: Path, src: Path, venv: Path) -> bool:
    """Whether both tools wrote the same tensors, byte for byte."""
    from growth import checkpoint
    from growth.ranges import blocks

    dst = home / "both"
    for kind in ("growth", "mergekit"):
        (dst / kind).mkdir(parents=True)
        subprocess.run(commands(home, src, dst / kind, venv)[kind], check=True, capture_output=True)
    ours, theirs = (checkpoint.open(dst / kind / "x2") for kind in ("growth", "mergekit"))
    equal = set(ours) == set(theirs) and all(
        all(a == b for a, b in zip(blocks(ours[name]), blocks(theirs[name]), strict=True)) for name in ours
    )
    shutil.rmtree(dst)
    return equal


def rate(run: dict) -> float:
    return run["bytes"] / run["seconds"]


def row(kind: str, runs: list[dict]) -> tuple[str, ...]:
    times, rates = median(r["seconds"] for r in runs), median(rate(r) for r in runs)
    return kind, f"{times:.2f} s", f"{size(rates)}/s", size(max(r["peak_rss"] for r in runs)), size(runs[0]["bytes"])


def report(found: dict) -> None:
    runs = found["runs"]
    ratios = sorted(rate(a) / rate(b) for a, b in zip(runs["growth"], runs["cp"], strict=True))
    rows = [row(kind, some) for kind, some in runs.items() if some]
    table(("tool", "median", "rate", "peak memory", "written"), rows, f"a source of {size(found['source_bytes'])}")
    print(
        f"growth against cp, bytes per second: median ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    if runs["mergekit"]:
        faster = median(r["seconds"] for r in runs["mergekit"]) / median(r["seconds"] for r in runs["growth"])
        print(f"against mergekit: {faster:.1f} times faster; tensors equal: {found['tensors_equal_mergekit']}")
    print(f"load {found['load']['before'][0]:.1f} to {found['load']['after'][0]:.1f};"
          f" all runs {seconds(sum(r['seconds'] for some in runs.values() for r in some))}")  # fmt: skip


if __name__ == "__main__":
    main()
