"""Two tokenisations of one text, cut where both have a boundary: spans of the same bytes. No torch.

A boundary is a place in the bytes of the text, or a stretch of them where a tokeniser leaves out blanks. Tokens that
share a character are told apart by the bytes that they stand for; where these are not the text's own (a blank put in
front, one half of a normalised character), a boundary inside is common only to tokenisers that put it the same way.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from distill.corpus import tokens
from growth.errors import UserError

Place = tuple[int, bytes]  # a byte of the text, and what was written there so far that is not the text's own
FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # a byte, for what no piece of a sentencepiece vocabulary spells
END = b"\xff"  # the end-of-text token stands here, behind all text


@dataclass(frozen=True)
class Tokens:
    """Ids [n], the boundary after each token, and which of them count: silent ones are not of the text at all."""

    ids: np.ndarray
    after: list[tuple[Place, Place]]  # the boundary may lie anywhere between the two
    silent: np.ndarray  # special tokens
    spoilt: np.ndarray  # of the text, but nothing can be compared: unknown, half a character, not predicted

    def besides(self, spoilt: np.ndarray) -> Tokens:
        return replace(self, spoilt=self.spoilt | spoilt)


def spans(one: Tokens, other: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """The number of the span of each token, from 0 in the order of the text; -1: of none. [n], [m]"""
    places = [np.flatnonzero(~side.silent) for side in (one, other)]
    common = _common(*([side.after[i] for i in place] for side, place in zip((one, other), places, strict=True)))
    ends = np.array(common, dtype=np.int64).reshape(-1, 2)
    inside = [np.searchsorted(ends[:, k], np.arange(len(place))) for k, place in enumerate(places)]
    good = np.ones(len(ends) + 1, dtype=bool)
    good[-1] = False  # tokens behind the last common boundary
    for side, place, span in zip((one, other), places, inside, strict=True):
        good[span[side.spoilt[place]]] = False
    number = np.where(good, np.cumsum(good) - 1, -1)
    return tuple(
        _put(len(side.ids), place, number[span]) for side, place, span in zip((one, other), places, inside, strict=True)
    )


def _put(n: int, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    out = np.full(n, -1)
    out[places] = values
    return out


def _common(one: list, other: list) -> list[tuple[int, int]]:
    """(i, j): the boundaries after token i and token j are the same place."""
    i = j = 0
    found = []
    while i < len(one) and j < len(other):
        (low, high), (low_, high_) = one[i], other[j]
        if low <= high_ and low_ <= high and low[1] == low_[1]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif high <= high_:
            i += 1
        else:
            j += 1
    return found


class Writing:
    """How a tokeniser writes text."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.is_fast:
            raise UserError("spans of text need a tokeniser with a tokenizer.json; save it as a fast one")
        self.tokenizer, self.facts = tokenizer, tokens.facts(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._unknown, self._end = tokenizer.unk_token_id, tokenizer.eos_token_id

    @cached_property
    def _raw(self):
        """Without what is put around texts: its offsets leave blanks out that its tokens have."""
        from tokenizers import Tokenizer

        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        raw = Tokenizer.from_str(json.dumps({**content, "post_processor": None, "truncation": None, "padding": None}))
        raw.encode_special_tokens = True
        return raw

    @cached_property
    def bytes(self) -> dict[int, bytes]:
        """What each id stands for; nothing where it is special."""
        pieces = {i: piece for piece, i in self.tokenizer.get_vocab().items()}
        added, spell = set(self.tokenizer.added_tokens_decoder), _speller(self._raw)
        spelt = {i: piece.encode() if i in added else spell(piece) for i, piece in pieces.items()}
        return {i: b"" if i in self._special else spelling for i, spelling in spelt.items()}

    def encode(self, text: str) -> Tokens:
        """The tokens of a text, without those that are put around it."""
        found = self._raw.encode(text)
        at = _byte_places(text)
        ids = np.array(found.ids, dtype=np.int64)
        spelt = [self.bytes.get(i, b"") for i in found.ids]
        starts, ends = ([at[pair[side]] for pair in found.offsets] for side in (0, 1))
        after = _boundaries(starts, ends, spelt, at[-1])
        return Tokens(ids, after, np.zeros(len(ids), dtype=bool), np.isin(ids, list(self._special)))

    def read(self, ids: np.ndarray) -> tuple[str, Tokens]:
        """The text that a row of ids stands for, and where its tokens end in it.

        Half a character at either edge, as rows cut out of documents have it, is left out.
        """
        spelt = [self.bytes.get(int(i), b"") for i in ids]
        whole = b"".join(spelt)
        skipped = next((k for k in range(min(4, len(whole))) if whole[k] & 0xC0 != 0x80), 0)
        text, length = _decoded(whole[skipped:])
        places = [n - skipped for n in accumulate(map(len, spelt), initial=0)]
        starts, ends = np.array(places[:-1]), np.array(places[1:])
        # a blank that only tells words apart may be on either side of the boundary
        blank = [self._spaced and s[:1] == b" " and end < length for s, end in zip(spelt[1:], ends, strict=False)]
        after = [((end, b""), (end + more, b"")) for end, more in zip(places[1:], [*blank, False], strict=False)]
        silent = np.array([not s for s in spelt], dtype=bool)
        return text, self.ended(Tokens(np.asarray(ids), after, silent, (starts < 0) | (ends > length)), length)

    def ended(self, seen: Tokens, length: int) -> Tokens:
        """With the end-of-text token behind the text as a token of the text."""
        last = max(np.flatnonzero(~seen.silent), default=-1)
        place = next((i for i in range(last + 1, len(seen.ids)) if last >= 0 and seen.ids[i] == self._end), None)
        if place is None:
            return seen
        after, silent = list(seen.after), seen.silent.copy()
        after[place], silent[place] = ((length, END), (length, END)), False
        return replace(seen, after=after, silent=silent)

    def framed(self, seen: Tokens, length: int, *, end: bool) -> Tokens:
        """With the special tokens that the tokeniser puts around a text, and with `end` the end-of-text token."""
        before, behind = self.facts.prefix, self.facts.suffix + (self.facts.end if end else [])
        nowhere, edges = ((0, b""), (0, b"")), (len(before), len(behind))
        around = [
            np.pad(side, edges, constant_values=value) for side, value in ((seen.silent, True), (seen.spoilt, False))
        ]
        ids = np.concatenate([np.array(before, np.int64), seen.ids, np.array(behind, np.int64)])
        whole = Tokens(ids, [*[nowhere] * edges[0], *seen.after, *[nowhere] * edges[1]], *around)
        return self.ended(whole, length) if end else whole

    @cached_property
    def _spaced(self) -> bool:
        return _kinds(self._raw) <= {"WordPiece"}


def shared(one: Writing, other: Writing) -> np.ndarray:
    """Ids of the same pieces [2, K]: the same bytes, or special tokens of the same role or content."""
    numbered = [{name: i for i, name in _names(side)} for side in (one, other)]
    names = [name for name in numbered[0] if name in numbered[1]]
    return np.array([[side[name] for name in names] for side in numbered], dtype=np.int64).reshape(2, -1)


def _names(side: Writing):
    """(id, what it is): a second token of the same bytes is another one."""
    seen = Counter()
    pieces = side.tokenizer.get_vocab().items()
    for _, i, piece in sorted((FALLBACK.fullmatch(piece) is not None, i, piece) for piece, i in pieces):
        what = side.bytes[i] or (END if i == side.tokenizer.eos_token_id else piece)
        seen[what] += 1
        yield i, (what, seen[what])


# --- bytes ------------------------------------------------------------------------------------------------------------


def _kinds(raw: Any) -> set[str]:
    """The kinds of decoders that a tokeniser puts one after another."""
    decoder = json.loads(raw.to_str())["decoder"] or {}
    return {one["type"] for one in decoder.get("decoders", [decoder]) if one}


def _speller(raw: Any) -> Callable[[str], bytes]:
    """The bytes that a piece stands for, by the kind of tokeniser that it is of."""
    kinds = _kinds(raw)
    if "ByteLevel" in kinds:
        letters = _letters()
        return lambda piece: b"".join(letters.get(letter) or letter.encode() for letter in piece)
    if kinds <= {"WordPiece"}:
        return lambda piece: piece[2:].encode() if piece.startswith("##") else b" " + piece.encode()
    if "BPEDecoder" in kinds:
        return lambda piece: piece.replace("</w>", " ").encode()
    return _sentencepiece


def _sentencepiece(piece: str) -> bytes:
    if byte := FALLBACK.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("\u2581", " ").encode()


def _letters() -> dict[str, bytes]:
    """GPT-2's letters for bytes: those that print are themselves, the others follow from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    numbered = [*zip(plain, plain, strict=True), *((256 + n, b) for n, b in enumerate(others))]
    return {chr(letter): bytes([byte]) for letter, byte in numbered}


def _decoded(data: bytes) -> tuple[str, int]:
    """Text up to the first byte that is none, and its length in bytes."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)  # half a character at the end is left out
    except UnicodeDecodeError as error:
        text = data[: error.start].decode()
    return text, len(text.encode())


def _byte_places(text: str) -> list[int]:
    """Where each character starts, and the end, in bytes [characters + 1]."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return [0, *np.cumsum(sizes).tolist()]


def _boundaries(starts: list[int], ends: list[int], spelt: list[bytes], total: int) -> list[tuple[Place, Place]]:
    """After each token of a text; `starts` and `ends` are bytes of whole characters, which tokens may share."""
    after: list[tuple[Place, Place]] = []
    starts = [*starts, total]
    while (first := len(after)) < len(ends):
        last, end = first, ends[first]
        while last + 1 < len(ends) and starts[last + 1] < end:
            last += 1
            end = max(end, ends[last])
        after += [(place, place) for place in _within(starts[first], end, spelt[first : last + 1])]
        after.append(((end, b""), (starts[last + 1], b"")))
    return after


def _within(start: int, end: int, spelt: list[bytes]) -> list[Place]:
    """After each of the tokens that share characters, but the last."""
    lengths = list(accumulate(map(len, spelt)))
    if all(spelt) and lengths[-1] == end - start:  # their bytes are those of the text
        return [(start + n, b"") for n in lengths[:-1]]
    return [(start, b"".join(spelt[: k + 1])) for k in range(len(spelt) - 1)]
