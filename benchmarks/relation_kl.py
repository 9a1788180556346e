"""Relation KL: ours against the plain formula, in time, extra memory and error; our memory against the length.

    python benchmarks/relation_kl.py [--only times|memory] [--threads 1] [--repeats 3]

Loss and gradient are compared in float64 before anything else. Times are interleaved, plain / ours / plain / ours,
forward and backward, minimum of the repeats, interquartile range in the file; CPU seconds beside them, for a shared
machine disturbs them less. Extra memory is the rise of the process's peak resident size during the call, in a process
of its own. The floor counts the products alone, 2 (d_t + 3 d_s) FLOP a score, at the matrix rate measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import quantiles

import torch
import torch.nn.functional as F

from distill.evaluate.machine import facts
from distill.objectives import relation_kl
from growth.console import table
from growth.files import write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    teacher: int  # width
    student: int
    documents: int = 1  # of a row

    def __str__(self) -> str:
        packed = f", {self.documents} documents a row" if self.documents > 1 else ""
        return f"{self.batch}x{self.length}, {self.heads} heads, {self.teacher} -> {self.student}{packed}"

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.length**2

    @property
    def flop(self) -> int:
        """Teacher's scores, student's scores, and two products for the gradient."""
        return 2 * (self.teacher + 3 * self.student) // self.heads * self.scores // self.documents


PAPER = Shape(4, 1024, 48, 768, 384)
RECIPE = Shape(16, 128, 12, 384, 384)
PACKED = Shape(16, 128, 12, 384, 384, documents=8)
EXACT = Shape(2, 96, 12, 96, 48, documents=3)
LENGTHS = (256, 512, 1024, 2048, 4096)


def plain(teacher, student, segments, heads):
    """The formula as it is written: scores [B, A, T, T] and autograd."""
    here = segments != 0
    seen = ((segments[:, :, None] == segments[:, None]) & here[:, None])[:, None]  # [B, 1, T, T]
    p, q = (F.log_softmax(_scores(x, heads).masked_fill(~seen, -1e30), -1) for x in (teacher.detach(), student))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1) * here[:, None]  # [B, A, T]
    numbers = F.one_hot(segments).to(kl.dtype)[..., 1:]  # [B, T, documents]
    each = torch.einsum("bat,btn->bn", kl, numbers) / (heads * numbers.sum(1)).clamp(min=1)
    return each.sum() / (numbers.sum(1) > 0).sum()


def _scores(x, heads):
    x = x.unflatten(2, (heads, -1)).transpose(1, 2)  # [B, A, T, d]
    return x @ x.mT / x.shape[-1] ** 0.5


FORMS = {"plain": plain, "ours": relation_kl}


def draw(shape: Shape, dtype):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.randn(shape.batch, shape.length, w, generator=generator, dtype=torch.float32).to(dtype)
        for w in (shape.teacher, shape.student)
    )
    segments = torch.arange(shape.length) * shape.documents // shape.length + 1
    return teacher, student.requires_grad_(), segments.expand(shape.batch, -1).contiguous(), shape.heads


def step(form: str, inputs):
    """Loss and gradient of a forward and a backward pass."""
    inputs[1].grad = None
    loss = FORMS[form](*inputs)
    loss.backward()
    return loss.detach(), inputs[1].grad


def timed(form: str, inputs) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    step(form, inputs)
    return time.perf_counter() - wall, time.process_time() - cpu


def agreement(shape: Shape) -> dict:
    """Largest differences between both forms in float64; refuses to go on where they disagree."""
    inputs = draw(shape, torch.float64)
    (loss, gradient), (other, expected) = step("ours", inputs), step("plain", inputs)
    found = {"loss": float((loss - other).abs()), "gradient": float((gradient - expected).abs().max())}
    assert max(found.values()) < 1e-12, found
    return found


def race(shape: Shape, dtype, repeats: int) -> dict:
    inputs = draw(shape, dtype)
    for form in FORMS:
        step(form, inputs)
    runs = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form in FORMS:
            runs[form].append(timed(form, inputs))
    result = {"shape": str(shape), "dtype": str(dtype).removeprefix("torch."), "floor": shape.flop / matrix_rate()}
    for clock, seconds in (("wall", 0), ("cpu", 1)):
        times = {form: sorted(run[seconds] for run in runs[form]) for form in FORMS}
        result[clock] = {form: {"best": t[0], "quartiles": quantiles(t, n=4)[::2]} for form, t in times.items()}
        result[clock]["faster"] = times["plain"][0] / times["ours"][0]
    return result


def matrix_rate() -> float:
    """FLOP/s of a large float32 product on these threads."""
    a, best = torch.randn(1024, 1024), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


def extra_memory(form: str, shape: Shape, threads: int) -> float:
    """MiB that a call adds to the peak of a process of its own."""
    call = [sys.executable, __file__, "--threads", str(threads), "--probe", form, json.dumps(asdict(shape))]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def probe(form: str, shape: Shape) -> None:
    step(form, draw(Shape(1, 8, 1, 8, 8), torch.float32))  # thread pools and libraries are not the loss's
    inputs = draw(shape, torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    step(form, inputs)
    print(peak() - before)


def peak() -> float:
    """MiB of resident memory at most so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def slope(points: dict[int, float]) -> float:
    """Of the logarithm of memory against that of the length, by least squares."""
    x, y = torch.tensor(list(points)).double().log(), torch.tensor(list(points.values())).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def times(threads: int, repeats: int) -> list[dict]:
    small = [race(shape, torch.bfloat16, 10 * repeats) for shape in (RECIPE, PACKED)]
    return [race(PAPER, torch.float32, repeats), *small]


