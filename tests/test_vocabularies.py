"""Laws of the vocabulary check: it says same only where every id means the same, and why not where it does not."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import transformers
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from distill.corpus import vocabulary
from distill.teachers import vocabularies
from growth.errors import UserError

TEXTS = ["The cat sat on the mat, didn't it? ", "naïve café 日本語 🙂 straße ﬁne ½ x = f(1, 23) 12345678\n"] * 20
KINDS = ("bpe", "wordpiece", "unigram")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return vocabulary.train(request.param, 330, TEXTS)


@pytest.fixture(scope="module")
def bpe():
    return vocabulary.train("bpe", 330, TEXTS)


def rebuilt(tokenizer, change=lambda content: None, **names):
    """The same tokeniser with its tokenizer.json edited."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    raw = Tokenizer.from_str(json.dumps(content))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, **{**{k: str(v) for k, v in tokenizer.special_tokens_map.items()}, **names}
    )


def match(student, teacher, rows=None, teacher_rows=None):
    size = len(student)
    return vocabularies.match(student, teacher, rows or size, teacher_rows or len(teacher))


def test_a_tokeniser_is_the_same_as_itself_and_as_its_copy(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for other in (tokenizer, copy.deepcopy(tokenizer), transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert match(tokenizer, other) == vocabularies.Match(rows=len(tokenizer))


def test_rows_behind_the_last_piece_are_padding_on_either_side(tokenizer):
    n = len(tokenizer)
    for rows in ((n + 7, n), (n, n + 50), (n + 7, n + 50)):
        assert match(tokenizer, tokenizer, *rows) == vocabularies.Match(rows=n, padded=True)
    assert "the teacher's head has" in match(tokenizer, tokenizer, n, n - 1).reason


def test_two_pieces_that_changed_places_are_found_and_named(bpe):
    def swapped(content):
        vocab = content["model"]["vocab"]
        vocab["e"], vocab["t"] = vocab["t"], vocab["e"]

    found, (e, t) = match(bpe, rebuilt(bpe, swapped)), bpe.convert_tokens_to_ids(["e", "t"])
    assert not found and found.rows == 0
    assert f"2 of {len(bpe)} ids are of other pieces, first {min(e, t)} is" in found.reason
    with pytest.raises(UserError, match=r"different vocabularies: 2 of .*`aligned` divergence"):
        found.refuse()


def test_real_pieces_behind_the_others_are_no_padding(bpe):
    more = copy.deepcopy(bpe)
    more.add_tokens(["<|chat|>"])
    assert "1 of" in match(bpe, more).reason and "nothing and '<|chat|>'" in match(bpe, more).reason
    assert not match(more, bpe) and not match(bpe, more, teacher_rows=400)


def without_merge(content):
    merges = content["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


def digits_apart(content):
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "becomes"),
        (lambda c: c.update(normalizer={"type": "NFKC"}), "becomes"),
        (lambda c: c.update(normalizer={"type": "NFD"}), "becomes"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "becomes"),
        (digits_apart, "becomes"),
        (without_merge, "other merges"),
        (lambda c: c["model"].update(ignore_merges=True), "other ignore_merges"),
    ],
)
def test_the_same_pieces_put_together_otherwise_are_different(bpe, change, said):
    found = match(bpe, rebuilt(bpe, change))
    assert not found and f"the same pieces, but {'other' if 'other' in said else ''}" in found.reason
    assert said in found.reason


def test_other_scores_of_unigram_pieces_are_different():
    one = vocabulary.train("unigram", 200, TEXTS)

    def rescored(content):
        content["model"]["vocab"][50][1] -= 0.5

    assert "other scores" in match(one, rebuilt(one, rescored)).reason


@pytest.mark.parametrize("role", ["eos_token", "mask_token", "unk_token"])
def test_another_token_in_a_role_is_different_and_padding_is_none(bpe, role):
    other = rebuilt(bpe, **{role: "<pad>"})
    assert f"the {role.replace('_', ' ')} is" in match(bpe, other).reason
    assert match(bpe, rebuilt(bpe, pad_token="<mask>"))


def test_another_frame_is_different(bpe):
    other = rebuilt(bpe, lambda content: content.update(post_processor=None))
    assert "a text is put between ['<s>', '</s>'] for the student and [] for the teacher" in match(bpe, other).reason


def test_an_added_token_that_takes_its_blanks_is_different(bpe):
    one, other = copy.deepcopy(bpe), copy.deepcopy(bpe)
    one.add_tokens([AddedToken("<x>", normalized=False)])
    other.add_tokens([AddedToken("<x>", lstrip=True, normalized=False)])
    assert match(one, copy.deepcopy(one)) and "'a <x> b<x>c' becomes" in match(one, other).reason


def test_a_change_of_notation_alone_is_no_difference(bpe):
    def wrapped(content):
        content["normalizer"] = {"type": "Sequence", "normalizers": []}
        content["pre_tokenizer"]["trim_offsets"] = False
        content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]

    assert match(bpe, rebuilt(bpe, wrapped))


def test_directories_are_compared_without_weights(tmp_path, bpe):
    for name, size in (("student", 330), ("teacher", 384)):
        tiny.config("llama", vocab_size=size).save_pretrained(tmp_path / name)
        bpe.save_pretrained(tmp_path / name)
    found = vocabularies.compare(tmp_path / "student", tmp_path / "teacher")
    assert found == vocabularies.Match(rows=len(bpe), padded=True)
    vocabulary.train("bpe", 300, TEXTS).save_pretrained(tmp_path / "teacher")
    assert not vocabularies.compare(tmp_path / "student", tmp_path / "teacher")
    (tmp_path / "student" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no vocab_size"):
        vocabularies.compare(tmp_path / "student", tmp_path / "teacher")


def test_the_kinds_of_tokenisers_are_different_from_each_other():
    made = [vocabulary.train(kind, 330, TEXTS) for kind in KINDS]
    assert not any(match(one, other) for one in made for other in made if one is not other)


def test_a_wordpiece_tokeniser_that_keeps_capitals_is_different():
    one = vocabulary.train("wordpiece", 330, TEXTS)
    cased = copy.deepcopy(one)
    cased.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    spaced = copy.deepcopy(one)
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert match(one, copy.deepcopy(one)) and not match(one, cased) and not match(one, spaced)
