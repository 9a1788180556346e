"""Forward KL and JSD from hidden states and heads: ours against the plain formula, TRL and Liger where installed.

    python benchmarks/divergence.py [--only times|memory|chunks] [--threads 1] [--repeats 3] [--cuda]

Loss and gradient are compared before anything is timed: in float64 with the plain formula; the losses of all forms in
the dtype of the race. Times are interleaved, forward and backward, minimum of the repeats, CPU seconds beside them, for
a shared machine disturbs them less. Extra memory is the rise of a process's peak resident size during the call, in a
process of its own; on CUDA that of the allocator. The floor counts products alone, 2 N V (3 d_s + d_t) FLOP, at the
matrix rate measured here. Peers run uncompiled on a CPU; Liger with its own chunks of 1,024 rows and with 128. With
--cuda the shape is that of Liger's published figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles

import torch
import torch.nn.functional as F
from relation_kl import peak, slope

from distill.evaluate.machine import facts
from distill.heads import Logits
from distill.objectives import divergence, token_sum
from growth.console import table
from growth.files import write_json

RESULTS = Path(__file__).parent / "results"
BETA = {"forward_kl": 0.0, "jsd": 0.5}  # as TRL and Liger name the kinds


@dataclass(frozen=True)
class Shape:
    rows: int
    vocabulary: int
    student: int  # hidden size
    teacher: int

    def __str__(self) -> str:
        return f"{self.rows} rows, vocabulary {self.vocabulary}, {self.teacher} -> {self.student}"

    @property
    def flop(self) -> int:
        return 2 * self.rows * self.vocabulary * (3 * self.student + self.teacher)


ISSUE, LIGER = Shape(1024, 32_000, 256, 384), Shape(8192, 128_256, 2048, 4096)
EXACT = Shape(48, 32_000, 256, 384)
ROWS = (512, 1024, 2048, 4096)
CHUNKS = (32, 64, 128, 192, 256, 512)


def plain(h, w, t, u, beta):
    """The formula as it is written, on whole logits in float32 or float64."""
    wide = torch.promote_types(h.dtype, torch.float32)
    q, p = (F.log_softmax((x @ y.T).to(wide), -1) for x, y in ((h, w), (t, u)))
    if beta == 0:
        return F.kl_div(q, p, log_target=True, reduction="batchmean")
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    both = (F.kl_div(m, x, log_target=True, reduction="batchmean") for x in (p, q))
    return sum(share * kl for share, kl in zip((beta, 1 - beta), both, strict=True))


def ours(h, w, t, u, beta):
    return divergence(Logits(h, w), Logits(t, u), "jsd", beta=beta)


def trl(h, w, t, u, beta):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(h, w, None, t, u, None, beta)[0].mean()


def liger(h, w, t, u, beta, chunk=1024):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta, compiled=h.is_cuda, chunk_size=chunk)
    return loss(h, w, t, u, torch.zeros(len(h), dtype=torch.long, device=h.device))


def liger_128(*given):
    return liger(*given, chunk=128)


FORMS = {"plain": plain, "ours": ours}
FORMS |= {"trl": trl} if find_spec("trl") else {}
FORMS |= {"liger": liger, "liger 128": liger_128} if find_spec("liger_kernel") else {}


def draw(shape: Shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    sizes = [(n, width) for width in (shape.student, shape.teacher) for n in (shape.rows, shape.vocabulary)]
    h, w, t, u = (
        (torch.randn(*size, generator=generator) * (0.1 if size[0] == shape.vocabulary else 1)).to(device, dtype)
        for size in sizes
    )
    return h.requires_grad_(), w.requires_grad_(), t, u


def step(form: str, inputs, kind: str):
    """Loss and gradients of a forward and a backward pass."""
    inputs[0].grad = inputs[1].grad = None
    loss = FORMS[form](*inputs, BETA[kind])
    loss.backward()
    return loss.detach(), inputs[0].grad, inputs[1].grad


def timed(run: Callable, device: str) -> tuple[float, float]:
    """Wall and CPU seconds; on CUDA both are those of the wall."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    passed = time.perf_counter() - wall
    return passed, passed if device == "cuda" else time.process_time() - cpu


