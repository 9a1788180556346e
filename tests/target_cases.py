"""Recipes with targets of every kind of model, run on one ZeRO stage: `target_cases.py STAGE CASE ...`, as JSON."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny
import torch
from safetensors.torch import load_file

from distill import recipe, stages
from distill.corpus import vocabulary
from growth import files

TEXTS = ["The old grey engine ran quietly near the harbour. ", "A small bridge, the heavy valve, a broken clock. "] * 40
ADAM = {"optim": {"batch": 8, "clip": 0.0}, "lr": 0.01, "save_every": 1}
CAUSAL = {"ce": {"objective": "causal"}}
DIVERGENCE = {"target": "t", "kind": "jsd", "temperature": 2.0}
PHASE = {"points": [[0, 1.0], [2, 0.0]], "shape": "hold"}
TRAIN = {"student": {"from": "student"}, "data": "text", **ADAM}


def stage(name: str, steps: int, loss: list, targets: dict, **more) -> dict:
    return {
        "id": name,
        "train": {**copy.deepcopy(TRAIN), "loss": loss, "targets": targets, "stop": {"steps": steps}, **more},
    }


ALIGNED = [
    stage("teacher", 20, [CAUSAL], {}, save_every=50, data="theirs", student={"new": {"like": "wide"}}),
    stage("s", 12, [{"aligned": {"target": "t"}}], {"t": {"from": "teacher"}}, save_every=50),
]
CASES = {
    "together": [stage("s", 2, [{"divergence": {**DIVERGENCE, "ce": 0.5}}], {"t": {"from": "wide"}})],
    "apart": [
        stage(
            "s",
            2,
            [{"divergence": DIVERGENCE}, {"ce": {"objective": "causal", "weight": 0.5}}],
            {"t": {"from": "wide"}},
        )
    ],
    "phase": [
        stage(
            "s",
            4,
            [{"divergence": {"target": "t", "weight": PHASE, "temperature": {"points": [[0, 4.0], [2, 1.0]]}}}, CAUSAL],
            {"t": {"ensemble": ["wide", "small"], "combine": "mean_logprob"}},
        )
    ],
    "placed": [
        stage(f"{name}_{place}", 2, [*losses], {"t": {**target, "placement": place}})
        for name, target, losses in (
            ("taps", {"from": "wide"}, [{"relation_kl": {"target": "t", "heads": 6, "teacher_layer": -3}}]),
            ("both", {"from": "wide"}, [{"relation_kl": {"target": "t", "heads": 6}}, {"divergence": DIVERGENCE}]),
            ("several", {"ensemble": ["wide", "small"]}, [{"divergence": DIVERGENCE}]),
        )
        for place in ("replicated", "zero3")
    ],
    "aligned": ALIGNED,
    "aligned_whole": ALIGNED,
}
MICRO = {"aligned_whole": 8}


def lay_out() -> None:
    """Models of one tokeniser and of different sizes in this directory; one of them has a padded head."""
    tokenizer = vocabulary.train("bpe", 300, TEXTS)
    for name, family, changes in (
        ("student", "qwen2", {"seed": 1}),
        ("wide", "llama", {"seed": 2, "hidden_size": 60, "vocab_size": 311}),
        ("small", "llama", {"seed": 3, "hidden_size": 36}),
    ):
        tiny.save(tiny.model(family, "causal", **{"vocab_size": len(tokenizer), **changes}), Path(name), tokenizer)


def run(case: str, zero: int) -> dict:
    """What each stage logged, its gradient at the first step (a tenth of Adam's first moment), its metrics."""
    written = {
        "recipe": case,
        "engine": {"zero": zero, "micro_batch": MICRO.get(case, 4)},
        "models": {name: name for name in ("student", "wide", "small")},
        "corpora": {
            name: {"source": "synthetic", "tokenizer": tokenizer, "length": 48, "heldout": 0.1, "limit": 200}
            for name, tokenizer in (("text", "student"), ("theirs", {"train": {"vocab": 200, "kind": "unigram"}}))
        },
        "stages": CASES[case],
    }
    path, out = Path(f"{case}.yaml"), Path(case)
    path.write_text(json.dumps(written))  # JSON is YAML
    stages.run(recipe.load(path), out)
    return {one["id"]: _result(out / one["id"]) for one in written["stages"]}


def _result(directory: Path) -> dict:
    first = directory / "snapshots" / "step-00000001" / "exp_avg.safetensors"
    gradient = (
        torch.cat([10 * x.flatten() for _, x in sorted(load_file(first).items())]).tolist() if first.exists() else None
    )
    return {
        "log": [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()],
        "gradient": gradient,
        "metrics": files.read_json(directory / "stage.json")["metrics"],
    }


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as place:
        os.chdir(place)
        lay_out()
        print(json.dumps({case: run(case, int(sys.argv[1])) for case in sys.argv[2:]}))


if __name__ == "__main__":
    main()
