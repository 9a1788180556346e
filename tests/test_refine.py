"""Laws of corpus refinement: what a score is, which rows a selection keeps, that no text is lost or invented."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill import corpus, loading, stages
from distill import recipe as recipes
from distill.corpus import noise, tokens
from distill.heads import Logits
from distill.recipe import CorpusSpec
from distill.refine import OPS, cut, likelihood, rewriting, scored, scoring
from distill.refine.gather import Chosen, gather
from distill.refine.likelihood import likelier, log_probabilities
from distill.refine.refinement import of_selection, refine
from distill.refine.selection import Rule, Table, select
from distill.report import refinement
from distill.scores import row_keys
from distill.scores import store as scores
from growth import files
from growth.errors import UsageError, UserError

LENGTH = 40
WORDS = "the garden holds an old rose, two trees and a pond; nobody knows who dug it"


def texts():
    """Prose, some of it longer than a row, numbers and rubbish: three parts."""
    rng = random.Random(3)
    for n in range(60):
        yield " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(2, 30))), "prose"
        yield " ".join(f"{a * n}" for a in range(2, 2 + n % 9)), "numbers"
        yield "".join(rng.choice("qzxjkv") for _ in range(5 + n % 40)), "rubbish"


def plain_tokenizer():
    """One token a byte and nothing in front of a text, as GPT-2's: a first token that nothing predicts."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={"<end>": 0} | {x: i + 1 for i, x in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pool, two models that have its tokeniser, one that has another."""
    root = tmp_path_factory.mktemp("refine")
    lines = [json.dumps({"text": text, "label": part}) for text, part in texts()]
    (root / "pool.jsonl").write_text("\n".join(lines))
    tiny.save(tiny.model("llama", "causal", seed=1), root / "teacher", tiny.tokenizer())
    tiny.save(tiny.model("gpt2", "causal", seed=2), root / "reference", tiny.tokenizer())
    other = tiny.model("qwen2", "causal", seed=3, vocab_size=257, max_position_embeddings=LENGTH * 4)
    tiny.save(other, root / "foreign", plain_tokenizer())
    spec = CorpusSpec(source=str(root / "pool.jsonl"), tokenizer="t", length=LENGTH, heldout=0.2)
    corpus.prepare(spec, root / "teacher", root / "pool")
    for name in ("teacher", "reference"):
        scoring.score(corpus.open(root / "pool"), root / name, root / "scores" / name, forward=200)
    scored.describe(root / "scores", "nll_gap", "token")
    return root


@pytest.fixture(scope="module")
def pool(place):
    return corpus.open(place / "pool")


def columns(path):
    """{key: the values} of a store."""
    reader = scores.Reader(path)
    found = reader.rows(reader.keys)
    return {key.tobytes(): tuple(column[i] for column in found.values()) for i, key in enumerate(reader.keys)}


def brute(model, documents):
    """Losses of all tokens but the first of each document, in float64 and one by one."""
    for one in documents:
        ids = torch.tensor(one)[None]
        with torch.no_grad():
            logits = model(ids).logits[0].double()
        for t in range(len(one) - 1):
            yield float(torch.logsumexp(logits[t], 0) - logits[t, one[t + 1]]), logits[t], one[t + 1]


# --- likelihood -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap, scale, bias", [(None, 1.0, False), (3.0, 0.7, True)])
def test_tiles_give_the_log_probabilities_of_the_plain_formula(monkeypatch, softcap, scale, bias):
    """Also where the last tile is smaller, and how many tokens are likelier."""
    monkeypatch.setattr("distill.refine.likelihood.TILE", (5, 7))
    generator = torch.Generator().manual_seed(0)
    hidden, weight, shift = (torch.randn(*s, generator=generator).double() for s in ((13, 4), (31, 4), (31,)))
    targets = torch.randint(31, (13,), generator=generator)
    logits = Logits(hidden, weight, shift if bias else None, scale, softcap)
    expected = torch.log_softmax(logits.whole(), -1)
    gold = expected.gather(1, targets[:, None])
    found, better = likelier(logits, targets)
    for given_logits in (logits, Logits(logits.whole())):
        torch.testing.assert_close(log_probabilities(given_logits, targets), gold[:, 0])
    torch.testing.assert_close(found, gold[:, 0])
    assert (better == (expected > gold + 1e-12).sum(1)).all()


