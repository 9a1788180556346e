"""Losses: frozen values for recipes (`OBJECTIVES`), plain functions on tensors for any other loop. No torch.

from distill.objectives import aligned, attention_mse, cross_entropy, divergence, hidden, relation_kl
"""

from __future__ import annotations

from importlib import import_module

from distill.objectives.attention_scores import AttentionMSE
from distill.objectives.ce import CrossEntropy
from distill.objectives.distribution import Divergence
from distill.objectives.perturbation import Perturbation
from distill.objectives.protocol import Needs, Objective
from distill.objectives.ranked import Contrastive, InBatchMargin, ListwiseKL, MarginMSE, PointwiseMSE, RankNet
from distill.objectives.relation import RelationKL
from distill.objectives.span import Aligned
from distill.objectives.states import Hidden

RANKING = {
    "margin_mse": MarginMSE,
    "listwise_kl": ListwiseKL,
    "pointwise_mse": PointwiseMSE,
    "ranknet": RankNet,
    "in_batch_margin": InBatchMargin,
    "contrastive": Contrastive,
}
OBJECTIVES = {
    "relation_kl": RelationKL,
    "ce": CrossEntropy,
    "divergence": Divergence,
    "aligned": Aligned,
    "hidden": Hidden,
    "perturbation": Perturbation,
    "attention_mse": AttentionMSE,
    **RANKING,
}

# plain function -> the module that brings torch with it
FUNCTIONS = {
    "relation_kl": "relation_sum",
    "attention_mse": "relation_sum",
    "cross_entropy": "token_sum",
    "divergence": "token_sum",
    "aligned": "span_sum",
    "hidden": "hidden_sum",
    "scored": "token_sum",
    "margin_mse": "ranking_sum",
    "all_pairs_margin_mse": "ranking_sum",
    "pointwise_mse": "ranking_sum",
    "listwise_kl": "ranking_sum",
    "ranknet": "ranking_sum",
    "in_batch_margin": "ranking_sum",
    "contrastive": "ranking_sum",
    "margin_scale": "margins",
    "scale_mismatch": "margins",
}

__all__ = [
    "FUNCTIONS",
    "OBJECTIVES",
    "RANKING",
    "Aligned",
    "AttentionMSE",
    "Contrastive",
    "CrossEntropy",
    "Divergence",
    "Hidden",
    "InBatchMargin",
    "ListwiseKL",
    "MarginMSE",
    "Needs",
    "Objective",
    "Perturbation",
    "PointwiseMSE",
    "RankNet",
    "RelationKL",
    *FUNCTIONS,
]


def __getattr__(name: str):
    if name not in FUNCTIONS:
        raise AttributeError(f"module 'distill.objectives' has no attribute '{name}'")
    return getattr(import_module(f"distill.objectives.{FUNCTIONS[name]}"), name)
