"""What masks must keep on every ZeRO stage, in fp32 and bf16; one process a rank runs them all, result as JSON.

The engine gives back what stage 3 patches, so that the stages can follow each other in one process.
"""

from __future__ import annotations

import copy
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distill import snapshot, world
from distill.engine import KEYS, Engine
from distill.schedules import Progress
from distill.sparsity import semi_structured
from distill.sparsity.choosing import largest, rewired
from distill.sparsity.masking import Masking
from distill.sparsity.rules import Static
from growth.errors import UserError

BATCH, LR, STEPS = 8, 0.01, 5
OPTIM = {"batch": BATCH, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
RESUMED = [(0, "fp32"), *((stage, "bf16") for stage in range(4))]  # bare torch, and what has a working copy
SPOILT = "pairs.1.0.weight"


class Net(nn.Module):
    """Three pairs of matrices of 315 weights, an odd number, so that no shard ends where a tensor does."""

    def __init__(self, outer: int = 15, inner: int = 21):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        pair = nn.Linear(outer, inner), nn.Linear(inner, outer)
        self.pairs = nn.ModuleList(nn.ModuleList(copy.deepcopy(pair)) for _ in range(3))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=g))

    def forward(self, x, y):
        x = x.to(self.pairs[0][0].bias.dtype)
        for up, down in self.pairs:
            x = x + down(torch.tanh(up(x)))
        return (x.float() - y).square().sum()


