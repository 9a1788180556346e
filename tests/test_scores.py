"""Laws of the score store: found by content, whole or absent, whoever wrote it and however often it was killed.

torch is imported where it is needed: the processes that are killed here start without it.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.scores import About, Column, Ragged, Reader, Writer, pair_keys, row_keys, shards
from distill.scores import store as scores
from distill.teachers import topk
from growth import files, ranges
from growth.errors import UserError

COLUMNS = {
    "sum": Column("float64", unit="nat"),
    "count": Column("int32"),
    "ids": Column("int32", (3,), ragged=True),
    "hidden": Column("bfloat16", (5,), ragged=True),
    "rest": Column("float16", ragged=True),
}
ANY_KEY = st.binary(min_size=16, max_size=16)
ABOUT = About("test", COLUMNS, [{"model_digest": "a", "tokenizer_digest": "b"}], "c")
WRITER = """
import sys
sys.path[:0] = [sys.argv[1]]
from test_scores import ABOUT, key, row
from distill.scores import Writer
with Writer(sys.argv[2], ABOUT, rank=int(sys.argv[3])) as writer:
    for i in range(int(sys.argv[4]), int(sys.argv[5])):
        if writer.missing(key(i)).any():
            print(i, flush=True)
            writer.add(key(i), row(i))
        if i % 3 == 2:
            writer.flush()