def test_no_token_is_likelier_than_itself(monkeypatch):
    """Its logit may come out a little lower where it is summed in another order."""
    gold = likelihood._gold
    monkeypatch.setattr(likelihood, "_gold", lambda *given: gold(*given) - 1e-4)
    assert likelier(Logits(torch.eye(9)), torch.arange(9))[1].tolist() == [0] * 9


@pytest.mark.parametrize("name", ["teacher", "reference"])
def test_a_row_is_the_sum_of_its_documents_alone(place, pool, name):
    """Against whole logits in float64, one document at a time: no token sees another document, none is scored twice."""
    model = loading.load(place / name, "causal", torch.float64)
    found = scores.Reader(place / "scores" / name).rows(row_keys(*pool.block(range(len(pool)))))
    for i in range(0, len(pool), 7):
        ids, segments = pool.row(i)
        losses = [loss for loss, *_ in brute(model, [ids[segments == n] for n in range(1, segments.max() + 1)])]
        assert found["tokens"][i] == len(losses)
        assert found["logp"][i] == pytest.approx(-sum(losses), rel=1e-5)
        assert found["bytes"][i] == sum(len(text.encode()) for text in pool.pieces(i))


def test_the_median_is_of_tokens_that_the_model_ranks_among_its_k_best(place, pool, tmp_path):
    scoring.score(pool, place / "teacher", tmp_path / "teacher", k=5)
    scored.describe(tmp_path, "median_topk", "token")
    found = scored.Scored(tmp_path, pool)
    model = loading.load(place / "teacher", "causal", torch.float64)
    for i in range(0, len(pool), 9):
        ids, segments = pool.row(i)
        tokens_of = brute(model, [ids[segments == n] for n in range(1, segments.max() + 1)])
        good = [loss for loss, logits, gold in tokens_of if (logits > logits[gold]).sum() < 5]
        assert found.columns([i])["teacher"]["learnable"][0] == len(good)
        assert found[[i]][0] == pytest.approx(np.median(good) if good else 0.0, rel=1e-4)


def test_batches_do_not_matter(place, pool, tmp_path):
    """One document at a time, or hundreds padded together."""
    for forward in (1, 5000):
        scoring.score(pool, place / "teacher", tmp_path / str(forward), forward=forward)
    one, other = columns(tmp_path / "1"), columns(tmp_path / "5000")
    assert one.keys() == other.keys()
    assert np.allclose([one[key] for key in one], [other[key] for key in one], rtol=1e-5)


def test_half_precision_scores_nearly_the_same(place, pool, tmp_path):
    """The model's rounding, not that of its logits: those are float32."""
    scoring.score(pool, place / "teacher", tmp_path, precision="bfloat16")
    one, other = columns(tmp_path), columns(place / "scores" / "teacher")
    assert scores.Reader(tmp_path).about.producers[0]["dtype"] == "bfloat16"
    ratios = [one[key][0] / other[key][0] for key in one]
    assert one != other and 0.9 < min(ratios) <= max(ratios) < 1.1


def test_another_tokeniser_reads_the_text_of_the_row(place, pool, tmp_path):
    """Bytes are those of the tokens that were predicted, so a first token without anything before it is left out."""
    scoring.score(pool, place / "foreign", tmp_path, forward=300)
    found = scores.Reader(tmp_path).rows(row_keys(*pool.block(range(len(pool)))))
    model, tokenizer = loading.load(place / "foreign", "causal", torch.float64), plain_tokenizer()
    for i in range(0, len(pool), 7):
        documents = []
        for text, (number, _, end) in zip(pool.pieces(i), pool.spans[i], strict=True):
            is_end = [0] if end == pool.texts.size(int(number)) else []
            documents += [tokenizer(text).input_ids + is_end] if text else []
        losses = [loss for loss, *_ in brute(model, documents)]
        assert found["tokens"][i] == len(losses)
        assert found["logp"][i] == pytest.approx(-sum(losses), rel=1e-5)
        assert found["bytes"][i] == sum(len(text.encode()) - 1 for text in pool.pieces(i) if text)


def test_sums_and_means_rank_differently():
    """30 nats over 10 tokens against 100 over 1000: the official README's ratio and any sum would keep the other."""
    teacher = {"logp": np.array([-10.0, -1000.0]), "tokens": np.array([10, 1000]), "bytes": np.array([40, 2000])}
    reference = {**teacher, "logp": teacher["logp"] - np.array([30.0, 100.0])}
    assert scored.value("nll_gap", "token", teacher, reference) == pytest.approx([3.0, 0.1])
    assert scored.value("nll_gap", "sequence", teacher, reference) == pytest.approx([30.0, 100.0])
    assert scored.value("nll_gap", "byte", teacher, reference) == pytest.approx([0.75, 0.05])
    assert scored.value("nll", "token", teacher) == pytest.approx([1.0, 1.0])


