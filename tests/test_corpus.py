"""Laws of the corpus: what becomes of text on its way into rows, and what bad text gets."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from distill import corpus
from distill.corpus import documents, local, packing, sources, stdlib, streams, synthetic, tokens, vocabulary
from distill.specs import CorpusSpec, NewTokenizer
from growth.errors import UserError

LENGTH = 40


def spec(source, **changes):
    return CorpusSpec(source=str(source), tokenizer="t", length=LENGTH, heldout=0.2).model_copy(update=changes)


def trained(kind, vocab):
    return NewTokenizer(train={"kind": kind, "vocab": vocab})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory: one token a character, [CLS] text [SEP]."""
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts():
    """Short and long documents, some of them twice, some in other letters."""
    short = [" ".join(f"{a * b}" for b in range(2, 2 + a % 23)) for a in range(2, 300)]
    return [*short, *short[::7], *(f"the {text}" for text in short[::3]), *(f"THE  {text}" for text in short[::3])]


@pytest.fixture(scope="module")
def prepared(texts, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write(root / "numbers.jsonl", [{"text": text, "label": len(text.strip()) % 3} for text in texts])
    corpus.prepare(spec(root / "numbers.jsonl"), tokenizer, root / "corpus")
    return root / "corpus"


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def write(path: Path, records: list) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def sides(path):
    return corpus.open(path, "train"), corpus.open(path, "heldout")


def pieces_of(side) -> Counter:
    """Every segment of every row."""
    found = Counter()
    for i in range(len(side)):
        ids, segments = side.row(i)
        found.update(tuple(ids[segments == number]) for number in set(segments) - {0})
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["train", "heldout"])
def test_the_segments_of_the_rows_are_the_pieces_of_the_documents(prepared, side):
    """Nothing lost, nothing twice, no two documents in one segment."""
    rows = corpus.open(prepared, side)
    expected = Counter()
    for text, _ in rows.documents():
        ids = rows.tokenizer(text, add_special_tokens=False).input_ids
        expected.update((tiny.CLS, *ids[i : i + LENGTH - 2], tiny.SEP) for i in range(0, len(ids), LENGTH - 2))
    assert pieces_of(rows) == expected


def test_segments_are_numbered_and_padding_is_zero(prepared):
    rows = corpus.open(prepared)
    for i in range(len(rows)):
        ids, segments = rows.row(i)
        real = segments[segments > 0]
        assert (np.diff(real) >= 0).all() and set(real) == set(range(1, real.max() + 1))
        assert (segments[len(real) :] == 0).all() and (ids[len(real) :] == tiny.PAD).all()


def test_both_sides_together_are_the_text_and_share_no_document(prepared, texts):
    train, heldout = ([text for text, _ in side.documents()] for side in sides(prepared))
    key = lambda text: " ".join(text.casefold().split())  # noqa: E731
    assert not {key(text) for text in train} & {key(text) for text in heldout}
    assert 0.1 < len(heldout) / (len(train) + len(heldout)) < 0.3
    assert sorted("".join(train + heldout).replace(" ", "")) == sorted("".join(texts).replace(" ", ""))


def test_a_document_stays_on_its_side_when_others_go(prepared, texts, tokenizer, tmp_path):
    write(tmp_path / "fewer.jsonl", [{"text": text} for text in texts[::2]])
    corpus.prepare(spec(tmp_path / "fewer.jsonl"), tokenizer, tmp_path / "corpus")
    fewer, all_of_them = ({text for text, _ in sides(path)[1].documents()} for path in (tmp_path / "corpus", prepared))
    assert fewer and fewer <= all_of_them


def test_all_pieces_of_a_long_document_stay_on_one_side(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 100)
    write(tmp_path / "a.jsonl", [{"text": f"{n} " * 200, "label": n} for n in range(10, 40)])
    corpus.prepare(spec(tmp_path / "a.jsonl", heldout=0.5), tokenizer, tmp_path / "corpus")
    train, heldout = (Counter(part for _, part in side.documents()) for side in sides(tmp_path / "corpus"))
    assert train and heldout and not train.keys() & heldout.keys()
    counts = json.loads((tmp_path / "corpus" / "manifest.json").read_text())["source"]
    assert counts["cut"] == (train + heldout).total() - 30 > 100


