"""Relation KL: ours against the plain formula, in time, extra memory and error, and both against the length.

    python benchmarks/relation_kl.py [--only times|lengths] [--threads 1] [--repeats 3]
    python benchmarks/relation_kl.py --device cuda   # lengths alone, bf16, the fused kernel; no GPU has run this yet

Loss and gradient are compared in float64 before anything else. Times are interleaved, plain / ours / plain / ours,
forward and backward, minimum of the repeats; CPU seconds beside them, for a shared machine disturbs them less. Extra
memory is the rise of the process's peak resident size (on a GPU: of the allocator's) during the call, in a process of
its own. The floor of products counts them alone, 2 (d_t + 3 d_s) FLOP a score, at the matrix rate measured here; that
of memory traffic counts reading all vectors and writing the gradient once, at the rate of a copy measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import quantiles

import torch
import torch.nn.functional as F

from distill.evaluate.machine import facts, memory
from distill.objectives import relation_kl
from distill.report.canvas import LINES, figure
from growth.console import table
from growth.files import write_json

SUFFIX = {"cpu": "", "cuda": "_gpu"}  # of results
COLOURS = (LINES[1], LINES[0], LINES[2])
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

    @property
    def vectors(self) -> int:
        """Numbers read and written at least: both models' vectors and the gradient."""
        return self.batch * self.length * (self.teacher + 2 * self.student)