def test_a_row_without_a_next_token_scores_nothing():
    empty = {"logp": np.zeros(1), "tokens": np.zeros(1, np.int32), "bytes": np.zeros(1, np.int32)}
    assert scored.value("nll_gap", "token", empty, empty) == 0


# --- ranks, kills, strangers ------------------------------------------------------------------------------------------


def score_in_a_process(place, out, **environment):
    program = (
        "from pathlib import Path; from distill import corpus; from distill.refine import scoring\n"
        f"place, out = Path({str(place)!r}), Path({str(out)!r})\n"
        "scoring.score(corpus.open(place / 'pool'), place / 'teacher', out, forward=200)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_ranks_write_what_one_writes(place, tmp_path):
    """To the bit: a block is scored alike whoever takes it."""
    world = {"WORLD_SIZE": "2", "DISTILL_STORE": str(tmp_path / "meeting")}
    ranks = [score_in_a_process(place, tmp_path / "two", RANK=str(rank), **world) for rank in range(2)]
    assert [(rank.communicate(timeout=300)[1], rank.returncode)[1] for rank in ranks] == [0, 0]
    assert {path.name[:6] for path in (tmp_path / "two").glob("r*")} == {"r00000", "r00001"}
    assert columns(tmp_path / "two") == columns(place / "scores" / "teacher")


def test_a_killed_run_goes_on_where_it_stopped(place, pool, tmp_path, monkeypatch):
    """Every block a shard of its own; after the third the process dies."""
    monkeypatch.setattr(scores, "SHARD_BYTES", 1)
    passed = []

    def die(point):
        passed.append(point)
        if passed.count("scores.after_shard") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "fault", die)
    with pytest.raises(KeyboardInterrupt):
        scoring.score(pool, place / "teacher", tmp_path / "s", forward=100)
    monkeypatch.setattr(files, "fault", passed.append)
    before = len(list((tmp_path / "s").glob("r*")))
    passed.clear()
    scoring.score(pool, place / "teacher", tmp_path / "s", forward=100)
    assert before == 3 and passed.count("score.block") == len(list((tmp_path / "s").glob("r*"))) - 3 > 0
    scoring.score(pool, place / "teacher", tmp_path / "whole", forward=100)
    assert columns(tmp_path / "s") == columns(tmp_path / "whole")


def test_scores_of_another_corpus_are_refused(place, tmp_path):
    spec = CorpusSpec(source=str(place / "pool.jsonl"), tokenizer="t", length=LENGTH - 8, heldout=0.2)
    corpus.prepare(spec, place / "teacher", tmp_path / "other")
    with pytest.raises(UserError, match="scores of another corpus"):
        scored.Scored(place / "scores", corpus.open(tmp_path / "other"))


@pytest.mark.parametrize("key, words", [("model_digest", "other weights"), ("tokenizer_digest", "other tokeniser")])
def test_scores_by_another_model_are_refused(place, pool, tmp_path, key, words):
    path = shutil.copytree(place / "scores", tmp_path / "scores")
    manifest = files.read_json(path / "reference" / "manifest.json")
    manifest["producers"][0][key] = "0" * 64
    files.write_json(path / "reference" / "manifest.json", manifest)
    with pytest.raises(UserError, match=words):
        scored.Scored(path, pool)


def test_scoring_does_not_go_on_with_other_weights(place, pool, tmp_path):
    shutil.copytree(place / "scores" / "teacher", tmp_path / "s")
    with pytest.raises(UserError, match="holds other scores: producers"):
        scoring.score(pool, place / "reference", tmp_path / "s")


def test_nan_is_refused(place, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "log_probabilities", lambda head, targets: torch.full(targets.shape, torch.nan))
    with pytest.raises(UserError, match="NaN"):
        scoring.score(pool, place / "teacher", tmp_path)


def test_what_is_not_finished_is_not_read(place, pool, tmp_path):
    shutil.copytree(place / "scores" / "teacher", tmp_path / "teacher")
    with pytest.raises(UserError, match=r"no score.json"):
        scored.Scored(tmp_path, pool)


