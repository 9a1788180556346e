"""What the rest must know of a tokeniser: how it frames a document, and what tells two of them apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

from growth import files
from growth.errors import UserError

PROBES = ("The quick brown fox, aged 12, didn't jump!", " two  spaces\n\tand a tab", "Éclair, Straße, 日本語, 🙂")


@dataclass(frozen=True)
class Facts:
    """What packing and masking must know of a tokeniser; part of the corpus manifest."""

    vocabulary: int
    prefix: list[int]  # before every piece of a document, as the tokeniser itself does it
    suffix: list[int]  # after every piece
    end: list[int]  # once after a document: the end-of-text token of a decoder whose tokeniser adds none
    special: list[int]
    mask: int | None
    pad: int  # some token where there is no padding token: segment ids say what padding is


def load(path: Path):
    """The tokeniser in a directory; its own code is never run and the network is never asked."""
    import transformers

    # one that is all in its tokenizer.json: AutoTokenizer would give it Qwen's normaliser beside a Qwen's config.json
    kind = transformers.PreTrainedTokenizerFast if _is_plain(Path(path)) else transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the libraries below raise on damaged files, bare `Exception` included
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"no usable tokeniser in {path}: {reason}") from error
    # without files, transformers makes a tokeniser from nothing but its special tokens and says no word
    if set(itertools.chain.from_iterable(encode(tokenizer, list(PROBES)))) <= set(tokenizer.all_special_ids):
        raise UserError(f"no usable tokeniser in {path}: it knows no word; are its vocabulary files there?")
    return tokenizer


def _is_plain(path: Path) -> bool:
    settings = path / "tokenizer_config.json"
    return settings.is_file() and files.read_json(settings).get("tokenizer_class") == "TokenizersBackend"


def facts(tokenizer) -> Facts:
    prefix, suffix = _frame(tokenizer)
    end = tokenizer.eos_token_id
    return Facts(
        vocabulary=max(tokenizer.get_vocab().values()) + 1,  # ids may have gaps
        prefix=prefix,
        suffix=suffix,
        end=[] if suffix or end is None else [end],
        special=sorted(set(tokenizer.all_special_ids)),
        mask=tokenizer.mask_token_id,
        pad=next((token for token in (tokenizer.pad_token_id, end) if token is not None), 0),
    )


def digest(tokenizer) -> str:
    """Of what turns text into ids: the pieces, the special tokens, and how a few hard texts come out.

    Not of its files: they change with every release of the libraries that write them.
    """
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return files.digest([pieces, asdict(facts(tokenizer)), encode(tokenizer, list(PROBES))])


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids without special tokens; a `[MASK]` that stands in the text is text."""
    return _encoded(tokenizer, texts).input_ids


def _encoded(tokenizer, texts: list[str]):
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


class Piece(NamedTuple):
    """As much of a document as a row takes: ids with special tokens, and the bytes of the text they stand for.

    The pieces of a document are all of its bytes, each once: a blank between two tokens goes with the one before it.
    """

    ids: list[int]
    start: int
    end: int


def pieces(
    tokenizer, texts: list[str], facts: Facts, length: int, ends: Iterable[bool] = itertools.repeat(True)
) -> Iterator[list[Piece]]:
    """Of each text: one piece, or as many as it needs; none where no token is. `ends`: whether a document ends here."""
    room, found = room_for_text(facts, length), _encoded(tokenizer, texts)
    for i, (text, ids, is_end) in enumerate(zip(texts, found.input_ids, ends, strict=False)):
        end = facts.end if is_end else []
        cuts = range(room, len(ids + end), room) if ids else ()
        places = [0, *_bytes_before(text, [_start(found, i, cut, text) for cut in cuts]), len(text.encode())]
        chunks = [(ids + end)[start : start + room] for start in (0, *cuts)] if ids else []
        yield [
            Piece([*facts.prefix, *chunk, *facts.suffix], *span)
            for chunk, span in zip(chunks, pairwise(places), strict=False)
        ]


def _start(found, i: int, token: int, text: str) -> int:
    """The character that a token of text `i` starts at; tokenisers without a tokenizer.json cannot say."""
    if token >= len(found.input_ids[i]):
        return len(text)
    if not found.is_fast:
        raise UserError("a document is longer than a row, and this tokeniser cannot say where its tokens stand in a "
                        "text; save it as a fast one (tokenizer.json)")  # fmt: skip
    return found.token_to_chars(i, token).start


def _bytes_before(text: str, characters: list[int]) -> list[int]:
    """Bytes before each of these characters, which ascend; where a tokeniser looks back, as far as it was already."""
    bounds = [0, *accumulate(characters, max)]
    return list(accumulate(len(text[start:end].encode()) for start, end in pairwise(bounds)))


def room_for_text(facts: Facts, length: int) -> int:
    framed = len(facts.prefix) + len(facts.suffix)
    if length <= framed:
        raise UserError(f"length: {length} leaves no room for text beside {framed} special tokens; 16 or more would")
    return length - framed


def _frame(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokeniser puts before and after a text."""
    for probe in PROBES:
        bare, framed = encode(tokenizer, [probe])[0], tokenizer(probe).input_ids
        starts = range(len(framed) - len(bare) + 1)
        start = next((i for i in starts if bare and framed[i : i + len(bare)] == bare), None)
        if start is not None:
            return framed[:start], framed[start + len(bare) :]
    raise UserError("the tokeniser gives no tokens for plain English text")
