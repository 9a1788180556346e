"""All that is asked of the engine where the student is a ranker, on every ZeRO stage, in one process a rank."""

from __future__ import annotations

import json
import random

import engine_cases
import tiny
import torch
from engine_cases import BATCH, Run, relative, resumes

from distill import world
from distill.lesson import Data, Lesson
from distill.models import freeze
from distill.objectives import OBJECTIVES
from distill.ranking import encoding, rankers
from distill.ranking.batches import Batches, Lists, Reader
from distill.ranking.collection import Collection
from distill.ranking.groups import Group, gather
from distill.ranking.kinds import ColBERTKind, CrossKind, DualKind, Join, PreTTKind, TKKind
from distill.ranking.teaching import Online
from distill.teachers.targets import Targets

LENGTHS = {"query_length": 14, "passage_length": 26}
JOIN = Join(between=(), skip=1)  # of tiny.tokenizer
KINDS = {
    "dual_encoder": DualKind(pooling="mean", dims=7, **LENGTHS),
    "cross_encoder": CrossKind(join=JOIN, **LENGTHS),
    "colbert": ColBERTKind(masks=2, mask_token=tiny.MASK, dims=11, **LENGTHS),
    "prett": PreTTKind(apart=1, **LENGTHS),
    "tk": TKKind(**LENGTHS),
}
TEACHER = CrossKind(join=JOIN, query_length=9, passage_length=33)  # that cuts elsewhere
GROUP = 2
LOSSES = {
    "margin_mse": {"target": "t", "scale": 2.0},
    "all": {"target": "t", "pairs": "all"},
    "pointwise_mse": {"target": "t"},
    "listwise_kl": {"target": "t", "temperature": 3.0},
    "ranknet": {"target": "t", "weighted": True},
    "in_batch_margin": {"target": "t", "group": GROUP, "scale": 0.5},
    "contrastive": {"group": GROUP, "temperature": 2.0},
}
SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}  # small: this runs often


def collection() -> Collection:
    """Words of four letters; two of the queries have two answers each, one of them far down in another list."""
    draw = random.Random(5)

    def words(least: int, most: int) -> str:
        return " ".join("".join(draw.choice("etaoinsh") for _ in range(4)) for _ in range(draw.randint(least, most)))

    documents = {f"d{i}": words(1, 7) for i in range(23)}
    queries = {f"q{i}": words(1, 4) for i in range(9)}
    judged = {f"q{i}": {f"d{i}": 1} for i in range(9)}
    judged["q2"]["d3"], judged["q5"]["d4"] = 1, 2
    return Collection(queries, documents, judged)


def groups():
    """Lists of one to four negatives, some of which are the answers of others."""
    return gather(
        Group(f"q{i}", f"d{i}", tuple(f"d{(i + 1 + 5 * k) % 23}" for k in range(1 + i % 4))) for i in range(9)
    )


def lists() -> Lists:
    tokenizer = tiny.tokenizer()
    readers = Reader(tokenizer, KINDS["dual_encoder"].lengths), {"teacher": Reader(tokenizer, TEACHER.lengths)}
    return Lists(collection(), groups(), readers[0], 3, readers[1])


def student(kind: str):
    return rankers.build(KINDS[kind], tiny.model("bert", seed=1, **SIZES), seed=3)


def teacher():
    return rankers.build(TEACHER, tiny.model("bert", seed=2, **SIZES | {"hidden_size": 32}), seed=4)


def objectives() -> dict:
    return {name: OBJECTIVES[{"all": "margin_mse"}.get(name, name)](**keys) for name, keys in LOSSES.items()}


def parts(kind: str, micro_batch: int):
    losses, ranker = objectives(), student(kind)
    ranker.at_once = engine_cases.STAGE == 3 and world.size() > 1
    targets = Targets({"t": Online([("teacher", freeze(teacher()))])}, losses)
    data = Data(Batches(lists(), seed=0), BATCH, micro_batch, True, torch.device("cpu"), least=GROUP)
    return Lesson(ranker, losses), targets, data


def gradient(kind: str, micro_batch: int) -> torch.Tensor:
    """Of the first step, whole and flat, through the engine."""
    engine_cases.parts = lambda micro_batch, packed, checkpointing: parts(kind, micro_batch)
    return Run(micro_batch=micro_batch, clip=0.0).gradient()


def of_stage(stage: int) -> dict:
    """Every ranker where stages gather weights by module; what else they do with gradients knows no modules."""
    engine_cases.STAGE, mine = stage, BATCH // world.size()
    whole = {kind: gradient(kind, mine) for kind in (KINDS if stage == 3 else ["dual_encoder"])}
    return {
        "gradients": {kind: found.tolist() for kind, found in whole.items()},
        "cut": relative(gradient("dual_encoder", GROUP), whole["dual_encoder"]),
        "resumes": resumes("fp32") if stage == 3 else None,
    }


def main() -> None:
    """Stage 3 last: it patches the process."""
    torch.set_num_threads(1)
    encoding.PLACES = 60  # several passes through the encoder, not equally many on every rank
    print(json.dumps([of_stage(stage) for stage in range(4)]))


if __name__ == "__main__":
    main()