def test_labels_are_the_parts(prepared):
    assert all(part == str(len(text) % 3) for text, part in corpus.open(prepared).documents())


def test_a_limited_look_at_the_documents_reaches_everywhere(prepared):
    every = corpus.open(prepared).documents()
    some = corpus.open(prepared).documents(10)
    assert len(some) == 10 and set(some) <= set(every)
    assert some[0] == every[0] and every.index(some[-1]) > len(every) // 2
    assert corpus.open(prepared).documents(10**9) == every


def test_unpacked_corpora_have_one_document_a_row(texts, tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", [{"text": text} for text in texts[:50]])
    corpus.prepare(spec(tmp_path / "a.jsonl", packed=False), tokenizer, tmp_path / "corpus")
    rows = corpus.open(tmp_path / "corpus")
    assert all(set(rows.row(i)[1]) <= {0, 1} for i in range(len(rows)))
    assert sum(pieces_of(rows).values()) == len(rows)


def test_many_shards_are_one_corpus(prepared, texts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.corpus.rows.SHARD", 20 * LENGTH)
    source = json.loads((prepared / "manifest.json").read_text())["request"]["source"]
    corpus.prepare(spec(source), tokenizer, tmp_path / "corpus")
    one, many = corpus.open(prepared), corpus.open(tmp_path / "corpus")
    assert len(list((tmp_path / "corpus").glob("train-*.ids.npy"))) > 5
    assert len(one) == len(many)
    assert all((a == b).all() for i in range(len(one)) for a, b in zip(one.row(i), many.row(i), strict=True))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_packing_overfills_no_row_and_leaves_no_two_that_fit_together(lengths):
    rows = packing.best_fit(np.array(lengths), 20)
    filled = np.bincount(rows, weights=lengths)
    assert (filled > 0).all() and filled.max() <= 20
    assert len(filled) < 2 or np.sort(filled)[:2].sum() > 20


def test_packing_wastes_under_one_percent_of_ordinary_text():
    lengths = np.random.default_rng(0).lognormal(3.4, 0.6, 5000).astype(int).clip(3, 128)
    assert lengths.sum() / (128 * (packing.best_fit(lengths, 128).max() + 1)) > 0.99


# --- the same again ---------------------------------------------------------------------------------------------------


def test_a_second_preparation_and_another_process_give_the_same_digest(tokenizer, tmp_path):
    """Another process has other hash seeds, Python's and those of the `tokenizers` library."""
    text = write(tmp_path / "a.jsonl", [{"text": d.text, "label": d.part} for d in islice(synthetic.documents(), 200)])
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "from test_corpus import spec, trained; from distill import corpus\n"
        f"for kind in {list(vocabulary.KINDS)}:\n"
        f"    corpus.prepare(spec({str(text)!r}, tokenizer=trained(kind, 300)), None, Path({str(tmp_path)!r}) / kind)\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=root, capture_output=True)
    for kind in vocabulary.KINDS:
        corpus.prepare(spec(text, tokenizer=trained(kind, 300)), None, tmp_path / "again" / kind)
        for one, other in zip(sides(tmp_path / kind), sides(tmp_path / "again" / kind), strict=True):
            assert one.digest == other.digest
            assert tokens.digest(one.tokenizer) == one.manifest["tokenizer_digest"]


def test_what_is_there_is_not_made_again_and_what_has_changed_is(tokenizer, tmp_path):
    text = write(tmp_path / "a.jsonl", [{"text": "a b c " * n} for n in range(1, 40)])
    corpus.prepare(spec(text), tokenizer, tmp_path / "corpus")
    digest, made = corpus.open(tmp_path / "corpus").digest, (tmp_path / "corpus").stat().st_ino
    corpus.prepare(spec(text), tokenizer, tmp_path / "corpus")
    assert (tmp_path / "corpus").stat().st_ino == made
    write(text, [{"text": "a b d " * n} for n in range(1, 40)])  # of the same length
    corpus.prepare(spec(text), tokenizer, tmp_path / "corpus")
    assert (tmp_path / "corpus").stat().st_ino != made
    assert corpus.open(tmp_path / "corpus").digest != digest


def test_a_damaged_corpus_is_refused_and_made_again(tokenizer, tmp_path):
    text = write(tmp_path / "a.jsonl", [{"text": "a b c " * n} for n in range(1, 40)])
    corpus.prepare(spec(text), tokenizer, tmp_path / "corpus")
    shard = tmp_path / "corpus" / "train-00000.ids.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"train-00000\.ids\.npy has changed"):
        corpus.open(tmp_path / "corpus").verify()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"train-00000\.ids\.npy is missing or not as long"):
        corpus.open(tmp_path / "corpus")
    corpus.prepare(spec(text), tokenizer, tmp_path / "corpus")
    corpus.open(tmp_path / "corpus").verify()


def test_importing_the_corpus_does_not_import_torch():
    program = "import distill.corpus, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- tokenisers -------------------------------------------------------------------------------------------------------


def test_a_decoder_without_padding_token_gets_its_end_of_text_once_a_document(tmp_path):
    """GPT-2's tokeniser: no padding token, and nothing added around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    decoder = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    decoder.save_pretrained(tmp_path / "tokenizer")
    text = write(tmp_path / "a.jsonl", [{"text": "x" * n} for n in range(1, 100)])
    corpus.prepare(spec(text), tmp_path / "tokenizer", tmp_path / "corpus")
    rows, end = corpus.open(tmp_path / "corpus"), decoder.eos_token_id
    found = pieces_of(rows)
    assert sum(n * piece.count(end) for piece, n in found.items()) == len(rows.documents())
    assert all(end not in piece[:-1] for piece in found)
    padding = np.concatenate([ids[segments == 0] for ids, segments in map(rows.row, range(len(rows)))])
    assert len(padding) and set(padding) == {end}
    with pytest.raises(UserError, match="no mask token"):
        corpus.Batches(rows, 0, "mlm")


def test_padding_is_not_masked_even_where_it_is_an_ordinary_token(tmp_path):
    made = tiny.tokenizer()
    made.pad_token = None
    made.save_pretrained(tmp_path / "tokenizer")
    text = write(tmp_path / "a.jsonl", [{"text": "x" * n} for n in range(1, 100)])
    corpus.prepare(spec(text), tmp_path / "tokenizer", tmp_path / "corpus")
    rows = corpus.open(tmp_path / "corpus")
    assert rows.facts.pad not in rows.facts.special
    batch = corpus.Batches(rows, 0, "mlm").at(range(len(rows)), mask=1.0)
    padding = batch["segment_ids"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all()


def test_special_tokens_that_stand_in_a_text_are_text(tmp_path):
    names = ["[MASK] and [SEP] are tokens of BERT"] * 30
    made = vocabulary.train("wordpiece", 100, names)
    ids = tokens.encode(made, names[:1])[0]
    assert not set(ids) & {made.mask_token_id, made.sep_token_id}


@pytest.mark.parametrize("kind", vocabulary.KINDS)
def test_trained_tokenisers_are_of_the_size_asked_for_and_know_their_text(kind):
    text = [document.text for document in islice(synthetic.documents(), 300)]
    made = vocabulary.train(kind, 300, text)
    assert 250 < len(made) <= 300
    for one in text[:20]:
        assert made.unk_token_id not in made(one).input_ids
        assert made.decode(made(one).input_ids, skip_special_tokens=True).replace(" ", "") == one.replace(" ", "")
    facts = tokens.facts(made)
    assert len(facts.prefix) == len(facts.suffix) == 1 and facts.end == [] and facts.mask is not None


def test_too_small_a_vocabulary_is_refused_with_one_that_would_do():
    for kind in vocabulary.KINDS:
        with pytest.raises(UserError, match=r"tokenizer\.train\.vocab: 20 is too few; .* are \d+"):
            vocabulary.train(kind, 20, ["the quick brown fox jumps over the lazy dog"])


@pytest.mark.parametrize("files", [{}, {"config.json": '{"model_type": "bert"}'}, {"tokenizer.json": "{"}])
def test_a_directory_without_a_sound_tokeniser_is_refused(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="no usable tokeniser in"):
        tokens.load(tmp_path)


def test_code_that_comes_with_a_tokeniser_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass T: pass\n")
    with pytest.raises(UserError):
        tokens.load(tmp_path)
    assert not (tmp_path / "canary").exists()


# --- embedded sources -------------------------------------------------------------------------------------------------


def test_the_standard_library_gives_enough_prose_of_many_parts_and_nothing_twice():
    found = list(stdlib.prose())
    parts = Counter(document.part for document in found)
    assert sum(len(document.text.encode()) + 1 for document in found) >= 1_300_000
    assert len(parts) > 100 and sum(n >= 80 for n in parts.values()) >= 20
    assert {"topics", "email", "asyncio", "decimal"} <= parts.keys() and not parts.keys() & stdlib.EXCLUDED
    assert len({document.text for document in found}) == len(found)
    assert all(stdlib.is_prose(document.text) and "\n" not in document.text for document in found)


def test_prose_is_in_one_order_whatever_hash_seed_and_file_system(monkeypatch):
    program = (
        "from distill.corpus import stdlib; from itertools import islice; print(list(islice(stdlib.prose(), 1000)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    other = subprocess.run([sys.executable, "-c", program], check=True, env=environment, capture_output=True, text=True)
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))
    assert other.stdout.strip() == str(list(islice(stdlib.prose(), 1000)))


@pytest.mark.parametrize(
    "text",
    [
        "Return the value.",
        "def compare(left: int, right: int) -> bool, str, (int | None), [x for x in y], {1: 2}, -> or <- and == too",
        "0x20 0x21 0x22 0x23 0x24 0x25 0x26 0x27 0x28 0x29 0x2a 0x2b 0x2c 0x2d 0x2e 0x2f 0x30 0x31 0x32 0x33 0x34",
        "os.path.join os.path.split os.path.exists os_path_islink sys_path_hooks sys_meta_path a_b c_d e_f g_h i_j k_l",
    ],
)
def test_what_is_not_prose_is_left_out(text):
    assert not stdlib.is_prose(text)
    assert stdlib.is_prose("This sentence, which is long enough and made of plain words, is prose as people write it.")


def test_comments_and_docstrings_are_told_from_strings_and_code():
    source = (
        '#!/bin/sh\n"""Doc one.\n\n# not a comment"""\nx = 1  # trailing\n# Block\n# goes on\n\n'
        '# Another\ny = """\n# in a string\n"""\n'
    )
    assert stdlib._prose_blocks(source) == ["Doc one.\n\n# not a comment", "Block\ngoes on", "Another"]