def test_a_masked_language_model_has_no_likelihood(place, pool, tmp_path):
    tiny.save(tiny.model("bert", "mlm"), tmp_path / "bert", tiny.tokenizer())
    with pytest.raises(UserError, match="does not predict next tokens"):
        scoring.score(pool, tmp_path / "bert", tmp_path / "s")


# --- selection --------------------------------------------------------------------------------------------------------

NUMBERS = st.lists(st.tuples(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.001, 1.0010001, 3e9]) | st.floats(-9, 9),
                             st.integers(1, 5)), min_size=1, max_size=60)  # fmt: skip


def in_blocks(numbers, size=7):
    score, cost = (np.array(column) for column in zip(*numbers, strict=True))
    cuts = [slice(i, i + size) for i in range(0, len(numbers), size)]
    return lambda: [cut.Some(np.arange(len(numbers))[c], score[c].astype(float), cost[c]) for c in cuts]


def by_sorting(numbers, budget, high):
    """In score order, ties to the smaller index, up to the first that would pass the budget; in corpus order."""
    order, taken = sorted(range(len(numbers)), key=lambda i: (-numbers[i][0] if high else numbers[i][0], i)), []
    for i in order:
        budget -= numbers[i][1]
        if budget < 0:
            break
        taken.append(i)
    return sorted(taken)


@given(NUMBERS, st.integers(0, 200), st.booleans())
@settings(max_examples=150, deadline=None)
def test_two_passes_select_what_a_full_sort_selects(numbers, budget, high):
    found = np.concatenate(list(cut.best(in_blocks(numbers), budget, high=high)))
    assert found.tolist() == by_sorting(numbers, budget, high)


@pytest.fixture(scope="module")
def table(place, pool):
    return Table(pool, scored.Scored(place / "scores", pool))


@pytest.mark.parametrize("keep", [0.3, 0.5, 1])
@pytest.mark.parametrize("better", ["high", "low"])
def test_a_share_of_the_rows_is_kept(table, keep, better):
    numbers = [(float(x), 1) for x in table.facts["score"]]
    expected = by_sorting(numbers, int(keep * len(numbers)), better == "high")
    assert select(table, Rule(keep=keep, better=better)).tolist() == expected


def test_a_token_budget_is_not_passed(table):
    numbers = list(zip(table.facts["score"].tolist(), table.facts["tokens"].tolist(), strict=True))
    rows = select(table, Rule(tokens=1000))
    assert rows.tolist() == by_sorting(numbers, 1000, True)
    assert table.facts["tokens"][rows].sum() <= 1000


def test_a_threshold_keeps_what_reaches_it(table):
    middle = float(np.sort(table.facts["score"])[10])
    assert (
        select(table, Rule(threshold=middle, better="low")).tolist()
        == np.flatnonzero(table.facts["score"] <= middle).tolist()
    )
    with pytest.raises(UserError, match="none is kept"):
        select(table, Rule(threshold=1e9))


def test_a_quota_lets_parts_compete_with_themselves(table):
    rows = select(table, Rule(keep=0.2, quota={"prose": 0.75, "rubbish": 0.25}))
    whole = int(0.2 * len(table))
    of = table.facts["part"]
    for part, share in (("prose", 0.75), ("rubbish", 0.25)):
        number = table.parts.index(part)
        mine = np.flatnonzero(of == number)
        best = mine[np.argsort(-table.facts["score"][mine], kind="stable")][: int(share * whole)]
        assert set(rows[of[rows] == number]) == set(best)
    assert len(rows) == int(0.75 * whole) + int(0.25 * whole)
    with pytest.raises(UserError, match="no part 'verse'"):
        select(table, Rule(keep=0.5, quota={"verse": 1.0}))


def test_the_report_counts_what_was_found(place, pool, table):
    rows = select(table, Rule(keep=0.5))
    found = of_selection(table, rows, "gap", "high", ["rubbish"])
    kept, lost = Counter(), Counter()
    for i in range(len(pool)):
        for document, start, end in pool.spans[i]:
            side = kept if i in set(rows.tolist()) else lost
            side[pool.manifest["parts"][pool.texts.parts[document]]] += int(end) - int(start)
    assert {n: part["kept_bytes"] for n, part in found["parts"].items() if part["kept_bytes"]} == dict(kept)
    assert found["unwanted"]["recall"] == pytest.approx(lost["rubbish"] / (lost + kept)["rubbish"])
    assert found["unwanted"]["precision"] == pytest.approx(lost["rubbish"] / lost.total())
    assert found["best"][0]["score"] == table.facts["score"].max() and sum(found["histogram"]["kept"]) == len(rows)


