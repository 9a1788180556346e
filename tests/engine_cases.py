"""All that is asked of the engine on one ZeRO stage, in one process a rank: `engine_cases.py STAGE`, result as JSON.

DeepSpeed's stage 3 patches the process, hence one stage a process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import tiny
import torch

from distill import projections, snapshot, world
from distill.engine import KEYS, Engine, NonFinite, placed
from distill.lesson import Data, Lesson, freeze_unreachable
from distill.models import freeze
from distill.objectives import OBJECTIVES
from distill.teachers.targets import Online, Targets
from growth.errors import UserError
from growth.files import read_json, write_json

STAGE = int(sys.argv[1]) if __name__ == "__main__" else 0
LENGTH, BATCH, LR, WIDE = 24, 8, 0.01, 54
OPTIM = {"batch": BATCH, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}

LET_GO = {  # of parameters at once, as ZeRO-3 does of big ones
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}


class Rows:
    """Packed rows made from their position alone: two or three documents of uneven length, some padding, MLM labels."""

    def at(self, positions, mask=None) -> dict:
        rows = [self._row(p) for p in positions]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def _row(self, position: int) -> dict:
        g = torch.Generator().manual_seed(position)
        ids = torch.randint(5, tiny.VOCAB, (LENGTH,), generator=g)
        cuts = torch.randint(1, LENGTH, (3,), generator=g).sort().values.tolist()
        segments = torch.zeros(LENGTH, dtype=torch.long)
        for number, (a, b) in enumerate(zip([0, *cuts[:2]], cuts, strict=True), 1):
            segments[a:b] = number
        scored = (torch.rand(LENGTH, generator=g) < 0.3) & (segments > 0)
        return {
            "input_ids": ids.where(segments > 0, 0),
            "segment_ids": segments,
            "labels": ids.where(scored, -100),
            "sample_ids": torch.tensor(position),
        }


def parts(micro_batch: int, packed: bool = True, checkpointing: bool = False):
    """A student of several losses, its wider teacher, and the data."""
    objectives = {
        "relation_kl": OBJECTIVES["relation_kl"](target="t", relations=["qq", "kk", "vv"], heads=6),
        "ce": OBJECTIVES["ce"](objective="mlm"),
        "hidden": OBJECTIVES["hidden"](
            target="t", project=True, student_layer=["embeddings", 1], teacher_layer=["embeddings", 3]
        ),
    }
    drawn = projections.drawn({"hidden": (tiny.HIDDEN, WIDE)}, seed=0)
    lesson = Lesson(tiny.model("bert", head="mlm", seed=1), objectives, checkpointing, drawn)
    targets = Targets({"t": Online(freeze(tiny.model("bert", seed=2, hidden_size=WIDE)))}, objectives)
    return lesson, targets, Data(Rows(), BATCH, micro_batch, packed, torch.device("cpu"))


class Run:
    """The loop of train.py without the recipe around it."""

    def __init__(
        self,
        precision: str = "fp32",
        micro_batch: int = 2,
        packed: bool = True,
        clip: float = 1.0,
        checkpointing: bool = False,
    ):
        self.lesson, self.targets, self.data = parts(micro_batch, packed, checkpointing)
        with placed(self.lesson, STAGE) as run:
            freeze_unreachable(self.lesson, self.targets, self.data, run=run)
        self.targets.models[0].to(torch.bfloat16 if precision == "bf16" else torch.float32)
        spec = SimpleNamespace(zero=STAGE, precision=precision, deepspeed=LET_GO if checkpointing and STAGE else {})
        optim = SimpleNamespace(**OPTIM | {"clip": clip})
        self.engine = Engine(self.lesson, spec, optim, micro_batch)

    def step(self, step: int, spoil: float = 1.0) -> float:
        """One update; returns the global loss."""
        active, batches, loss = self.lesson.objectives, self.data(step), 0.0
        counts = {}
        for batch in batches:
            for name, objective in active.items():
                for k, n in objective.count(batch).items():
                    counts[f"{name}.{k}"] = counts.get(f"{name}.{k}", 0.0) + float(n)
        counts = dict(zip(counts, world.agree(*counts.values()), strict=True))
        for batch in batches:
            terms = self.engine(batch, self.targets(batch, active), active)
            share = sum(value / counts[key] for key, value in terms.items())
            self.engine.backward(share * spoil)
            loss += float(share.detach())
        self.engine.step(LR)
        return world.agree(loss)[0]

    def state(self) -> dict:
        return {(key, name): tensor.clone() for key in KEYS for name, tensor in self.engine.state(key)}

    def gradient(self) -> torch.Tensor:
        """Of one step, whole and flat: Adam's first moment after one unclipped step is a tenth of it."""
        self.step(0)
        flat = torch.cat([10 * tensor.flatten() for _, tensor in self.engine.state("exp_avg")])
        self.engine.close()
        return flat