def test_the_code_of_the_library_is_one_document_a_module():
    first, *_ = stdlib.code()
    assert first.part == stdlib.modules()[0][0]
    assert len({path for _, path in stdlib.modules()}) == len(stdlib.modules()) > 300


def test_synthetic_text_has_the_entropy_that_is_printed():
    """The surprise of each text, read off by a parser that is not the generator, has the stated mean."""
    grammar = synthetic.grammar()
    bits = [surprise(grammar, document.text.split()) for document in islice(synthetic.documents(), 2000)]
    words = [len(document.text.split()) for document in islice(synthetic.documents(), 2000)]
    assert abs(np.mean(bits) - grammar.bits) < 4 * np.std(bits) / len(bits) ** 0.5
    assert abs(np.mean(words) - grammar.words) < 4 * np.std(words) / len(words) ** 0.5
    assert f"entropy {grammar.bits:.2f} bits a document" in sources.about(spec("synthetic"))


def surprise(grammar, words: list[str]) -> float:
    """Bits of one text. The next word alone decides which alternative was taken: no text has two derivations."""
    stack, bits = ["text"], 0.0
    for word in words:
        while stack[-1] in grammar.rules:
            fitting = [(p, body) for p, body in grammar.rules[stack.pop()] if word in first(grammar, body)]
            assert len(fitting) == 1
            bits -= np.log2(fitting[0][0])
            stack.extend(reversed(fitting[0][1]))
        assert stack.pop() == word
    assert not stack
    return bits


