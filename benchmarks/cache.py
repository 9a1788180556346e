"""A training step with the teacher online and from disk: seconds, bytes a token, and what of the loss is left.

    python benchmarks/cache.py [--only small|medium] [--threads 2] [--repeats 5]

Teacher and student are Qwen-2 shapes of random weights; the teacher's head is scaled until it is about as sure as a
language model is (the entropy is printed). A step is forward, backward and AdamW of the student on 8 rows, the
teacher's values taken on the way. Steps are interleaved, minimum of the repeats, CPU seconds beside them. Before
anything is timed the step from hidden states must be that of the teacher itself. `gradient` is the relative distance of
the student's gradient from the exact one: of a sample it is noise, which averages out, of top-k a bias.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

import torch
import transformers
import yaml

from distill import corpus, recipe
from distill.context import Context
from distill.corpus import store
from distill.evaluate.machine import facts
from distill.lesson import Lesson
from distill.objectives import Divergence
from distill.refine.cache import Cache
from distill.schedules import Progress, fixed
from distill.teachers.cached import Cached
from distill.teachers.frozen import frozen
from distill.teachers.targets import Online, Targets
from growth.console import table
from growth.files import write_json

RESULTS = Path(__file__).parent / "results"
ROWS = 8
ENTROPY = 2.5  # nats, about what a small language model leaves open
KEEPS = {
    "top-64": {"keep": "topk", "k": 64},
    "50 draws": {"keep": "sampled", "draws": 50},
    "hidden": {"keep": "hidden"},
    "hidden, bfloat16": {"keep": "hidden", "dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    length: int
    teacher: tuple[int, int]  # layers, width
    student: tuple[int, int]

    def __str__(self) -> str:
        (deep, wide), (layers, width) = self.teacher, self.student
        return f"{deep} x {wide} -> {layers} x {width}, vocabulary {self.vocabulary}, {ROWS} rows of {self.length}"


SHAPES = {
    "small": Shape(2000, 128, (6, 192), (3, 96)),
    "medium": Shape(16_000, 128, (12, 512), (4, 256)),
}


def model(vocabulary: int, layers: int, width: int, seed: int):
    config = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(config)


def place(shape: Shape, out: Path) -> Context:
    """A prepared corpus with a tokeniser of its own, and a teacher that has it too."""
    text = {"source": "stdlib", "tokenizer": {"train": {"vocab": shape.vocabulary}}, "length": shape.length}
    document = {
        "recipe": "cache",
        "models": {"teacher": {"from": str(out / "teacher")}},
        "corpora": {"text": text},
        "stages": [{"id": "kept", "data": {"from": "text", "ops": [{"cache": {"teacher": "teacher"}}]}}],
    }
    (out / "cache.yaml").write_text(yaml.safe_dump(document))
    context = Context(recipe.load(out / "cache.yaml"), out, 0)
    shorten(context.corpus("text"), 2 * ROWS)
    tokenizer = corpus.open(context.corpus("text")).tokenizer
    teacher = model(len(tokenizer), *shape.teacher, seed=0)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(sharpness(teacher))
    teacher.save_pretrained(out / "teacher")
    tokenizer.save_pretrained(out / "teacher")
    return context


def shorten(path: Path, rows: int) -> None:
    """The first rows of a corpus: enough to time steps on."""
    manifest = store.read_manifest(path)
    side = manifest["sides"]["train"]
    share = rows / manifest["rows"]["train"]
    manifest["rows"]["train"] = rows
    side["tokens"], side["pieces"] = (round(side[key] * share) for key in ("tokens", "pieces"))
    write_json(path / store.MANIFEST, manifest)


def sharpness(teacher) -> float:
    """The factor of its head with which it is as sure as it should be."""
    with torch.no_grad():
        logits = teacher(torch.randint(len(teacher.lm_head.weight), (1, 64))).logits[0]
    low, high = 0.0, 1000.0
    for _ in range(30):
        middle = (low + high) / 2
        log_p = (logits * middle).log_softmax(-1)
        low, high = (middle, high) if -(log_p.exp() * log_p).sum(-1).mean() > ENTROPY else (low, middle)
    return low


class Step:
    """Of a student that learns from one source."""

    def __init__(self, shape: Shape, vocabulary: int, source):
        self.student = model(vocabulary, *shape.student, seed=1)
        self.objectives = {"d": Divergence(target="t")}
        self.active = {name: fixed(value, Progress(0, 1)) for name, value in self.objectives.items()}
        self.targets = Targets({"t": source}, self.objectives)
        self.lesson = Lesson(self.student, self.objectives)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.0)  # the weights stay, the work is done
        self.teaching = 0.0

    def __call__(self, batch) -> float:
        began = time.perf_counter()
        taught = self.targets(batch, self.active)
        self.teaching = time.perf_counter() - began
        (loss,) = self.lesson(batch, taught, self.active).values()
        self.optimizer.zero_grad()
        (loss / batch["labels"].numel()).backward()
        self.optimizer.step()
        return float(loss.detach()) / batch["labels"].numel()

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.student.parameters()])


def written(context: Context, out: Path, keep: dict) -> tuple[Cached, dict]:
    """The cache, and what writing it took beside the bare forward passes of the same documents."""
    told = Cache(teacher="teacher", **keep).apply(context.corpus("text"), out, context)
    return Cached(out, torch.device("cpu")), told


def measured(shape: Shape, repeats: int, out: Path) -> dict:
    context = place(shape, out)
    text = corpus.open(context.corpus("text"))
    online = Online(frozen("teacher", "causal", context), text.facts.vocabulary)
    vocabulary = text.facts.vocabulary
    kept = {name: written(context, out / name, keep) for name, keep in KEEPS.items()}
    batches = [corpus.Batches(text, 0, "causal").at(range(i * ROWS, (i + 1) * ROWS)) for i in range(2)]
    steps = {"online": Step(shape, vocabulary, online)}
    steps |= {name: Step(shape, vocabulary, source) for name, (source, _) in kept.items()}
    losses = {name: step(batches[0]) for name, step in steps.items()}
    exact = steps["online"].gradient()
    off = {name: float((step.gradient() - exact).norm() / exact.norm()) for name, step in steps.items()}
    if not (abs(losses["hidden"] / losses["online"] - 1) < 1e-5 and off["hidden"] < 1e-5):
        raise SystemExit(f"hidden states do not teach as the teacher: {losses}, {off}")
    times: dict[str, list] = {name: [] for name in steps}
    for turn in range(repeats):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step(batches[turn % 2])
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu, step.teaching))
    head = online.take(batches[0], [steps["online"].objectives["d"].needs()]).head
    log_p = head.whole().log_softmax(-1)
    return {
        "shape": str(shape), **asdict(shape), "vocabulary": vocabulary,
        "tokens": int((batches[0]["segment_ids"] > 0).sum()),
        "parameters": {who: sum(p.numel() for p in m.parameters())
                       for who, m in (("teacher", online.models[0]), ("student", steps["online"].student))},
        "entropy": float(-(log_p.exp() * log_p).sum(-1).mean()),
        "left out by top-64": float(1 - log_p.topk(64).values.exp().sum(-1).mean()),
        "rows": {name: row(name, times, losses, off, kept) for name in steps},
    }  # fmt: skip


def row(name: str, times: dict, losses: dict, off: dict, kept: dict) -> dict:
    walls, cpus, teaching = zip(*times[name], strict=True)
    told = kept[name][1] if name in kept else {}
    return {
        "seconds": min(walls),
        "quartiles": quantiles(walls, n=4)[::2],
        "cpu": min(cpus),
        "teaching": min(teaching),
        "share": min(cpus) / min(cpu for _, cpu, _ in times["online"]),
        "bytes_per_token": told.get("bytes_per_token"),
        "written_in": told.get("seconds"),
        "loss": losses[name] / losses["online"] - 1,
        "gradient": off[name],
    }


def show(found: dict) -> None:
    columns = ["", "step s", "CPU s", "of online", "teacher s", "bytes/token", "written in s", "loss", "gradient"]
    lines = [
        [name, f"{r['seconds']:.3f}", f"{r['cpu']:.3f}", f"{r['share']:.2f}", f"{r['teaching']:.4f}",
         f"{r['bytes_per_token'] or 0:.0f}", f"{r['written_in'] or 0:.1f}", f"{r['loss']:+.2e}", f"{r['gradient']:.2e}"]
        for name, r in found["rows"].items()
    ]  # fmt: skip
    left = f"left out {found['left out by top-64']:.3f}"
    table(columns, lines, f"{found['shape']}; entropy {found['entropy']:.2f}, {left}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = []
    for name in [given.only] if given.only else SHAPES:
        with tempfile.TemporaryDirectory() as out:
            found.append(measured(SHAPES[name], given.repeats, Path(out)))
        show(found[-1])
    if not given.only:
        write_json(RESULTS / "cache.json", {"shapes": found, "threads": given.threads, **facts()})


if __name__ == "__main__":
    main()
