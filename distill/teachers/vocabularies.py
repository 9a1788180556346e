"""Whether two models mean the same by an id: piece by piece, special token by special token, text by text. No weights.

Equal sizes say nothing, and equal pieces not everything: another normaliser, other merges or another special token turn
the same text into other ids. What is not found to be the same is different, with the reason.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from distill.corpus import tokens
from growth import files
from growth.errors import UserError

ROLES = ("bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token")  # padding is what segments say
PROBES = (
    *tokens.PROBES,
    "UPPER lower MiXeD İstanbul ẞ",
    "ﬁne Ｆｕｌｌ ½ ² e\u0301 é ǆ Å",  # what NFC, NFD, NFKC and NFKD take for one
    "don't we'll I'M 12345678 3.14 1,000,000 $5 a_b-c",
    " leading,  double,\ttab,\n\n\nlines \r\n trailing  ",
    "中文字 العربية हिन्दी ไทย 한국어 👩‍👩‍👧 🇩🇪 \u00a0\u200b\u00ad",
    "def f(x):\n        return {x: [1, 2]}  # done\n<a href='b'>&amp;</a>",
)
SPREAD, ADDED = 512, 64  # pieces read back as text; added tokens tried
WORKS = (
    "the `aligned` divergence compares models of different tokenisers over spans of the same text, and texts that the "
    "teacher chose or wrote can be tokenised again"
)


@dataclass(frozen=True)
class Match:
    """`rows`: how many rows of both heads are of the same pieces; those behind them are padding. 0 if different."""

    rows: int = 0
    padded: bool = False
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def refuse(self) -> None:
        if self.reason:
            raise UserError(f"student and teacher have different vocabularies: {self.reason}; {WORKS}")


def compare(student: Path, teacher: Path) -> Match:
    """Of two checkpoint directories with tokenisers; no weight is read."""
    heads = [_head(Path(path)) for path in (student, teacher)]
    return match(*(tokens.load(Path(path)) for path in (student, teacher)), *heads)


def _head(path: Path) -> int:
    size = files.read_json(path / "config.json").get("vocab_size")
    if not isinstance(size, int):
        raise UserError(f"{path}/config.json has no vocab_size")
    return size


def match(student: Any, teacher: Any, student_rows: int, teacher_rows: int) -> Match:
    """Of two tokenisers and the number of rows that the heads of their models have."""
    rows = tokens.facts(student).vocabulary
    reason = next(_differences(student, teacher, student_rows, teacher_rows), "")
    return Match(reason=reason) if reason else Match(rows, max(student_rows, teacher_rows) > rows)


def same(teacher: str) -> str:
    """Why not to compare spans with this teacher."""
    return f"{teacher} has the tokeniser of the corpus; `divergence` compares whole distributions, exactly"


def unread(writer: Any, reader: Any) -> str:
    """Why the ids that one tokeniser writes are not those that a model has learned with another; "" if they are.

    The reader may know more pieces than are written.
    """
    written, known = (_by_id(tokenizer) for tokenizer in (writer, reader))
    return next(_apart(written, {i: piece for i, piece in known.items() if i in written}), "")


def _differences(student: Any, teacher: Any, student_rows: int, teacher_rows: int) -> Iterator[str]:
    yield from _pieces(student, teacher)
    for who, tokenizer, rows in (("student", student, student_rows), ("teacher", teacher, teacher_rows)):
        if rows < (ids := tokens.facts(tokenizer).vocabulary):
            yield f"the {who}'s head has {rows} rows, its tokeniser {ids} ids"
    yield from _roles(student, teacher)
    yield from _rules(student, teacher)
    yield from _texts(student, teacher)


def _pieces(student: Any, teacher: Any) -> Iterator[str]:
    yield from _apart(_by_id(student), _by_id(teacher))


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {i: piece for piece, i in tokenizer.get_vocab().items()}


def _apart(one: dict[int, str], other: dict[int, str]) -> Iterator[str]:
    apart = sorted(i for i in one.keys() | other.keys() if one.get(i) != other.get(i))
    if apart:
        shown = ", ".join(f"{i} is {_shown(one.get(i))} and {_shown(other.get(i))}" for i in apart[:3])
        sizes = "" if len(one) == len(other) else f" ({len(one)} and {len(other)} pieces)"
        yield f"{len(apart)} of {len(one.keys() | other.keys())} ids are of other pieces{sizes}, first {shown}"


def _shown(piece: str | None) -> str:
    return "nothing" if piece is None else repr(piece)


def _roles(student: Any, teacher: Any) -> Iterator[str]:
    for role in ROLES:
        one, other = getattr(student, role), getattr(teacher, role)
        if one != other and None not in (one, other):
            yield f"the {role.replace('_', ' ')} is {one!r} for the student and {other!r} for the teacher"
    one, other = (tokens.facts(t) for t in (student, teacher))
    if (one.prefix, one.suffix) != (other.prefix, other.suffix):
        framed = [t.convert_ids_to_tokens(f.prefix + f.suffix) for t, f in ((student, one), (teacher, other))]
        yield f"a text is put between {framed[0]} for the student and {framed[1]} for the teacher"


def _rules(student: Any, teacher: Any) -> Iterator[str]:
    """How pieces are put together: merges, scores, prefixes. Normalisers and splitters are known by what they do."""
    one, other = (_model(t) for t in (student, teacher))
    if one and other:
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                yield f"the same pieces, but other {key} in the tokenisers' models"


def _model(tokenizer: Any) -> dict[str, Any] | None:
    """What a model of `tokenizers` has beside its pieces; whatever is absent, empty or off is one and the same."""
    if not tokenizer.is_fast:
        return None
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = model.pop("vocab")
    if isinstance(vocabulary, list):  # unigram: pieces with scores
        model["scores"] = vocabulary
    model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    return {key: value for key, value in model.items() if value}


def _texts(student: Any, teacher: Any) -> Iterator[str]:
    probes = [*PROBES, unicodedata.normalize("NFD", PROBES[2]), *_spoken(student)]
    added = [f"a {token} b{token}c" for token in islice(student.get_added_vocab(), ADDED)]
    for texts, encode in ((probes, tokens.encode), (added, _parsed)):
        for text, one, other in zip(texts, encode(student, texts), encode(teacher, texts), strict=True):
            if one != other:
                sides = [t.convert_ids_to_tokens(ids) for t, ids in ((student, one), (teacher, other))]
                at = next(i for i in range(len(one) + 1) if one[: i + 1] != other[: i + 1])
                yield (
                    f"the same pieces, but {text[:40]!r} becomes {sides[0][at : at + 4]} for the student and "
                    f"{sides[1][at : at + 4]} for the teacher: normaliser, splitter or added tokens differ"
                )


def _spoken(tokenizer: Any) -> list[str]:
    """Text that uses pieces from all over the vocabulary, whatever its language."""
    ids = sorted(tokenizer.get_vocab().values())
    few = ids[:: max(1, len(ids) // SPREAD)]
    texts = (tokenizer.decode(few[i : i + 16], skip_special_tokens=True) for i in range(0, len(few), 16))
    return [text for text in texts if text]


def _parsed(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids where added tokens that stand in the text are taken for what they are."""
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