def first(grammar, body) -> set[str]:
    rules = grammar.rules.get(body[0])
    return {body[0]} if rules is None else set().union(*(first(grammar, inner) for _, inner in rules))


def test_another_seed_is_another_grammar():
    one, other = ([d.text for d in islice(synthetic.documents(seed), 20)] for seed in (0, 1))
    assert one != other and one == [d.text for d in islice(synthetic.documents(0), 20)]


# --- files ------------------------------------------------------------------------------------------------------------


def read(path: Path, field: str = "text") -> list[tuple]:
    return [(document.text.strip(), document.part) for document in local.documents(path, field)]


def test_text_is_cut_at_blank_lines_and_without_any_at_every_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\n \t\nthree\r\n\r\nfour")
    (tmp_path / "b.md").write_bytes(b"one\ntwo\nthree\n")
    assert read(tmp_path / "a.txt") == [("one\ntwo", "a"), ("three", "a"), ("four", "a")]
    assert read(tmp_path / "b.md") == [("one", "b"), ("two", "b"), ("three", "b")]


def test_every_format_says_the_same_packed_or_not(tmp_path):
    texts = ["one", "zwölf\u2028Zeilen", "three"]
    write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    for name in ("a.jsonl", "a.parquet", "a.txt"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(whole))
        half = len(whole) // 2  # two frames, as parallel packers write them
        frames = (zstd(part) for part in (whole[:half], whole[half:]))
        (tmp_path / f"{name}.zst").write_bytes(b"".join(frames))
        for packed in (name, f"{name}.gz", f"{name}.zst"):
            assert read(tmp_path / packed) == [(text, "a") for text in texts], packed


