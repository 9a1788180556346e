"""What rows are measured with: checkpoints as subjects, one corpus for all, one pass of embeddings for all metrics."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import growth
from distill import corpus, models, world
from distill.corpus import tokens
from distill.evaluate import role
from distill.evaluate.encode import encode
from distill.evaluate.probe import text_hash
from growth.files import digest, read_json

HEADS = {
    "mlm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
CLASSIFIERS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
NOT_ARCHITECTURE = ("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
LENGTH = 64  # tokens of a document that are read; the corpora here have shorter ones but for a tenth
DOCUMENTS = 50_000  # of a part that are looked at


class Bench:
    """What every subject is measured on."""

    def __init__(self, path: Path, teacher: Subject | None, rows: dict[str, str], context):
        self.path, self.teacher, self.rows, self.context = Path(path), teacher, rows, context
        self.predictions: dict[str, Tensor] = {}  # key of a subject -> the class it gives to every held-out row
        self.similarities: dict[str, np.ndarray] = {}  # key of a subject -> the cosines of its pairs, float64 [N]

    @property
    def scratch(self) -> str | None:
        """The stage that the row called scratch is of."""
        return next((reference for label, reference in self.rows.items() if role(label, reference, None) == "scratch"),
                    None)  # fmt: skip

    @property
    def trained(self) -> dict:
        """reference -> what the recipe says of it, for the rows that are train stages."""
        stages = {stage.id: stage.train for stage in self.context.recipe.stages if stage.train}
        return {reference: stages[reference] for reference in self.rows.values() if reference in stages}

    def begin(self, rows, directory: Path, seeds) -> None:
        """Nothing is made of all rows before they are measured."""

    @cached_property
    def seen(self):
        """What training reads; there is always some."""
        return corpus.open(self.path, "train")

    @cached_property
    def heldout(self):
        return corpus.open(self.path, "heldout")

    @cached_property
    def vocabulary(self) -> str:
        return tokens.digest(self.seen.tokenizer)

    @cached_property
    def heldout_texts(self) -> list[str]:
        """In the order of their hashes: the first ones are a fair sample."""
        return sorted({text for text, _ in self.heldout.documents(DOCUMENTS)}, key=text_hash)

    @cached_property
    def documents(self) -> list[tuple[str, str]]:
        """(text, part) of the whole corpus: no row has ever seen the parts."""
        return [*self.seen.documents(DOCUMENTS), *self.heldout.documents(DOCUMENTS)]


class Subject:
    """One checkpoint under measurement. Its embeddings are kept, its weights only while they are used."""

    def __init__(self, path: Path, key: str, corpus_path: Path):
        self.path, self.key, self.corpus_path = path, key, corpus_path
        self.config = read_json(path / "config.json")
        self._known: dict[str, int] = {}  # text -> row of the embeddings
        self._embeddings: list[Tensor] = []

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parameters(self) -> int:
        """Counted in the files: tied tensors stand there once, and integers are no parameters."""
        return sum(math.prod(e.shape) for e in growth.open(self.path).values() if "F" in e.dtype)

    @property
    def head(self) -> str | None:
        """The trained language-model head that the checkpoint says it has."""
        named, family = self.config.get("architectures") or [], self.config["model_type"]
        return next((head for head, classes in HEADS.items() if classes.get(family) in named), None)

    @property
    def classes(self) -> list[str] | None:
        """Those that it tells apart, where it says that it has a classification head."""
        named, family = self.config.get("architectures") or [], self.config["model_type"]
        return list(self.config.get("id2label", {}).values()) if CLASSIFIERS.get(family) in named else None

    @property
    def architecture(self) -> str:
        """Equal for checkpoints whose forward passes cost the same."""
        return digest({key: value for key, value in self.config.items() if key not in NOT_ARCHITECTURE})

    @cached_property
    def tokenizer(self):
        """Its own, or where it brings none the one that its corpus was made with."""
        if any(self.path.glob("tokenizer*")) or any(self.path.glob("vocab.*")):
            return tokens.load(self.path)
        return corpus.open(self.corpus_path, "train").tokenizer

    @cached_property
    def vocabulary(self) -> str:
        """Equal for tokenisers that turn text into the same ids."""
        return tokens.digest(self.tokenizer)

    def load(self, head: str | None = None) -> nn.Module:
        return models.freeze(models.load(self.path, head)).to(world.device())

    def embed(self, texts: list[str]) -> Tensor:
        """Mean-pooled last hidden states, float32 [N, D]; a text is never encoded twice."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            length = min(LENGTH, corpus.open(self.corpus_path, "train").length)
            self._embeddings.append(encode(self.load(), self.tokenizer, new, length))
            self._known |= {text: len(self._known) + i for i, text in enumerate(new)}
        return torch.cat(self._embeddings)[[self._known[text] for text in texts]]


class Subjects:
    """Every checkpoint once, by what is in it: cut starts of three seeds are one subject."""

    def __init__(self, corpus_path: Path):
        self.corpus = Path(corpus_path)
        self._keys: dict[Path, str] = {}
        self._found: dict[str, Subject] = {}

    def at(self, path: Path) -> Subject:
        path = Path(path)
        if path not in self._keys:
            self._keys[path] = growth.open(path).digest()
        key = self._keys[path]
        return self._found.setdefault(key, Subject(path, key, self.corpus))

    def of(self, context, reference: str) -> Subject:
        return self.at(context.model(reference))

    def all(self) -> list[Subject]:
        return list(self._found.values())