def test_functions_of_directories_do_what_stages_do(place, pool, tmp_path):
    """As the documentation of `distill.refine` has it, with plain strings; what is held out stays whole."""
    for name in ("teacher", "reference"):
        scoring.score(pool, str(place / name), str(tmp_path / "scores" / name))
    scored.describe(str(tmp_path / "scores"), kind="nll_gap", per="token")
    found = refine(str(place / "pool"), str(tmp_path / "scores"), str(tmp_path / "better"), Rule(keep=0.5))
    rewriting.retokenize(str(tmp_path / "better"), str(tmp_path / "rows"), plain_tokenizer(), length=64)
    rewriting.retokenize(str(place / "pool"), str(tmp_path / "all"), plain_tokenizer(), length=64)
    rewriting.mix(str(tmp_path / "rows"), str(tmp_path / "mixed"), {str(tmp_path / "all"): 0.5})
    assert found["kept"] == len(pool) // 2 == len(corpus.open(tmp_path / "better"))
    assert spelled(tmp_path / "better", "heldout") == spelled(place / "pool", "heldout")
    assert len(corpus.open(tmp_path / "mixed")) == 2 * len(corpus.open(tmp_path / "rows"))


# --- text -------------------------------------------------------------------------------------------------------------


def spelled(path, side="train"):
    """All text of all rows, letter by letter."""
    text = corpus.open(path, side)
    return Counter("".join(piece for i in range(len(text)) for piece in text.pieces(i)))


def test_every_row_says_which_text_it_stands_for(pool):
    """The tokens of a piece's text are the ids of its segment; together the pieces are the documents."""
    parts = {}
    for i in range(len(pool)):
        ids, segments = pool.row(i)
        for number, (text, (document, start, _)) in enumerate(zip(pool.pieces(i), pool.spans[i], strict=True), 1):
            assert pool.tokenizer(text).input_ids == ids[segments == number].tolist()
            parts.setdefault(int(document), []).append((int(start), text))
    joined = ["".join(text for _, text in sorted(parts[n])) for n in sorted(parts)]
    assert joined == [text for text, _ in pool.documents()] and max(map(len, parts.values())) > 2


def gathered(pool, rows, out):
    gather(out, {"train": [Chosen(pool, np.array(rows))]}, {})
    return corpus.open(out)


def test_selected_rows_are_the_same_rows_with_their_text(pool, tmp_path):
    rows = list(range(0, len(pool), 3))
    made = gathered(pool, rows, tmp_path / "made")
    for new, old in enumerate(rows):
        assert all((a == b).all() for a, b in zip(made.row(new), pool.row(old), strict=True))
        assert made.pieces(new) == pool.pieces(old)
        of = [[text.manifest["parts"][text.texts.parts[n]] for n, _, _ in text.spans[i]]
              for text, i in ((made, new), (pool, old))]  # fmt: skip
        assert of[0] == of[1]
    assert sum(len(text.encode()) for text, _ in made.documents()) == sum(
        len(text.encode()) for i in rows for text in pool.pieces(i)
    )


def test_all_rows_together_are_all_documents(pool, tmp_path):
    made = gathered(pool, range(len(pool)), tmp_path / "made")
    assert made.documents() == pool.documents() and made.tokens == pool.tokens
    assert made.digest == pool.digest  # so scores of one are scores of the other