def test_a_directory_is_its_files_in_order_and_labels_are_parts(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    write(tmp_path / "b" / "second.jsonl", [{"body": "two", "label": 7}, {"body": "three"}])
    (tmp_path / "a.txt").write_text("one")
    assert read(tmp_path, "body") == [("one", "a"), ("two", "7"), ("three", "second")]


def test_blank_documents_are_counted_and_left_out(tokenizer, tmp_path):
    texts = ["", "  ", *(f"text {n}" for n in range(40)), None]
    text = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    corpus.prepare(spec(text), tokenizer, tmp_path / "corpus")
    found = json.loads((tmp_path / "corpus" / "manifest.json").read_text())["source"]
    assert (found["blank"], found["documents"], found["words"]) == (3, 40, 80)


def test_limit_takes_the_first_of_a_file_and_a_sample_of_what_is_embedded(tmp_path):
    text = write(tmp_path / "a.jsonl", [{"text": str(n)} for n in range(9)])
    assert [document.text for document in sources.documents(spec(text, limit=3))] == ["0", "1", "2"]
    assert len({d.part for d in sources.documents(spec("synthetic", limit=60))}) == len(synthetic.TOPICS)


@given(st.text(alphabet="ab \n", max_size=500))
def test_pieces_put_together_are_the_text(text):
    longest, documents.LONGEST = documents.LONGEST, 7
    try:
        found = documents.pieces(text)
    finally:
        documents.LONGEST = longest
    assert "".join(found) == text and max(map(len, found)) <= 7


def test_a_line_of_a_million_characters_is_cut_within_a_character_and_kept(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 1_000_000)
    found = list(local.documents(tmp_path / "a.txt", "text"))
    assert "".join(document.text for document in found) == "é" * 1_000_000
    assert [document.continues for document in found] == [False] + [True] * (len(found) - 1) and len(found) >= 10


BAD = {
    "utf8.txt": (b"one\ntwo\n\nbad \xff\n", r"utf8\.txt:4: not UTF-8 \(byte 0xff\)"),
    "cut.txt": (b"one\n\nhalf \xc3", r"cut\.txt:3: not UTF-8 \(byte 0xc3\)"),
    "utf16.txt": ("one".encode("utf-16-le"), r"utf16\.txt:1: a NUL character"),
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', r"utf8\.jsonl:2: not UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": "b"\n', r"broken\.jsonl:2: Expecting"),
    "list.jsonl": (b'["a"]', r"list\.jsonl:1: expected an object .* found a list"),
    "number.jsonl": (b'{"text": 5}', r"number\.jsonl:1: 'text' is of type int, not text"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}', r"twice\.jsonl:1: key 'text' stands twice"),
    "half.jsonl": (b'{"text": "\\ud800"}', r"half\.jsonl:1: half a character"),
    "missing.jsonl": (b'{"txt": "a", "id": 3}', r"missing\.jsonl:1: no 'text' here, only txt, id; .* mean 'txt'"),
    "deep.jsonl": (b"[" * 1_000_000 + b"]" * 1_000_000, r"deep\.jsonl:1: nested too deeply"),
    "plain.txt.gz": (b"not packed at all", r"plain\.txt\.gz: damaged gzip"),
    "short.txt.gz": (gzip.compress(b"one two three")[:-4], r"short\.txt\.gz: damaged gzip"),
    "plain.parquet": (b"PAR1 not really", r"plain\.parquet: not a sound parquet file"),
    "image.png": (b"\x89PNG", r"image\.png: nothing to read here; what can be read: \.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_their_line(name, tmp_path):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_truncated_zstd_file_is_an_error_and_not_the_end(tmp_path):
    data = zstd(os.urandom(400_000).hex().encode())
    for damaged, message in ((data[: len(data) // 2], "ends in the middle of a frame"), (b"plain", "damaged zstd")):
        (tmp_path / "a.txt.zst").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a.txt.zst")


def test_without_its_package_zstd_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.txt\.zst: \.zst needs the package zstandard: pip install zstandard"):
        read(tmp_path / "a.txt.zst")


def test_parquet_columns_that_hold_no_text_are_named(tmp_path):
    parquet.write_table(pyarrow.table({"text": [{"a": 1}], "n": [1]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": [["a"]]}), tmp_path / "list.parquet")
    with pytest.raises(UserError, match="'text' holds list"):
        read(tmp_path / "list.parquet")
    for field, message in (
        ("text", "'text' holds struct<a: int64>"),
        ("n", "'n' holds int64"),
        ("x", "no 'x' here, only text"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            read(tmp_path / "a.parquet", field)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.parquet", "a.parquet.gz"])
def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused_in_bounded_memory(name, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "FREE", 1 << 20)
    line = json.dumps({"text": "a" * 5000}).encode() + b"\n" if "jsonl" in name else b"a" * 5000 + b"\n"
    if "parquet" in name:
        once = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000), pyarrow.array(["a" * 50_000]))
        parquet.write_table(pyarrow.table({"text": once}), tmp_path / "a.parquet")
        line = (tmp_path / "a.parquet").read_bytes() + bytes(10_000_000)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(line * 20_000 if "parquet" not in name else line))
    elif name.endswith(".zst"):
        (tmp_path / name).write_bytes(zstd(line * 20_000))
    tracemalloc.start()
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        for _ in local.documents(tmp_path / name, "text"):
            pass
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


def test_what_a_parquet_file_says_it_unpacks_to_is_asked_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "FREE", 1 << 20)
    parquet.write_table(
        pyarrow.table({"text": ["a" * 5_000_000]}), tmp_path / "a.parquet", use_dictionary=False, compression="zstd"
    )
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *a, **named: pytest.fail("was read"))
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        read(tmp_path / "a.parquet")


def test_a_json_line_longer_than_any_document_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"a" * local.LONGEST_LINE + b'"}')
    with pytest.raises(UserError, match=r"a\.jsonl:1: the line is longer than"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_a_corpus_without_text_is_refused_and_leaves_nothing(content, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=r"a\.txt: no text here"):
        corpus.prepare(spec(tmp_path / "a.txt"), tokenizer, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_too_few_documents_to_hold_some_out_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(UserError, match=r"1 document is too few to hold out 0\.2"):
        corpus.prepare(spec(tmp_path / "a.txt"), tokenizer, tmp_path / "corpus")
    corpus.prepare(spec(tmp_path / "a.txt", heldout=0.0), tokenizer, tmp_path / "corpus")
    with pytest.raises(UserError, match="has no heldout part, only train"):
        corpus.open(tmp_path / "corpus", "heldout")


def test_a_row_too_short_for_text_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match="length: 2 leaves no room for text beside 2 special tokens"):
        corpus.prepare(spec(tmp_path / "a.txt", length=2, heldout=0.0), tokenizer, tmp_path / "corpus")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stdlb", "no source 'stdlb'; did you mean 'stdlib'?"),
        ("./nothing.txt", "nothing.txt does not exist"),
        ("nothing.jsonl", "nothing.jsonl does not exist"),
        ("/no/such/directory", "/no/such/directory does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, message):
    with pytest.raises(UserError, match=re.escape(message)):
        list(sources.documents(spec(source)))


def test_a_data_set_that_cannot_be_reached_is_one_line(monkeypatch):
    import datasets

    def offline(*arguments, **named):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError) as caught:
        list(sources.documents(spec("owner/name")))
    assert str(caught.value) == "data set owner/name: Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"


def test_a_data_set_gives_its_texts_and_the_names_of_its_labels(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", None], "label": [1, 0, None]}, features=features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **named: asked.append((a, named)) or rows)
    found = [tuple(document)[:2] for document in sources.documents(spec("owner/name:small", limit=3))]
    assert found == [("a", "yes"), ("b", "no"), ("", "train")]
    assert asked == [(("owner/name", "small"), {"split": "train", "revision": None, "streaming": True})]
    with pytest.raises(UserError, match="owner/name: row 0: no 'body' here, only text, label"):
        list(sources.documents(spec("owner/name", field="body")))


def test_the_digest_of_prose_is_that_of_its_lines(tokenizer, tmp_path):
    corpus.prepare(spec("synthetic", limit=50), tokenizer, tmp_path / "corpus")
    text = "".join(document.text + "\n" for document in sources.documents(spec("synthetic", limit=50))).encode()
    found = json.loads((tmp_path / "corpus" / "manifest.json").read_text())["source"]
    assert (found["bytes"], found["digest"]) == (len(text), hashlib.sha256(text).hexdigest())


FILLING = """
import os, resource, sys
from pathlib import Path
from distill import corpus
from distill.specs import CorpusSpec
from growth.errors import UserError
source, tokenizer, out = sys.argv[1:]
spec = CorpusSpec(source=source, tokenizer="t", length=40, heldout=0.2)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (int(1.5**i) for i in range(12, 40)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        corpus.prepare(spec, Path(tokenizer), Path(out))
        print("prepared")
        break
    except UserError as error:
        assert str(error).startswith("disk full") and not os.listdir(Path(out).parent), error
        print("full")
"""


def test_a_disk_that_is_full_is_said_and_leaves_nothing_wherever_it_happens(texts, tokenizer, tmp_path):
    write(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    paths = [str(path) for path in (tmp_path / "in.jsonl", tokenizer, tmp_path / "new" / "corpus")]
    done = subprocess.run([sys.executable, "-c", FILLING, *paths], capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    assert done.stdout.split().count("full") > 10 and done.stdout.split()[-1] == "prepared"