def memory(threads: int, repeats: int) -> dict:
    paper = {form: extra_memory(form, PAPER, threads) for form in FORMS}
    lengths = {n: extra_memory("ours", replace(PAPER, batch=1, length=n), threads) for n in LENGTHS}
    return {"paper": paper, "lengths": lengths, "slope": slope(lengths)}


def show_times(races: list[dict]) -> None:
    columns = ["shape", "dtype", "plain", "ours", "times faster", "by CPU time", "floor", "share of it"]
    table(columns, [
        (r["shape"], r["dtype"], *(f"{r['wall'][form]['best'] * 1e3:.1f} ms" for form in FORMS),
         f"{r['wall']['faster']:.1f}", f"{r['cpu']['faster']:.1f}", f"{r['floor'] * 1e3:.1f} ms",
         f"{r['floor'] / r['wall']['ours']['best']:.0%}") for r in races
    ])  # fmt: skip


def show_memory(found: dict) -> None:
    plain_mib, ours = found["paper"]["plain"], found["paper"]["ours"]
    table(["extra peak memory", "plain", "ours", "share"],
          [(str(PAPER), f"{plain_mib:.0f} MiB", f"{ours:.0f} MiB", f"{ours / plain_mib:.1%}")])  # fmt: skip
    lengths = [f"{mib:.0f} MiB" for mib in found["lengths"].values()]
    table(["ours at length", *map(str, found["lengths"]), "slope"], [("batch 1", *lengths, f"{found['slope']:.2f}")])


PARTS = {"times": (times, show_times), "memory": (memory, show_memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.probe:
        return probe(options.probe[0], Shape(**json.loads(options.probe[1])))
    exact = agreement(EXACT)
    print(f"float64, {EXACT}: loss differs by {exact['loss']:.1e}, gradient by {exact['gradient']:.1e}")
    for part in [options.only] if options.only else PARTS:
        measure, show = PARTS[part]
        found = measure(options.threads, options.repeats)
        show(found)
        context = {**facts(), "threads": options.threads, "load": os.getloadavg()[0]}
        write_json(RESULTS / f"relation_kl_{part}.json", {"agreement": exact, part: found, **context})


if __name__ == "__main__":
    main()