def test_many_shards_of_chosen_rows_are_one_corpus(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.corpus.rows.SHARD", 5 * LENGTH)
    monkeypatch.setattr("distill.refine.gather.STEP", 7)
    made = gathered(pool, range(1, len(pool), 2), tmp_path / "made")
    assert len(list((tmp_path / "made").glob("train-*.ids.npy"))) > 4
    assert all((made.row(i)[0] == pool.row(2 * i + 1)[0]).all() for i in range(len(made)))


@pytest.mark.parametrize("length", [16, 64])
def test_other_tokens_stand_for_the_same_text(place, tmp_path, length):
    """Selected, written in bytes, and back again: not a letter more or less, on both sides."""
    pool = corpus.open(place / "pool")
    held = corpus.open(place / "pool", "heldout")
    sides = {"train": [Chosen(pool, np.arange(0, len(pool), 2))], "heldout": [Chosen(held, np.arange(len(held)))]}
    gather(tmp_path / "half", sides, {})
    rewriting.retokenize(tmp_path / "half", tmp_path / "bytes", plain_tokenizer(), length=length)
    rewriting.retokenize(tmp_path / "bytes", tmp_path / "back", tokens.load(place / "teacher"), length=LENGTH)
    for side in ("train", "heldout"):
        assert spelled(tmp_path / "half", side) == spelled(tmp_path / "bytes", side) == spelled(tmp_path / "back", side)
        documents = [sorted(corpus.open(tmp_path / name, side).documents()) for name in ("half", "bytes", "back")]
        assert documents[0] == documents[1] == documents[2]
    assert corpus.open(tmp_path / "bytes").length == length


def test_rows_keep_their_class(place, tmp_path):
    """Also when a class has no row left: a head knows classes by their places."""
    spec = CorpusSpec(source=str(place / "pool.jsonl"), tokenizer="t", length=64, heldout=0, packed=False, label="part")
    corpus.prepare(spec, place / "teacher", tmp_path / "pool")
    pool = corpus.open(tmp_path / "pool")
    rows = [i for i in range(len(pool)) if pool.classes[pool.labels[i]] != "prose"][::2]
    made = gathered(pool, rows, tmp_path / "made")
    assert made.classes == pool.classes and made.labels.tolist() == pool.labels[rows].tolist()
    rewriting.retokenize(tmp_path / "made", tmp_path / "bytes", plain_tokenizer())
    again = corpus.open(tmp_path / "bytes")
    parts = [again.manifest["parts"][again.texts.parts[again.spans[i][0, 0]]] for i in range(len(again))]
    assert again.classes == made.classes and [again.classes[label] for label in again.labels] == parts


def test_a_new_tokeniser_is_learned_from_what_is_left(place, tmp_path):
    from distill.specs import TrainTokenizer

    rewriting.retokenize(place / "pool", tmp_path / "made", train=TrainTokenizer(vocab=300, kind="bpe"))
    made = corpus.open(tmp_path / "made")
    assert len(made.tokenizer) <= 300 and made.length == LENGTH
    assert spelled(tmp_path / "made") == spelled(place / "pool")


def test_a_mix_has_its_shares_and_no_row_twice(place, pool, tmp_path):
    for name, rows in (("one", range(0, 30)), ("two", range(30, 50))):
        gathered(pool, rows, tmp_path / name)
    rewriting.mix(tmp_path / "one", tmp_path / "mixed", {tmp_path / "two": 0.6})
    made = corpus.open(tmp_path / "mixed")
    keys = [key.tobytes() for key in row_keys(*made.block(range(len(made))))]
    two = {key.tobytes() for key in row_keys(*pool.block(range(30, 50)))}
    assert len(keys) == len(set(keys)) == 33 and sum(key in two for key in keys) == 20  # all of the scarcer one


def test_copies_have_other_words_where_words_were_and_nothing_held_out_has_any(place, tmp_path):
    from distill.specs import TrainTokenizer

    rewriting.retokenize(place / "pool", tmp_path / "pool", train=TrainTokenizer(vocab=300, kind="bpe"))
    for out in ("more", "again"):
        found = rewriting.augment(tmp_path / "pool", tmp_path / out, copies=3, share=0.4, seed=1)
    pool, made, again = (corpus.open(tmp_path / name) for name in ("pool", "more", "again"))
    assert made.digest == again.digest and found["rows"]["train"] == len(made)
    assert spelled(tmp_path / "more", "heldout") == spelled(tmp_path / "pool", "heldout")
    assert list(made.texts)[::4] == list(pool.texts)
    pairs = [(text, made.texts[4 * i + n]) for i, text in enumerate(pool.texts) for n in (1, 2, 3)]
    assert all(rewriting.WORD.sub("", text) == rewriting.WORD.sub("", copy) for text, copy in pairs)
    words = [words for pair in pairs for words in zip(*map(rewriting.WORD.findall, pair), strict=True)]
    assert sum(one != other for one, other in words) / len(words) == pytest.approx(0.4, abs=0.03)
    assert {other for one, other in words if one != other} <= set(rewriting.whole_words(made.tokenizer.get_vocab()))


@pytest.mark.parametrize("pieces, words", [
    (["the", "##ing", "cat", "[CLS]", "ab", "a1b", "über"], ["cat", "the", "über"]),
    (["ing", "Ġthe", "Ġcat", "Ġab", "Ġ12"], ["cat", "the"]),
    (["ing", "▁the", "▁"], ["the"]),
])  # fmt: skip
def test_words_of_a_vocabulary_are_those_that_begin_one(pieces, words):
    assert rewriting.whole_words(pieces) == words


def test_a_vocabulary_without_words_gives_no_copies(place, tmp_path):
    with pytest.raises(UserError, match="this one has none"):
        rewriting.augment(place / "pool", tmp_path / "more")


def test_corpora_of_other_tokens_are_not_mixed(place, tmp_path):
    rewriting.retokenize(place / "pool", tmp_path / "bytes", plain_tokenizer())
    with pytest.raises(UserError, match="another tokeniser"):
        rewriting.mix(place / "pool", tmp_path / "mixed", {tmp_path / "bytes": 0.5})


# --- sources ----------------------------------------------------------------------------------------------------------


def test_sources_of_one_corpus_share_no_row_and_name_their_part(place, tmp_path):
    for part in ("prose", "rubbish"):
        lines = [json.dumps({"text": text}) for text, of in texts() if of == part]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    source = {"good": str(tmp_path / "prose.jsonl"), "bad": {"source": str(tmp_path / "rubbish.jsonl"), "limit": 9}}
    spec = CorpusSpec(source=source, tokenizer="t", length=LENGTH, heldout=0)
    corpus.prepare(spec, place / "teacher", tmp_path / "made")
    made, parts = corpus.open(tmp_path / "made"), Counter()
    for i in range(len(made)):
        (part,) = {made.manifest["parts"][made.texts.parts[document]] for document, _, _ in made.spans[i]}
        parts[part] += len(made.spans[i])
    assert set(parts) == {"good", "bad"} and Counter(part for _, part in made.documents())["bad"] == 9


def test_noise_is_always_the_same_and_of_every_kind():
    some = [document for document, _ in zip(noise.documents(), range(40), strict=False)]
    assert some == [document for document, _ in zip(noise.documents(), range(40), strict=False)]
    assert Counter(document.part for document in some) == dict.fromkeys(noise.KINDS, 10)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, fields, words", [
    ("select", {"by": "s", "keep": 0}, "greater than 0"),
    ("select", {"by": "s", "keep": 1.01}, "less than or equal to 1"),
    ("select", {"by": "s"}, "exactly one of keep, threshold, tokens is needed, found none"),
    ("select", {"by": "s", "keep": 0.5, "tokens": 9}, "found keep and tokens"),
    ("select", {"by": "s", "threshold": 0.1, "quota": {"a": 1.0}}, "a threshold keeps no set share"),
    ("select", {"by": "s", "keep": 0.5, "quota": {"a": 0.7, "b": 0.7}}, "add up to 1.4"),
    ("score", {"teacher": "t"}, "nll_gap compares the teacher with a reference"),
    ("score", {"teacher": "t", "reference": "r", "kind": "nll"}, "nll is the score of one model"),
    ("score", {"teacher": "t", "kind": "nll", "k": 5}, "k: nll counts every token"),
    ("retokenize", {"to": "m", "like": "c"}, "found to and like"),
    ("mix", {"with": {"a": 0.5, "b": 0.5}}, "leaves this corpus nothing"),
    ("augment", {"share": 0}, "greater than 0"),
    ("augment", {"copies": 0}, "greater than 0"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_in_the_recipe(op, fields, words):
    with pytest.raises(ValueError, match=words):
        OPS[op].model_validate(fields)


# --- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_shows_what_was_kept_and_no_text_breaks_out_of_it(tmp_path, table):
    found = of_selection(table, select(table, Rule(keep=0.5)), "gap", "high", ["rubbish"])
    found["best"][0]["text"] = "a | b <script>x</script> `c` **d** \n## e \x07"
    for seed in (0, 1):
        (tmp_path / f"refined@{seed}").mkdir()
        files.write_json(tmp_path / f"refined@{seed}" / "stage.json", {"metrics": {"select": found}})
    (tmp_path / "student").mkdir()
    files.write_json(tmp_path / "student" / "stage.json", {"metrics": {"steps": 3}})
    told = refinement.gather(tmp_path)
    refinement.write(tmp_path, told)
    text = (tmp_path / "refined@1" / "refinement.md").read_text()
    assert "a \\| b &lt;script&gt;x&lt;/script&gt; \\`c\\` \\*\\*d\\*\\*  \\#\\# e" in text and "\x07" not in text
    assert (tmp_path / "refined@1" / "refinement.png").stat().st_size > 1000
    section = "\n".join(refinement.section(told))
    spotted = found["unwanted"]
    assert f"{spotted['precision']:.1%} and {spotted['recall']:.1%}, " in section and "(one pair a seed)" in section
    assert list(refinement.section({})) == []


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(place, tmp_path):
    """Two seeds of it, with models that are there already; what is learned from the text is not part of it."""
    content = f"""
recipe: refined
seeds: 2
models: {{teacher: {place}/teacher, reference: {place}/reference}}
corpora:
  pool: {{source: {place}/pool.jsonl, tokenizer: teacher, length: {LENGTH}, heldout: 0.2}}
  letters: {{source: {place}/pool.jsonl, tokenizer: {{train: {{vocab: 280, kind: bpe}}}}, length: 64, heldout: 0.2}}
stages:
- id: gap
  data: {{from: pool, ops: [{{score: {{teacher: teacher, reference: reference, per: token}}}}]}}
- id: refined
  data:
    from: pool
    ops: [{{select: {{by: gap, keep: 0.5, unwanted: [rubbish]}}}}, {{retokenize: {{like: letters, length: 64}}}}]
- id: mixed
  data: {{from: refined, ops: [{{mix: {{with: {{letters: 0.5}}}}}}]}}
"""
    (tmp_path / "recipe.yaml").write_text(content)
    return tmp_path / "recipe.yaml"


def test_a_run_scores_selects_and_writes_in_other_tokens(recipe, place, pool, tmp_path, capsys):
    stages.run(recipes.load(recipe), tmp_path / "run")
    made, letters = (corpus.open(tmp_path / "run" / name) for name in ("refined@1/corpus", "corpora/letters"))
    assert tokens.digest(made.tokenizer) == letters.manifest["tokenizer_digest"] != pool.manifest["tokenizer_digest"]
    scores_of = scored.Scored(tmp_path / "run" / "gap@1" / "scores", pool)  # prepared elsewhere, but of the same rows
    chosen = gathered(pool, select(Table(pool, scores_of), Rule(keep=0.5)), tmp_path / "chosen")
    assert sorted(made.documents()) == sorted(chosen.documents())
    told = files.read_json(tmp_path / "run" / "refined@0" / "stage.json")["metrics"]
    assert told["select"]["kept"] == len(pool) // 2 and told["select"]["unwanted"]["parts"] == ["rubbish"]
    assert not list((tmp_path / "run").glob("*/refining"))
    capsys.readouterr()
    stages.run(recipes.load(recipe), tmp_path / "run")
    assert capsys.readouterr().err.count("not run again") == 6


def test_a_selection_by_scores_of_another_corpus_is_refused_beforehand(recipe, tmp_path):
    changed = ["stages.refined.data.from=letters"]
    with pytest.raises(UserError, match="gap has scored pool, this one selects from letters"):
        stages.run(recipes.load(recipe, changed), tmp_path / "run")


def test_rows_of_other_lengths_are_not_mixed(recipe, tmp_path):
    changed = ["corpora.letters.length=48"]
    with pytest.raises(UserError, match="rows of letters have 48 tokens, these 64"):
        stages.run(recipes.load(recipe, changed), tmp_path / "run")


def test_names_that_nothing_has_are_refused(recipe):
    with pytest.raises(UsageError) as caught:
        recipes.load(recipe, ["stages.mixed.data.ops=[{mix: {with: {lettres: 0.5}}}]", "stages.gap.data.from=poole"])
    assert "no corpus 'lettres'; did you mean 'letters'" in str(caught.value)
    assert "no corpus or collection 'poole'" in str(caught.value)


@pytest.mark.parametrize("name", ["miniplm", "paper/miniplm"])
def test_what_makes_miniplm(name):
    """Half of the pool by a difference of means, no teacher in training, as many steps on all of it."""
    found = recipes.load(Path(__file__).parents[1] / "recipes" / f"{name}.yaml")
    (_, score), (_, chosen) = found.stage("gap").data.operations()[0], found.stage("refined").data.operations()[0]
    assert (score.kind, chosen.keep, chosen.better, chosen.order) == ("nll_gap", 0.5, "high", "corpus")
    student, scratch = (found.stage(name).train for name in ("student", "scratch"))
    assert not student.targets and student.stop == scratch.stop and student.optim == scratch.optim
    assert (student.corpus, found.equal) == ("refined", "steps")
    assert found.text(student.corpus).tokenizer == found.text(scratch.corpus).tokenizer
