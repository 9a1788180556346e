"""Laws of the stream: order, masks and batches are pure functions of (seed, epoch, sample id)."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import corpus
from distill.corpus import masking
from distill.specs import CorpusSpec

SEEDS = (0, 1, 2**32, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)
LENGTH, WORDS = 32, np.arange(5, tiny.VOCAB)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return numbers(tmp_path_factory.mktemp("order"), LENGTH)


def numbers(root, length):
    """Packed rows of short and long documents in a tiny vocabulary."""
    lines = [" ".join(f"{a * b}" for b in range(2, 2 + a % 17)) for a in range(2, 400)]
    (root / "numbers.txt").write_text("\n".join(lines))
    tiny.tokenizer().save_pretrained(root / "tokenizer")
    spec = CorpusSpec(source=str(root / "numbers.txt"), tokenizer="t", length=length, heldout=0.1)
    corpus.prepare(spec, root / "tokenizer", root / "corpus")
    return corpus.open(root / "corpus")


@given(seed=st.integers(0, 2**64 - 1), rows=st.integers(1, 300), epoch=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_epoch_is_a_permutation(seed, rows, epoch):
    order = corpus.Order(seed, rows)
    seen = [order.at(position) for position in range(epoch * rows, (epoch + 1) * rows)]
    assert {e for e, _ in seen} == {epoch}
    assert sorted(row for _, row in seen) == list(range(rows))


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        return [corpus.Order(seed, 50).at(50 * number + i)[1] for i in range(50)]

    assert len({tuple(epoch(seed, number)) for seed in range(4) for number in range(4)}) == 16


def test_every_row_comes_first_about_equally_often():
    rows, trials = 8, 4000
    first = np.bincount([corpus.Order(seed, rows).at(0)[1] for seed in range(trials)], minlength=rows)
    expected = trials / rows
    assert ((first - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, one in a thousand


def test_the_stream_of_random_numbers_never_changes():
    """numpy keeps its raw bit streams: runs of different releases see the same order and masks."""
    assert [corpus.Order(0, 10).at(i)[1] for i in range(10)] == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]


@pytest.mark.parametrize("objective", [None, "mlm", "causal"])
def test_any_cut_of_the_stream_gives_the_same_batches(prepared, objective):
    """One batch of 24 = micro-batches of 5 on three interleaved ranks, across the end of an epoch."""
    start = len(prepared) - 11
    whole = corpus.Batches(prepared, 3, objective).at(range(start, start + 24))
    parts = {}
    for rank in range(3):
        mine = list(range(start + rank, start + 24, 3))
        for micro in (mine[:5], mine[5:]):
            batch = corpus.Batches(prepared, 3, objective).at(micro)  # a new object: nothing is carried along
            parts |= {p: {k: v[i] for k, v in batch.items()} for i, p in enumerate(micro)}
    for name, values in whole.items():
        assert torch.equal(values, torch.stack([parts[start + i][name] for i in range(24)])), name


def test_a_row_is_masked_anew_in_each_epoch_and_for_each_seed(prepared):
    row = 7
    place = [next(p for p in range(e * len(prepared), (e + 1) * len(prepared))
                  if corpus.Order(5, len(prepared)).at(p)[1] == row) for e in range(3)]  # fmt: skip
    batch = corpus.Batches(prepared, 5, "mlm").at(place, mask=0.5)
    assert batch["sample_ids"].tolist() == [row] * 3
    assert len({tuple(labels.tolist()) for labels in batch["labels"]}) == 3


def test_no_two_of_seed_epoch_and_sample_share_their_random_numbers():
    triples = [(seed, epoch, sample) for seed in SEEDS for epoch in range(5) for sample in range(5)]
    assert len({masking.numbers(4, *triple).tobytes() for triple in triples}) == len(triples)


def test_masks_are_fifteen_percent_and_eighty_ten_ten():
    n = 400_000
    ids = np.full(n, 7)
    hidden, labels = corpus.mlm(ids, np.ones(n, bool), 1, 2, 3, 0.15, mask=tiny.MASK, words=WORDS)
    chosen = labels == 7
    within(chosen.sum(), n, 0.15)
    k = int(chosen.sum())
    within((hidden[chosen] == tiny.MASK).sum(), k, 0.8)
    within((hidden[chosen] == 7).sum(), k, 0.1 + 0.1 / len(WORDS))  # one random word is the word itself
    within((hidden[chosen] == 9).sum(), k, 0.1 / len(WORDS))
    assert (hidden[~chosen] == 7).all() and (labels[~chosen] == masking.NONE).all()


def within(count: int, n: int, p: float) -> None:
    """Five standard deviations of a binomial: one test in a million fails by chance, and this one has a fixed seed."""
    assert abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_what_may_not_be_masked_never_is():
    ids = np.arange(5000) % tiny.VOCAB
    maskable = ids >= 5
    hidden, labels = corpus.mlm(ids, maskable, 0, 0, 0, 1.0, mask=tiny.MASK, words=WORDS)
    assert (hidden[~maskable] == ids[~maskable]).all() and (labels[~maskable] == masking.NONE).all()
    assert (labels[maskable] == ids[maskable]).all()
    assert np.isin(hidden[maskable], [tiny.MASK, *WORDS]).all()


def test_a_higher_rate_masks_the_same_tokens_and_more():
    ids = np.full(2000, 7)
    low, high = (corpus.mlm(ids, ids > 0, 4, 5, 6, rate, mask=tiny.MASK, words=WORDS) for rate in (0.15, 0.4))
    chosen = low[1] != masking.NONE
    assert chosen.sum() < (high[1] != masking.NONE).sum()
    assert (high[0][chosen] == low[0][chosen]).all()


def test_rate_zero_hides_nothing_and_rate_one_everything(prepared):
    batches = corpus.Batches(prepared, 0, "mlm")
    plain, none, every = (
        corpus.Batches(prepared, 0).at(range(9)),
        batches.at(range(9), mask=0.0),
        batches.at(range(9), 1.0),
    )
    assert torch.equal(none["input_ids"], plain["input_ids"]) and (none["labels"] == -100).all()
    words = plain["input_ids"] > tiny.MASK
    assert torch.equal(every["labels"], torch.where(words, plain["input_ids"], -100))


def test_masking_spares_special_tokens_and_padding(prepared):
    plain, hidden = (corpus.Batches(prepared, 0, o).at(range(len(prepared)), mask=0.9) for o in (None, "mlm"))
    spared = (plain["input_ids"] <= tiny.MASK) | (plain["segment_ids"] == 0)
    assert spared.any() and torch.equal(hidden["input_ids"][spared], plain["input_ids"][spared])
    assert (hidden["labels"][spared] == -100).all()


def test_causal_labels_are_the_tokens_themselves_and_none_at_padding(prepared):
    batch = corpus.Batches(prepared, 0, "causal").at(range(len(prepared)))
    real = batch["segment_ids"] > 0
    assert not real.all()
    assert torch.equal(batch["labels"], torch.where(real, batch["input_ids"], -100))


def test_unpacked_batches_have_the_same_tokens_and_labels(prepared):
    packed = corpus.Batches(prepared, 1, "mlm").at(range(12))
    alone = corpus.unpack(packed)

    def documents(batch):
        columns = (batch[name].tolist() for name in ("input_ids", "segment_ids", "labels", "sample_ids"))
        found = []
        for ids, segments, labels, sample in zip(*columns, strict=True):
            for number in sorted(set(segments) - {0}):
                at = [i for i, s in enumerate(segments) if s == number]
                found.append((sample, tuple(ids[i] for i in at), tuple(labels[i] for i in at)))
        return found

    assert documents(alone) == documents(packed)
    assert set(alone["segment_ids"].unique().tolist()) <= {0, 1}
    assert (alone["segment_ids"].diff(dim=1) <= 0).all(), "padding is on the right"
    assert (alone["labels"][alone["segment_ids"] == 0] == -100).all()
    assert alone["input_ids"].shape[1] == alone["segment_ids"].sum(1).max()


def test_unpacking_an_unpacked_batch_changes_nothing(prepared):
    once = corpus.unpack(corpus.Batches(prepared, 1, "causal").at(range(6)))
    for name, values in corpus.unpack(once).items():
        assert torch.equal(values, once[name])


def test_a_batch_of_16_rows_of_128_takes_under_two_milliseconds(tmp_path):
    """The best of many tries, for the machine may be busy."""
    batches = corpus.Batches(numbers(tmp_path, 128), 0, "mlm")

    def once(i):
        start = time.perf_counter()
        batches.at(range(16 * i, 16 * i + 16))
        return time.perf_counter() - start

    assert min(once(i) for i in range(100)) < 0.002