"""


def key(*numbers):
    ids = np.array([[n, 7] for n in numbers]).reshape(-1, 2)
    return row_keys(ids, np.ones_like(ids))


def row(*numbers):
    """The values of these rows, each a function of its number alone; row n has n % 4 tokens."""
    lengths = np.array([n % 4 for n in numbers], dtype=np.int64)
    each = np.repeat(np.array(numbers, dtype=np.int64), lengths)
    hidden = each[:, None] * np.linspace(0.5, 1.5, 5, dtype=np.float32)
    return {
        "sum": np.array(numbers) / 3,
        "count": np.array(numbers, dtype=np.int32),
        "ids": Ragged(each[:, None].astype(np.int32) + np.arange(3, dtype=np.int32), lengths),
        "hidden": Ragged((hidden.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), lengths),
        "rest": Ragged((each / 7).astype(np.float16), lengths),
    }


def assert_rows(found, *numbers):
    expected = row(*numbers)
    for name in found:
        both = (v if isinstance(v, Ragged) else (v,) for v in (found[name], expected[name]))
        for ours, theirs in zip(*both, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def write(path, *numbers, rank=0, about=ABOUT):
    with Writer(path, about, rank) as writer:
        writer.add(key(*numbers), row(*numbers))
    return path


def run(path, rank, first, end, **env):
    tests = os.path.dirname(__file__)
    code = [sys.executable, "-c", WRITER, tests, str(path), str(rank), str(first), str(end)]
    return subprocess.Popen(code, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Keys


def test_a_row_is_its_tokens_and_its_documents_and_not_its_padding():
    ids, segments = np.array([[5, 6, 7, 0, 0]]), np.array([[1, 1, 2, 0, 0]])
    (mine,) = row_keys(ids, segments)
    same = row_keys(np.array([[9, 5, 6, 7]], dtype=np.int32), np.array([[0, 3, 3, 1]]))  # padded left, other numbers
    np.testing.assert_array_equal(same[0], mine)
    others = [([5, 6, 7], [1, 2, 2]), ([5, 6, 7], [1, 1, 1]), ([5, 6, 8], [1, 1, 2]), ([5, 6], [1, 1])]
    assert all((row_keys(np.array([i]), np.array([s]))[0] != mine).any() for i, s in others)


def test_a_pair_of_texts_is_not_its_concatenation():
    keys = pair_keys([("ab", "c"), ("a", "bc"), ("ab", "c"), ("ä", ""), ("", "ä")])
    assert keys.shape == (5, 16) and keys.dtype == np.uint8
    assert len({k.tobytes() for k in keys}) == 4 and (keys[0] == keys[2]).all()


@given(
    st.lists(st.binary(min_size=16, max_size=16), max_size=30),
    st.lists(st.binary(min_size=16, max_size=16), max_size=9),
)
@settings(max_examples=150, deadline=None)
def test_the_index_finds_what_a_dictionary_finds(there, asked):
    there += [k[:15] + b"\0" for k in there[:5]] + [k[:14] + b"\0\0" for k in there[:5]]
    asked += there[::2]
    first = {k: i for i, k in reversed(list(enumerate(there)))}
    found = scores.Index(np.frombuffer(b"".join(there), np.uint8).reshape(-1, 16)).find(
        np.frombuffer(b"".join(asked), np.uint8).reshape(-1, 16)
    )
    assert found.tolist() == [first.get(k, -1) for k in asked]


# Reading what was written


@given(st.lists(st.integers(0, 40), max_size=25), st.lists(st.integers(0, 3), max_size=25), st.randoms())
@settings(max_examples=25, deadline=None)
def test_rows_come_back_in_any_order_however_they_were_cut_into_shards(tmp_path_factory, numbers, ranks, random):
    path = tmp_path_factory.mktemp("store")
    Writer(path, ABOUT)
    for rank, n in zip(ranks, numbers, strict=False):
        write(path, n, n, rank=rank)
    written = sorted({n for _, n in zip(ranks, numbers, strict=False)})
    random.shuffle(written)
    reader = Reader(path)
    assert len(reader) == len(written)
    assert_rows(reader.rows(key(*written)), *written)
    assert_rows(reader.rows(key(*written, *written), ["ids", "sum"]), *written, *written)
    assert not reader.missing(reader.keys).any()


def test_tensors_are_those_that_were_given(tmp_path):
    import torch

    given = torch.tensor([[1.5, -2.0, 3.25, 0.0, 7.0]], dtype=torch.bfloat16)
    values = {**row(5), "hidden": Ragged(given, torch.tensor([1])), "sum": torch.tensor([2.5], dtype=torch.float64)}
    with Writer(tmp_path, ABOUT) as writer:
        writer.add(key(5), values)
    found = Reader(write(tmp_path, 3, 4, 6)).tensors(key(6, 4, 5))
    assert found["hidden"].values.dtype == torch.bfloat16 and torch.equal(found["hidden"].values[2:], given)
    assert found["hidden"].lengths.tolist() == [2, 0, 1] and [len(x) for x in found["ids"].split()] == [2, 0, 1]
    assert found["sum"].tolist() == [2, 4 / 3, 2.5]


def test_shards_are_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    (shard,) = write(tmp_path, 1, 2).glob("*.safetensors")
    assert all(e.start % (e.nbytes // max(math.prod(e.shape), 1)) == 0 for e in ranges.header(shard).values())
    arrays = load_file(shard)
    assert list(arrays["key"].shape) == [2, 16] and arrays["ids.ends"].tolist() == [1, 3]


def test_missing_rows_are_counted_and_a_row_is_written_once(tmp_path):
    write(tmp_path, 1, 2, 3)
    write(tmp_path, 3, 2, 4, rank=1)
    assert sum(len(s) for s in shards.found(tmp_path, COLUMNS)) == 4
    with pytest.raises(UserError, match="lacks 2 of 3 rows"):
        Reader(tmp_path).rows(key(9, 1, 8))


def test_rows_that_two_ranks_wrote_at_once_count_once(tmp_path):
    one, other = Writer(tmp_path, ABOUT, 0), Writer(tmp_path, ABOUT, 1)
    for writer in (one, other):
        writer.add(key(1, 2), row(1, 2))
        assert writer.missing(key(1, 3, 2)).tolist() == [False, True, False]
        writer.flush()
    assert len(Reader(tmp_path)) == 2
    assert_rows(Reader(tmp_path).rows(key(2, 1)), 2, 1)


def test_a_shard_is_written_when_it_is_full_or_old(tmp_path, monkeypatch):
    writer = Writer(tmp_path, ABOUT)
    writer.add(key(1), row(1))
    assert not list(tmp_path.glob("r*"))
    writer.seconds = 0
    writer.add(key(2), row(2))
    writer.seconds = 60
    monkeypatch.setattr(scores, "SHARD_BYTES", 1)
    writer.add(key(3), row(3))
    assert [len(s) for s in shards.found(tmp_path, COLUMNS)] == [2, 1]


def test_the_forecast_is_what_the_disk_holds(tmp_path):
    numbers = range(2000)
    write(tmp_path, *numbers)
    held = sum(p.stat().st_size for p in tmp_path.glob("r*"))
    assert held == pytest.approx(scores.forecast(COLUMNS, 2000, length=1.5), rel=0.01)


# Kills and damage


@pytest.mark.parametrize("point", ["write.before_fsync", "write.before_rename", "scores.after_shard"])
def test_a_kill_loses_the_unfinished_shard_alone_and_the_next_run_scores_only_the_rest(tmp_path, point):
    # the manifest is the first file that is written, so the third is the second shard
    nth = 2 if point == "scores.after_shard" else 3
    killed = run(tmp_path, 0, 0, 10, FAULT=f"{point}:kill:{nth}")
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    whole = 6 if point == "scores.after_shard" else 3
    assert len(Reader(tmp_path)) == whole
    assert len(list(tmp_path.glob("*.tmp-*"))) == (point != "scores.after_shard")
    again = run(tmp_path, 0, 0, 10)
    said, errors = again.communicate()
    assert [int(i) for i in said.split()] == list(range(whole, 10)), errors
    assert not list(tmp_path.glob("*.tmp-*"))
    assert_rows(Reader(tmp_path).rows(key(*range(10))), *range(10))


def test_ranks_write_side_by_side_and_one_of_them_may_die(tmp_path):
    ranks = [run(tmp_path, r, 6 * r, 6 * r + 6, FAULT="write.before_rename:kill:3" if r else "") for r in (0, 1)]
    ends = [rank.wait() for rank in ranks]
    assert ends[0] == 0 and ends[1] in (0, -signal.SIGKILL)
    run(tmp_path, 0, 0, 12).wait()
    scores.seal(tmp_path)
    assert_rows(Reader(tmp_path, ABOUT).rows(key(*range(12))), *range(12))
    assert files.read_json(tmp_path / "manifest.json")["rows"] == 12


def test_a_flipped_bit_is_found_by_reader_and_writer(tmp_path):
    (shard,) = write(tmp_path, 1, 2).glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for use in (Reader, lambda path: Writer(path, ABOUT)):
        with pytest.raises(UserError, match="is damaged; remove it"):
            use(tmp_path)


def test_a_lost_shard_of_a_sealed_store_is_noticed(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    scores.seal(tmp_path)
    next(tmp_path.glob("r*")).unlink()
    with pytest.raises(UserError, match="lacks 1 of its shards"):
        Reader(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corpus_digest": "x"}, "corpus_digest is c, not x"),
        ({"kind": "x"}, "kind is test, not x"),
        ({"producers": [{"model_digest": "x", "tokenizer_digest": "b"}]}, "producers is .*'a'.*not .*'x'"),
        ({"columns": {**COLUMNS, "count": Column("int64")}}, "columns is"),
    ],
)
def test_scores_of_another_corpus_model_or_kind_are_refused(tmp_path, change, said):
    write(tmp_path, 1)
    other = About(**{**{k: getattr(ABOUT, k) for k in ("kind", "columns", "producers", "corpus_digest")}, **change})
    for use in (lambda: Reader(tmp_path, other), lambda: Writer(tmp_path, other)):
        with pytest.raises(UserError, match=f"holds other scores: {said}"):
            use()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["sum", "hidden", "rest"])
def test_scores_that_are_no_numbers_are_refused(tmp_path, name, bad):
    values = row(3, 2)
    bits = {np.nan: 0x7FC0, np.inf: 0x7F80}[bad] if name == "hidden" else bad
    (values[name].values if name != "sum" else values[name])[1] = bits
    with Writer(tmp_path, ABOUT) as writer, pytest.raises(UserError, match=f"column {name}: a score is NaN"):
        writer.add(key(3, 2), values)
    assert not list(tmp_path.glob("r*"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sum", np.zeros(2, np.float32)),
        ("sum", np.zeros((2, 1))),
        ("sum", np.zeros(3)),
        ("ids", np.zeros((2, 3), np.int32)),
        ("ids", Ragged(np.zeros((4, 3), np.int32), np.array([1, 2]))),
        ("sum", Ragged(np.zeros(2), np.array([1, 1]))),
    ],
)
def test_columns_have_one_shape_and_dtype(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"column {name}"):
        Writer(tmp_path, ABOUT).add(key(1, 2), {**row(1, 2), name: value})


# Top-k


def test_a_cached_distribution_is_checked():
    import torch

    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    best = p.topk(2)
    ids, log_probs, rest = best.indices.numpy(), best.values.log().numpy(), (1 - best.values.sum(1)).log().numpy()
    topk.check(ids, log_probs, rest, 4)
    topk.check(ids, log_probs.astype(np.float16), rest.astype(np.float16), 4)
    for wrong, said in [
        ((ids, log_probs, rest, 3), "vocabulary ends at 2"),
        ((ids - 1, log_probs, rest, 4), "ids -1 to"),
        ((ids * 0, log_probs, rest, 4), "twice"),
        ((np.array([[1, 0, 1]]), np.log([[0.3, 0.3, 0.3]]), np.log([0.1]), 4), "twice"),
        ((ids, log_probs, np.log(np.exp(rest) + 0.1), 4), "do not sum to 1: off by up to 0.1"),
        ((ids, log_probs * np.nan, rest, 4), "do not sum"),
    ]:
        with pytest.raises(UserError, match=said):
            topk.check(*wrong)
