"""BERT_CAT: query and passage read as one text."""

from __future__ import annotations

from torch import Tensor, nn

from distill import classifiers, loading
from distill.ranking.encoding import Texts, encoded, first, in_order, inputs, last, mean
from distill.ranking.joining import joined
from distill.ranking.kinds import ClassifierKind, CrossKind
from distill.ranking.ranker import Ranker, WideLinear


class CrossEncoder(Ranker):
    """A linear layer on the first token of [q; d], of a decoder on the last (Nogueira, Cho 2019, arXiv 1901.04085)."""

    def __init__(self, encoder: nn.Module, kind: CrossKind = CrossKind()):  # noqa: B008 (a frozen value)
        super().__init__(encoder, kind)
        self.linear = WideLinear(self.width, 1, dtype=encoder.dtype)
        self.pick = last if loading.causal(encoder.config) else first

    def score(self, queries: Texts, passages: Texts, pairs: Tensor) -> Tensor:
        return self.linear(encoded(self.encoder, joined(queries, passages, pairs, self.kind.join), self.pick))[:, 0]


# What the heads of families that take several texts a row make of the hidden states [N, T, D] of one a row
HEADS = {
    "bert": lambda model, hidden, texts: model.classifier(model.bert.pooler(hidden)),
    "roberta": lambda model, hidden, texts: model.classifier(hidden),
    "modernbert": lambda model, hidden, texts: model.classifier(
        model.head((first if model.config.classifier_pooling == "cls" else mean)(hidden, texts))
    ),
}


class Classifier(Ranker):
    """A `...ForSequenceClassification` of one label, as cross-encoders are published: its logit, and no activation.

    All of it is the `encoder`, for transformers has the head inside; nothing is left for a head of ours.
    """

    def __init__(self, encoder: nn.Module, kind: ClassifierKind = ClassifierKind()):  # noqa: B008 (a frozen value)
        super().__init__(encoder, kind)
        classifiers.last_layer(encoder).__class__ = WideLinear  # the same layer; it makes the score

    def score(self, queries: Texts, passages: Texts, pairs: Tensor) -> Tensor:
        texts, model = joined(queries, passages, pairs, self.kind.join), self.encoder
        if loading.causal(model.config):
            return classifiers.alone(model)(encoded(model.base_model, texts, last))[:, 0]
        if head := HEADS.get(model.config.model_type):
            return encoded(model.base_model, texts, lambda hidden, some: head(model, hidden, some))[:, 0]
        return in_order(texts.lengths, lambda rows: self._whole(texts.at(rows)))

    def _whole(self, texts: Texts) -> Tensor:
        return self.encoder(**inputs(self.encoder, texts.ids, texts.real.long(), texts.types)).logits[:, 0]