def resumes(precision: str) -> bool:
    """Three steps, snapshots on disk, two more: against two steps of a new engine that has read them, each in turn.

    The new one recomputes activations, which changes no bit either.
    """
    run = Run(precision)
    for step in range(3):
        run.step(step)
    with shared_directory() as parent:
        whole = snapshot.save(parent / "whole", 3, run.engine, {"lr": LR}, {"cursor": {"position": 3 * BATCH}})
        local = snapshot.save(parent / "local", 3, run.engine, {"lr": LR}, {}, local=True)
        losses, end = [run.step(3), run.step(4)], run.state()
        run.engine.close()
        again = Run(precision, checkpointing=True)
        assert snapshot.latest(parent / "local") == local
        assert (local / "master.safetensors").is_file() == (STAGE == 0)
        same = True
        for path in (whole, local):
            snapshot.restore(path, again.engine, {"lr": LR})
            same &= [again.step(3), again.step(4)] == losses
            found = again.state()
            same &= all(torch.equal(end[key], found[key]) for key in end)
        says_what_changed(whole, again.engine)
        says_where_it_goes_on(local, again.engine)
        again.engine.close()
        world.barrier()
    return same


def says_what_changed(path: Path, engine: Engine) -> None:
    """A snapshot of something else is refused, or taken and the difference recorded."""
    try:
        snapshot.restore(path, engine, {"lr": 0.5})
        raise AssertionError("a snapshot of another recipe was taken")
    except UserError as error:
        assert f"\n  lr {LR} -> 0.5\n" in str(error)
    told = snapshot.restore(path, engine, {"lr": 0.5}, accept=True)["overridden"]
    assert told == [{"step": 3, "changes": [f"lr {LR} -> 0.5"]}]


def says_where_it_goes_on(local: Path, engine: Engine) -> None:
    """What another engine wrote with `local: true` is refused before a file of state is opened, with what would do."""
    manifest = read_json(local / "manifest.json")
    if not manifest["local"]:  # ZeRO 0: whole, and so it goes on anywhere
        return
    other = {"stage": 1 + STAGE % 3, "ranks": 3, "precision": "bf16" if engine.precision == "fp32" else "fp32"}
    for key, value in other.items():
        theirs, place = {**manifest, key: value}, local.parent.parent / key
        world.first(lambda: place.mkdir() or write_json(place / "manifest.json", theirs))  # noqa: B023
        try:
            snapshot.restore(place, engine, {"lr": LR})
            raise AssertionError(f"a local snapshot of another {key} was taken")
        except UserError as error:
            does = "engine.zero={stage} engine.precision={precision} and --ranks {ranks}. Snapshots with `local: false`"
            assert f"{key} {value} -> {manifest[key]}; give it {does.format(**theirs)} go on anywhere" in str(error)


def shared_directory():
    """The same temporary directory on every rank."""
    import torch.distributed as dist

    world.start()
    made = TemporaryDirectory() if world.rank() == 0 else None
    names = [made.name if made else None]
    dist.broadcast_object_list(names)
    return _Directory(Path(names[0]), made)


class _Directory:
    def __init__(self, path, made):
        self.path, self.made = path, made

    def __enter__(self):
        return self.path

    def __exit__(self, *_):
        world.barrier()
        if self.made:
            self.made.cleanup()


def refuses_what_is_not_finite() -> bool:
    """A gradient of NaN changes neither weights nor moments, and says so."""
    run = Run()
    run.step(0)
    before = run.state()
    try:
        run.step(1, spoil=float("nan"))
        return False
    except NonFinite:
        after = run.state()
        run.engine.close()
        return all(torch.equal(before[key], after[key]) for key in before)


def flat(named) -> torch.Tensor:
    """All weights but key biases: softmax does not feel them, so Adam blows rounding noise up to full steps."""
    return torch.cat([tensor.detach().flatten() for name, tensor in named if not name.endswith("key.bias")])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    import hook_cases
    import placement_cases

    torch.set_num_threads(1)
    run = Run()
    losses = [run.step(step) for step in range(4)]
    weights = flat(run.engine.state("master"))
    run.engine.close()
    whole = Run(micro_batch=BATCH // world.size(), clip=0.0).gradient()
    cuts = {
        f"{m}x{BATCH // m // world.size()}": relative(Run(micro_batch=m, clip=0.0).gradient(), whole) for m in (1, 2)
    }
    cuts["padded"] = relative(Run(micro_batch=2, packed=False, clip=0.0).gradient(), whole)
    print(
        json.dumps(
            {
                "losses": losses,
                "weights": weights.tolist(),
                "gradient": whole.tolist(),
                "cuts": cuts,
                "resumes": {precision: resumes(precision) for precision in ("fp32", "bf16")},
                "refuses": refuses_what_is_not_finite(),
                "hooks": hook_cases.cases(STAGE),
                "placements": placement_cases.cases(STAGE),
            }
        )
    )


if __name__ == "__main__":
    main()