PAPER = Shape(4, 1024, 48, 768, 384)
RECIPE = Shape(16, 128, 12, 384, 384)
PACKED = Shape(16, 128, 12, 384, 384, documents=8)
EXACT = Shape(2, 96, 12, 96, 48, documents=3)
LENGTHS = {"cpu": (128, 256, 512, 1024, 2048, 4096), "cuda": (512, 1024, 2048, 4096)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
PLAIN_TENSORS = 5  # of the size of the scores that the plain formula holds at once (measured)


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


FORMS = {"plain": plain, "blocks": partial(relation_kl, how="blocks"), "ours": relation_kl}
RIVALS = {"cpu": ("plain", "ours"), "cuda": ("plain", "blocks", "ours")}  # on a CPU blocks are what ours is


def draw(shape: Shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.randn(shape.batch, shape.length, w, generator=generator, dtype=torch.float32).to(device, dtype)
        for w in (shape.teacher, shape.student)
    )
    segments = torch.arange(shape.length, device=device) * shape.documents // shape.length + 1
    return teacher, student.requires_grad_(), segments.expand(shape.batch, -1).contiguous(), shape.heads


def step(form: str, inputs):
    """Loss and gradient of a forward and a backward pass."""
    inputs[1].grad = None
    loss = FORMS[form](*inputs)
    loss.backward()
    return loss.detach(), inputs[1].grad


def timed(form: str, inputs) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wait(inputs[0].device)
    wall, cpu = time.perf_counter(), time.process_time()
    step(form, inputs)
    wait(inputs[0].device)
    return time.perf_counter() - wall, time.process_time() - cpu


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def agreement(device: str) -> dict:
    """Largest differences to the plain formula in float64; refuses to go on where they are more than rounding."""
    dtype, most = (torch.float64, 1e-12) if device == "cpu" else (DTYPES[device], 2e-2)
    teacher, student, *rest = draw(EXACT, dtype)
    exact = step("plain", (teacher.double(), student.detach().double().requires_grad_(), *rest))
    ours = step("ours", draw(EXACT, dtype, device))
    gaps = [float((a.double().cpu() - b).abs().max() / b.abs().max()) for a, b in zip(ours, exact, strict=True)]
    assert max(gaps) < most, gaps
    return dict(zip(("loss", "gradient"), gaps, strict=True))


def race(shape: Shape, dtype, repeats: int) -> dict:
    inputs = draw(shape, dtype)
    for form in RIVALS["cpu"]:
        step(form, inputs)
    runs = {form: [] for form in RIVALS["cpu"]}
    for _ in range(repeats):
        for form in runs:
            runs[form].append(timed(form, inputs))
    result = {"shape": str(shape), "dtype": str(dtype).removeprefix("torch."), "floor": shape.flop / matrix_rate()}
    for clock, seconds in (("wall", 0), ("cpu", 1)):
        times = {form: sorted(run[seconds] for run in runs[form]) for form in runs}
        result[clock] = {form: {"best": t[0], "quartiles": quantiles(t, n=4)[::2]} for form, t in times.items()}
        result[clock]["faster"] = times["plain"][0] / times["ours"][0]
    return result


def matrix_rate(device="cpu", dtype=torch.float32, side=1024) -> float:
    """FLOP/s of a large product on these threads."""
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / best_of(5, lambda: a @ a, a.device)


def copy_rate(device) -> float:
    """Bytes/s, read and written."""
    a, b = (torch.randn(2**26, device=device) for _ in range(2))
    return 2 * a.nbytes / best_of(5, lambda: b.copy_(a), a.device)


def best_of(repeats: int, run, device) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def measured(form: str, shape: Shape, options) -> dict:
    """Extra MiB and seconds of a call, in a process of its own."""
    call = [sys.executable, __file__, "--threads", str(options.threads), "--device", options.device]
    call += ["--repeats", str(options.repeats if shape.length <= 1024 else 1)]
    call += ["--probe", form, json.dumps(asdict(shape))]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def probe(form: str, shape: Shape, options) -> None:
    dtype, device = DTYPES[options.device], options.device
    step(form, draw(replace(shape, batch=1, length=16), dtype, device))  # thread pools, libraries, compiled kernels
    inputs = draw(shape, dtype, device)
    before, runs = peak_begins(device), [timed(form, inputs)]
    mib = peak(device) - before
    runs += [timed(form, inputs) for _ in range(options.repeats - 1)]
    print(json.dumps({"mib": mib, "wall": min(wall for wall, _ in runs), "cpu": min(cpu for _, cpu in runs)}))


def peak_begins(device: str) -> float:
    """MiB held now, from where the peak begins anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> float:
    """MiB held at most so far: allocated on a GPU, resident elsewhere (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def slope(points: dict[int, float]) -> float:
    """Of the logarithm of what is measured against that of the length, by least squares."""
    x, y = torch.tensor(list(points)).double().log(), torch.tensor(list(points.values())).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def times(options) -> list[dict]:
    small = [race(shape, torch.bfloat16, 10 * options.repeats) for shape in (RECIPE, PACKED)]
    return [race(PAPER, torch.float32, options.repeats), *small]


def lengths(options) -> dict:
    """Of every form at every length where the scores it holds take at most a quarter of the memory."""
    device, dtype = options.device, DTYPES[options.device]
    most = (torch.cuda.mem_get_info()[1] if device == "cuda" else memory()) / 4
    flops, traffic = matrix_rate(device, dtype, side=4096 if device == "cuda" else 1024), copy_rate(device)
    found, predicted, floors = {form: {} for form in RIVALS[device]}, {}, {}
    for n in LENGTHS[device]:
        shape = replace(PAPER, length=n)
        predicted[n] = PLAIN_TENSORS * shape.scores * dtype.itemsize
        floors[n] = {"products": shape.flop / flops, "traffic": shape.vectors * dtype.itemsize / traffic}
        for form in found:
            if form != "plain" or predicted[n] <= most:
                found[form][n] = measured(form, shape, options)
                print(f"{n}: {form} {found[form][n]}", flush=True)
    case = {"shape": str(PAPER), "device": device, "dtype": str(dtype)}
    return case | {"found": found, "predicted": predicted, "floors": floors}


def show_times(races: list[dict]) -> None:
    columns = ["shape", "dtype", "plain", "ours", "times faster", "by CPU time", "floor", "share of it"]
    table(columns, [
        (r["shape"], r["dtype"], *(f"{r['wall'][form]['best'] * 1e3:.1f} ms" for form in RIVALS["cpu"]),
         f"{r['wall']['faster']:.1f}", f"{r['cpu']['faster']:.1f}", f"{r['floor'] * 1e3:.1f} ms",
         f"{r['floor'] / r['wall']['ours']['best']:.0%}") for r in races
    ])  # fmt: skip


def show_lengths(result: dict) -> None:
    clock = "cpu" if result["device"] == "cpu" else "wall"
    columns = ["length", "form", "extra peak", "of plain's", f"{clock} seconds", "times faster", "products", "traffic"]
    table(columns, [_line(result, n, form, clock) for n in result["floors"] for form in result["found"]])
    print("products, traffic: share of their floors in wall time; (predicted): the plain formula cannot run here")
    for form, points in result["found"].items():
        slopes = [slope({n: point[key] for n, point in points.items()}) for key in ("mib", clock)]
        print(f"{form}: slope on log-log axes {slopes[0]:.2f} of memory, {slopes[1]:.2f} of time")
    curves(RESULTS / f"relation_length{SUFFIX[result['device']]}.png", result, clock)


def _line(result: dict, n: int, form: str, clock: str) -> tuple:
    here, plain = (result["found"][name].get(n) for name in (form, "plain"))
    if not here:
        return n, form, f"({result['predicted'][n] / 2**20:,.0f} MiB)", *["-"] * 5
    share = f"{here['mib'] / plain['mib']:.1%}" if plain else "-"
    faster = f"{plain[clock] / here[clock]:.1f}" if plain else "-"
    floors = (f"{floor / here['wall']:.1%}" for floor in result["floors"][n].values())
    return n, form, f"{here['mib']:,.0f} MiB", share, f"{here[clock]:.3f}", faster, *floors


def curves(path: Path, result: dict, clock: str) -> None:
    """Memory and time against the length; the plain formula is dashed where it was not run."""
    with figure(path, 2, width=3.6, height=2.9) as panels:
        for panel, key, unit in zip(panels, ("mib", clock), ("extra memory, MiB", f"{clock} seconds"), strict=True):
            for (form, points), colour in zip(result["found"].items(), COLOURS, strict=False):
                panel.plot(list(points), [p[key] for p in points.values()], "o-", ms=4, color=colour, label=form)
            if key == "mib":
                mib = {n: size / 2**20 for n, size in result["predicted"].items()}
                panel.plot(list(mib), list(mib.values()), "--", color=COLOURS[0], lw=1, label="plain, predicted")
            panel.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel=unit)
            panel.set_xticks(list(result["floors"]), list(map(str, result["floors"])))
            panel.minorticks_off()
        panels[0].legend(frameon=False, fontsize=8)


PARTS = {"times": (times, show_times), "lengths": (lengths, show_lengths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--device", choices=list(RIVALS), default="cpu", help="cuda: lengths alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.probe:
        return probe(options.probe[0], Shape(**json.loads(options.probe[1])), options)
    exact = agreement(options.device)
    print(f"{EXACT}: loss differs from float64 by {exact['loss']:.1e} of it, gradient by {exact['gradient']:.1e}")
    for part in [options.only] if options.only else PARTS if options.device == "cpu" else ["lengths"]:
        measure, show = PARTS[part]
        found = measure(options)
        show(found)
        context = {**facts(), "threads": options.threads, "load": os.getloadavg()[0]}
        path = RESULTS / f"relation_kl_{part}{SUFFIX[options.device]}.json"
        write_json(path, {"agreement": exact, part: found, **context})


if __name__ == "__main__":
    main()
