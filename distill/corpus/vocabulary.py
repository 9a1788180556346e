"""Tokenisers trained on a corpus: BPE, WordPiece and unigram, the same pieces from the same texts.

The trainers of `tokenizers` walk hash maps in an order that changes from process to process: BPE does not care,
WordPiece numbers its letters by it and unigram sums floats in it (measured with 0.23: three runs, three tokenisers).
Hence the letters are numbered beforehand for WordPiece, and unigram is counted here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, chain

from growth.errors import UserError

BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
ROBERTA = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>",
           "cls_token": "<s>", "sep_token": "</s>"}  # fmt: skip

CHARACTERS = 500_000  # of the most frequent words, of which unigram pieces are made: memory stays bounded
LONGEST_PIECE, SEEDS, KEPT = 16, 10, 0.75  # characters; candidates for each piece wanted; share kept in a round


def train(kind: str, size: int, texts: Sequence[str]):
    """A transformers tokeniser of at most `size` pieces, special tokens for masked and causal models among them."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    names = BERT if kind == "wordpiece" else ROBERTA
    special = list(dict.fromkeys(names.values()))
    raw = KINDS[kind](size, special, texts)
    first, last = names["cls_token"], names["sep_token"]
    raw.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, raw.token_to_id(token)) for token in (first, last)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def _bpe(size: int, special: list[str], texts: Sequence[str]):
    """Byte-level BPE: no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check(size, len(special) + len(letters))
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False),
    )
    return raw


def _wordpiece(size: int, special: list[str], texts: Sequence[str]):
    """BERT's, lower case."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def blank(vocabulary: dict[str, int] | None = None):
        raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        raw.normalizer = normalizers.BertNormalizer(lowercase=True)
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        return raw

    raw = blank()
    letters = sorted(set().union(*(raw.normalizer.normalize_str(text) for text in texts)) - {" "})
    _check(size, len(special) + 2 * len(letters))
    numbered = special + letters + [f"##{letter}" for letter in letters]
    settings = {"vocab_size": size, "special_tokens": numbered, "show_progress": False}
    raw.train_from_iterator(texts, trainers.WordPieceTrainer(**settings))
    trained = blank(raw.get_vocab(with_added_tokens=True))
    trained.add_special_tokens(special)  # and not the letters
    return trained


def _unigram(size: int, special: list[str], texts: Sequence[str]):
    """Unigram pieces (Kudo 2018, arXiv 1804.10959): by the best segmentation of each word instead of all of them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    def model(counts: Counter[str]):
        total = sum(counts.values())
        scored = [(piece, math.log(n / total)) for piece, n in counts.items()]
        raw = Tokenizer(models.Unigram([(token, 0.0) for token in special] + scored, unk_id=special.index("<unk>")))
        raw.normalizer, raw.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        raw.decoder = decoders.Metaspace()
        return raw

    words = _words(normalizers.NFKC(), pre_tokenizers.Metaspace(), texts)
    counts = _seeds(words, SEEDS * size)
    letters = {piece for piece in counts if len(piece) == 1}
    wanted = size - len(special)
    _check(size, len(special) + len(letters))
    while True:
        used = _used(model(counts), words)
        if len(counts) <= wanted:
            break
        keep = max(wanted, round(KEPT * len(counts)))
        longer = sorted(counts.keys() - letters, key=lambda piece: (-used[piece], piece))
        counts = _at_least_once(used, [*sorted(letters), *longer[: keep - len(letters)]])
    trained = model(_at_least_once(used, list(counts)))
    trained.add_special_tokens(special)
    return trained


def _words(normalizer, splitter, texts: Sequence[str]) -> Counter[str]:
    split = (splitter.pre_tokenize_str(normalizer.normalize_str(text)) for text in texts)
    found = Counter(word for word, _ in chain.from_iterable(split))
    common = sorted(found, key=lambda word: (-found[word], word))
    within = bisect_right(list(accumulate(map(len, common))), CHARACTERS)
    return Counter({word: found[word] for word in common[: max(within, 1)]})


def _seeds(words: Counter[str], limit: int) -> Counter[str]:
    """Every letter, and the substrings that cover most text."""
    found: Counter[str] = Counter()
    for word, n in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + LONGEST_PIECE, len(word)) + 1):
                found[word[start:end]] += n
    best = sorted(found.items(), key=lambda item: (len(item[0]) > 1, -item[1] * len(item[0]), item[0]))
    letters = sum(len(piece) == 1 for piece in found)
    return Counter(dict(best[: letters + limit]))


def _used(raw, words: Counter[str]) -> Counter[str]:
    """How often each piece stands in the best segmentations of all words."""
    used: Counter[str] = Counter()
    raw.normalizer = raw.pre_tokenizer = None  # words are both already
    for encoding, n in zip(raw.encode_batch(list(words)), words.values(), strict=True):
        for piece in encoding.tokens:
            used[piece] += n
    return used


def _at_least_once(used: Counter[str], pieces: list[str]) -> Counter[str]:
    return Counter({piece: max(used[piece], 1) for piece in pieces})


def _check(size: int, least: int) -> None:
    if size < least:
        raise UserError(f"tokenizer.train.vocab: {size} is too few; letters and special tokens alone are {least}")


KINDS = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}