def matrix_rate(dtype, device: str) -> float:
    """FLOP/s of a large product, by CPU seconds."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(timed(lambda: a @ a, device)[1] for _ in range(8))


def agreement(shape: Shape, kind: str) -> dict:
    """Largest differences between plain and ours in float64; refuses to go on where they disagree."""
    inputs = draw(shape, torch.float64)
    pairs = zip(("loss", "hidden", "head"), step("ours", inputs, kind), step("plain", inputs, kind), strict=True)
    found = {name: float((a - b).abs().max()) for name, a, b in pairs}
    assert max(found.values()) < 1e-10, found
    return found


def race(shape: Shape, dtype, kind: str, repeats: int, device: str) -> dict:
    inputs, losses = draw(shape, dtype, device), {}
    for form in FORMS:
        losses[form] = float(step(form, inputs, kind)[0])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # Liger and plain round logits to bfloat16
    assert all(abs(loss / losses["plain"] - 1) < tolerance for loss in losses.values()), losses
    runs = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form in FORMS:
            runs[form].append(timed(partial(step, form, inputs, kind), device))
    floor = shape.flop / matrix_rate(dtype, device)
    result = {"shape": str(shape), "kind": kind, "dtype": str(dtype), "losses": losses, "floor": floor}
    for clock, seconds in (("wall", 0), ("cpu", 1)):
        times = {form: sorted(run[seconds] for run in runs[form]) for form in FORMS}
        result[clock] = {form: {"best": t[0], "quartiles": quantiles(t, n=4)[::2]} for form, t in times.items()}
    return result


def extra_memory(form: str, shape: Shape, options, chunk: int | None = None) -> float:
    """MiB that a call adds to the peak of a process of its own."""
    call = [sys.executable, __file__, "--threads", str(options.threads), *(["--cuda"] if options.cuda else [])]
    call += ["--probe", form, json.dumps(asdict(shape)), str(chunk or token_sum.CHUNK)]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1])


def probe(form: str, shape: Shape, dtype, device: str) -> float:
    step(form, draw(Shape(8, 64, 8, 8), dtype, device), "forward_kl")  # thread pools and libraries are not the loss's
    inputs = draw(shape, dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(form, inputs, "forward_kl")
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    step(form, inputs, "forward_kl")
    return peak() - before


def times(options) -> list[dict]:
    return [race(*options.shape, kind, options.repeats, options.device) for kind in BETA]


def memory(options) -> dict:
    shape, _ = options.shape
    forms = {form: extra_memory(form, shape, options) for form in FORMS}
    rows = {n: extra_memory("ours", replace(shape, rows=n), options) for n in ROWS}
    return {"shape": str(shape), "forms": forms, "rows": rows, "slope": slope(rows)}


def chunks(options) -> dict:
    """CPU seconds and memory with chunks of so many rows."""
    shape, dtype = options.shape
    inputs, found = draw(shape, dtype, options.device), {chunk: [] for chunk in CHUNKS}
    name = "CHUNK_ON_A_GPU" if options.cuda else "CHUNK"
    for _ in range(options.repeats + 1):
        for chunk in CHUNKS:
            setattr(token_sum, name, chunk)
            found[chunk].append(timed(partial(step, "ours", inputs, "forward_kl"), options.device)[1])
    return {
        chunk: {"seconds": min(runs[1:]), "memory": extra_memory("ours", shape, options, chunk)}
        for chunk, runs in found.items()
    }


def show_times(races: list[dict]) -> None:
    for r in races:
        best, floor = r["wall"]["plain"]["best"], r["floor"]
        rows = [
            (form, f"{r['wall'][form]['best'] * 1e3:.0f} ms", f"{r['wall'][form]['best'] / best:.2f}",
             f"{r['cpu'][form]['best'] * 1e3:.0f} ms", f"{r['cpu'][form]['best'] / r['cpu']['plain']['best']:.2f}",
             f"{floor / r['cpu'][form]['best']:.0%}")
            for form in FORMS
        ]  # fmt: skip
        print(f"{r['kind']}, {r['shape']}, floor {floor * 1e3:.0f} ms")
        table(["form", "wall", "of plain", "CPU", "of plain", "floor is"], rows)


def show_memory(found: dict) -> None:
    most = found["forms"]["plain"]
    rows = [(form, f"{mib:.0f} MiB", f"{mib / most:.1%}") for form, mib in found["forms"].items()]
    table(["extra peak memory", found["shape"], "of plain"], rows)
    table(["ours at rows", *map(str, found["rows"]), "slope"],
          [("", *(f"{mib:.0f} MiB" for mib in found["rows"].values()), f"{found['slope']:.2f}")])  # fmt: skip


def show_chunks(found: dict) -> None:
    rows = [(str(n), f"{x['seconds'] * 1e3:.0f} ms", f"{x['memory']:.0f} MiB") for n, x in found.items()]
    table(["rows of a chunk", "time", "extra peak memory"], rows)


PARTS = {"times": (times, show_times), "memory": (memory, show_memory), "chunks": (chunks, show_chunks)}


def versions() -> dict:
    found = {}
    for name in ("trl", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cuda", action="store_true", help="bfloat16, the shape of Liger's published figures")
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.device = "cuda" if options.cuda else "cpu"
    options.shape = (LIGER, torch.bfloat16) if options.cuda else (ISSUE, torch.float32)
    if options.probe:
        form, shape, token_sum.CHUNK = options.probe[0], json.loads(options.probe[1]), int(options.probe[2])
        return print(probe(form, Shape(**shape), options.shape[1], options.device))
    exact = {kind: agreement(EXACT, kind) for kind in BETA}
    print(f"float64, {EXACT}: ours differs from plain by", exact)
    for part in [options.only] if options.only else PARTS:
        measure, show = PARTS[part]
        found = measure(options)
        show(found)
        context = {**facts(), "peers": versions(), "threads": options.threads, "load": os.getloadavg()[0]}
        name = f"divergence_{part}{'_cuda' if options.cuda else ''}.json"
        write_json(RESULTS / name, {"agreement": exact, part: found, **context})


if __name__ == "__main__":
    main()
