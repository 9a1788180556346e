"""The scores of a corpus as its rows are read: one number a row, from what one or two models said of it. No torch.

A directory of scores holds a store for each model (`teacher/`, `reference/`) and score.json, which says what the
score is made of and whose it is. Stores of another corpus, tokeniser or weights than it names are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from distill.corpus import Corpus
from distill.scores import Reader
from distill.scores.keys import row_keys
from growth import files
from growth.errors import UserError

FILE, VERSION = "score.json", 1
WHO = {"model_digest": "weights", "tokenizer_digest": "tokeniser"}

Kind = Literal["nll_gap", "nll", "median_topk"]
Per = Literal["token", "sequence", "byte"]
Columns = Mapping[str, np.ndarray]


def value(kind: Kind, per: Per, teacher: Columns, reference: Columns | None = None) -> np.ndarray:
    """The score of each row [N], from the columns of one or two stores.

    nll_gap: how much likelier the teacher finds a row than the reference does, NLL_ref - NLL_teacher (MiniPLM, Gu et
    al. 2024, arXiv 2410.17215): a difference, never a ratio. Of a model before and after it was fine-tuned it is the
    log-ratio of their likelihoods. nll: the loss of one model. median_topk: the median loss of the tokens it can learn.
    """
    if kind == "median_topk":
        return np.asarray(teacher["median"], dtype=np.float64)
    if kind == "nll":
        return loss(teacher, per)
    return loss(reference, per) - loss(teacher, per)


def loss(columns: Columns, per: Per) -> np.ndarray:
    """Nats a token, a row or a byte [N]; 0 where nothing was predicted."""
    over = {"token": columns["tokens"], "byte": columns["bytes"], "sequence": np.ones_like(columns["tokens"])}[per]
    return 0.0 - columns["logp"] / np.maximum(over, 1)


def describe(path: Path, kind: Kind, per: Per) -> None:
    """Write score.json beside the sealed stores in `path`."""
    path = Path(path)
    stores = {name: _producer(path / name) for name in names(kind)}
    corpus = files.read_json(path / names(kind)[0] / "manifest.json")["corpus_digest"]
    files.write_json(
        path / FILE, {"version": VERSION, "kind": kind, "per": per, "corpus_digest": corpus, "stores": stores}
    )


def names(kind: Kind) -> tuple[str, ...]:
    """Whose scores it is made of."""
    return ("teacher", "reference") if kind == "nll_gap" else ("teacher",)


class Scored:
    """The scores in `path` of the rows of a corpus."""

    def __init__(self, path: Path, text: Corpus):
        self.path, self.text = Path(path), text
        self.about = self._about()
        self.kind, self.per = self.about["kind"], self.about["per"]
        if self.about["corpus_digest"] != text.digest:
            raise UserError(
                f"{path} are scores of another corpus than {text.path}: other text, another tokeniser or rows of "
                "another length; score this one"
            )
        self._stores = {name: self._store(name) for name in names(self.kind)}

    def __getitem__(self, rows: Iterable[int]) -> np.ndarray:
        """Of some rows [n], every one finite."""
        keys = row_keys(*self.text.block(rows))
        found = value(self.kind, self.per, *(store.rows(keys) for store in self._stores.values()))
        if not np.isfinite(found).all():
            raise UserError(f"{self.path}: a score is NaN or infinite; remove it and score again")
        return found

    def columns(self, rows: Iterable[int]) -> dict[str, dict[str, np.ndarray]]:
        """{model: what is stored of these rows}."""
        keys = row_keys(*self.text.block(rows))
        return {name: store.rows(keys) for name, store in self._stores.items()}

    @cached_property
    def title(self) -> str:
        """What the number is, in words."""
        what = {"nll_gap": "NLL of the reference - NLL of the teacher", "nll": "NLL",
                "median_topk": "median NLL of learnable tokens"}[self.kind]  # fmt: skip
        return f"{what}, nats a {self.per}" if self.kind != "median_topk" else f"{what}, nats"

    def _about(self) -> dict:
        if not (self.path / FILE).is_file():
            raise UserError(f"{self.path} has no {FILE}: scoring has not ended, or these are no scores of rows")
        about = files.read_json(self.path / FILE)
        if not isinstance(about, dict) or about.get("version") != VERSION:
            raise UserError(f"{self.path} was not written by this version; score again")
        return about

    def _store(self, name: str) -> Reader:
        """Of the corpus, the weights and the tokeniser that score.json names."""
        store, expected = Reader(self.path / name), self.about["stores"][name]
        if store.about.corpus_digest != self.about["corpus_digest"]:
            raise UserError(f"{self.path / name} are scores of another corpus than {FILE} says; score again")
        for key, what in WHO.items():
            if store.about.producers[0][key] != expected[key]:
                raise UserError(
                    f"{self.path / name} are scores by other {what} ({store.about.producers[0][key][:12]}) than "
                    f"{FILE} says ({expected[key][:12]}); score again"
                )
        return store


def _producer(store: Path) -> dict:
    return files.read_json(store / "manifest.json")["producers"][0]