def rows(step: int, first: int, count: int, wide: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return tuple(torch.randn(BATCH, wide, generator=g)[first : first + count] for _ in range(2))


def masks(net: nn.Module) -> dict[str, torch.Tensor]:
    """A quarter of each matrix."""
    g = torch.Generator().manual_seed(7)
    return {name: torch.rand(p.shape, generator=g) < 0.25 for name, p in net.named_parameters() if p.dim() > 1}


class Changes(Static):
    """After three steps live weights move to where gradients are largest, after four the larger half of all stays."""

    def listens(self, progress):
        return progress.step == 2

    def due(self, progress):
        return progress.step in (3, 4)

    def changed(self, progress, weights, dead, heard):
        if progress.step == 4:
            return largest(weights, dead, 200)
        scores = {name: g.abs() for name, g in heard().items()}
        return {name: rewired(weight, dead[name], scores[name], 0.3) for name, weight in weights()}


class Run:
    def __init__(self, stage: int, precision: str):
        self.net = Net()
        dict(self.net.named_parameters())[SPOILT].register_hook(self._spoil)
        hold = ("bools", "bits")[stage % 2]
        self.masking = Masking(self.net, masks(self.net), Changes(), check_every=1, hold=hold)
        spec = SimpleNamespace(zero=stage, precision=precision, deepspeed={})
        self.engine = Engine(self.net, spec, SimpleNamespace(**OPTIM), 2)
        self.norms, self.dead, self.moved = [], 0, True

    def _spoil(self, gradient):
        """A dead weight whose gradient is not a number."""
        found = gradient.clone()
        found.view(-1)[self.masking.dead[SPOILT].flatten().nonzero()[0]] = torch.nan
        return found

    def step(self, step: int) -> None:
        self.masking.before(Progress(step))
        for m in range(world.rank(), BATCH // 2, world.size()):
            self.engine.backward(self.engine(*rows(step, 2 * m, 2)) / BATCH)
        self.norms.append(self.engine.step(LR))
        self.masking.after(self.engine, Progress(step + 1))

    def watched(self, step: int) -> None:
        """A step, and what of it is not zero where it should be, or zero where it should not."""
        before = dict((n, w.clone()) for n, w in self.engine.masters())
        self.step(step)
        dead = self.masking.dead
        copies = [self.engine.working(dead), *(self.engine.state(key) for key in KEYS)]
        self.dead += sum(int(w[dead[name]].ne(0).sum()) for copy in copies for name, w in copy if name in dead)
        self.moved &= all(bool((w != before[n])[~dead[n]].any()) for n, w in self.engine.masters() if n in dead)

    def state(self) -> dict:
        return {f"{key}.{name}": tensor.clone() for key in KEYS for name, tensor in self.engine.state(key)}


def exact(stage: int, precision: str) -> dict:
    run = Run(stage, precision)
    for step in range(STEPS):
        run.watched(step)
    weights = torch.cat([w.flatten() for _, w in run.engine.state("master")])
    found = {"dead": run.dead, "moved": run.moved, "norms": run.norms, "weights": weights.tolist()}
    run.engine.close()
    return found


def interrupted(cell: Path, stage: int, precision: str) -> None:
    """Three steps, masks have changed, a snapshot, and two more: how that ends is written beside it."""
    run = Run(stage, precision)
    for step in range(3):
        run.step(step)
    snapshot.save(cell, 3, run.engine, {}, {}, beside=run.masking.state())
    for step in range(3, STEPS):
        run.step(step)
    end = run.state()
    world.first(lambda: save_file(end, cell / "end.safetensors"))
    run.engine.close()


def resumed(cell: Path, stage: int, precision: str) -> dict:
    """A new run that has read the snapshot: whether it has what was saved, and how far from the other it ends."""
    run, path = Run(stage, precision), snapshot.latest(cell)
    snapshot.restore(path, run.engine, {})
    run.masking.load(partial(snapshot.beside, path))
    run.masking.check(run.engine)
    saved = {f"{key}.{name}": t for key in KEYS for name, t in load_file(path / f"{key}.safetensors").items()}
    restored = run.state()
    for step in range(3, STEPS):
        run.step(step)
    end, found = load_file(cell / "end.safetensors"), run.state()
    run.engine.close()
    return {
        "whole": all(torch.equal(saved[name], restored[name]) for name in saved),
        "far": max(float((end[name] - found[name]).abs().max()) for name in end),
    }


def guarded(stage: int, precision: str) -> str:
    """What the guard says of one weight that came back."""
    run = Run(stage, precision)
    name = "pairs.2.1.weight"

    def read(other, key):
        if (other, key) != (name, "master"):
            return None
        weight = dict((n, w.clone()) for n, w in run.engine.state("master"))[name]
        weight.view(-1)[run.masking.dead[name].flatten().nonzero()[0]] = 0.5
        return weight

    run.engine.load_state(read, lambda phases: 0)
    try:
        run.masking.check(run.engine)
        return ""
    except UserError as error:
        return str(error)
    finally:
        run.engine.close()


def skips(stage: int, product) -> list[float]:
    """The weights after three steps with 2:4 masks in fp32; a `product` that skips zeros takes the place of layers."""
    net, g = Net(16, 24), torch.Generator().manual_seed(7)
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    drawn = {name: torch.rand(*p.shape[:1], p.shape[1] // 4, 4, generator=g) for name, p in weights.items()}
    alive = {n: torch.zeros_like(d).bool().scatter_(-1, d.argsort()[..., :2], True) for n, d in drawn.items()}
    Masking(net, {name: mask.flatten(-2) for name, mask in alive.items()})
    if product:
        semi_structured.place(net, weights, product)
    spec = SimpleNamespace(zero=stage, precision="fp32", deepspeed={})
    engine = Engine(net, spec, SimpleNamespace(**OPTIM), 2)
    for step in range(3):
        for m in range(world.rank(), BATCH // 2, world.size()):
            engine.backward(engine(*rows(step, 2 * m, 2, 16)) / BATCH)
        engine.step(LR)
    found = torch.cat([w.flatten() for _, w in engine.state("master")])
    engine.close()
    return found.tolist()


def skipping(x, W, bias):
    """As a kernel for 2:4 does: of every four weights along the sum two, wherever they stand."""
    groups = W.unflatten(-1, (-1, 4))
    places = groups.ne(0).byte().argsort(dim=-1, descending=True, stable=True)[..., :2]
    held = torch.zeros_like(groups).scatter(-1, places, groups.gather(-1, places))
    return nn.functional.linear(x, held.flatten(-2), bias)


def main() -> None:
    torch.set_num_threads(1)
    place, ranks = Path(sys.argv[1]), world.size()
    cells = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    for stage, precision in cells if ranks == 1 else RESUMED:
        interrupted(place / f"{ranks} {stage} {precision}", stage, precision)
    own = {cell: resumed(place / f"{ranks} {cell[0]} {cell[1]}", *cell) for cell in RESUMED}
    others = {stage: resumed(place / f"1 {(stage + 1) % 4} fp32", stage, "fp32") for stage in range(4)}
    print(
        json.dumps(
            {
                f"{stage} {precision}": exact(stage, precision)
                | {"resumes": own.get((stage, precision)), "crosses": others[stage]}
                | ({"guarded": guarded(stage, precision)} if precision == "bf16" else {})
                for stage, precision in cells
            }
            | {"dense": skips(0, None), "skipping": skips(3, skipping)}
        )
    )


if __name__ == "__main__":
    main()
