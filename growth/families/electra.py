"""ELECTRA (Clark et al. 2020, arXiv 2003.10555): BERT's blocks; embeddings of a width of their own are projected."""

from __future__ import annotations

from dataclasses import replace

from growth.families.bert import BERT


def projected(c) -> bool:
    """Whether tokens have embeddings of another width than the model."""
    return c.embedding_size != c.hidden_size


# fmt: off
ELECTRA = replace(
    BERT,
    name="ELECTRA", model_type="electra", prefixes=("electra.",),
    sizes={**BERT.sizes, "factor": lambda c: c.embedding_size if c.projected else None,
           "transform": lambda c: None if c.projected else c.hidden_size, "one": 1},
    follows=dict(embedding_size=lambda s: s["factor"] or s["embed"]),
    defaults={**BERT.defaults, "projected": projected, "embedding_size": 128, "head_act": "gelu"},
    body={
        "embeddings.": {
            "word_embeddings if projected":           "vocab | factor",
            "position_embeddings if projected":       "pos | factor",
            "token_type_embeddings if projected":     "type | factor",
            "LayerNorm if projected":                 "factor + bias",
            "word_embeddings if not projected":       "vocab | embed",
            "position_embeddings if not projected":   "pos | embed",
            "token_type_embeddings if not projected": "type | embed",
            "LayerNorm if not projected":             "embed + bias",
        },
        "embeddings_project if projected": "embed <- factor + bias",
        "encoder.layer.{layers}.": BERT.body["encoder.layer.{layers}."],
    },
    heads=dict(
        generator={"generator_predictions.dense if projected":         "factor <- embed + bias",
                   "generator_predictions.LayerNorm if projected":     "factor + bias",
                   "generator_lm_head if projected":                   "vocab <- factor + bias",
                   "generator_predictions.dense if not projected":     "transform <- embed + bias",
                   "generator_predictions.LayerNorm if not projected": "transform + bias",
                   "generator_lm_head if not projected":               "vocab <- transform + bias"},
        discriminator={"discriminator_predictions.dense":            "pool <- embed + bias",
                       "discriminator_predictions.dense_prediction": "one <- pool + bias"},
        sequence={"classifier.dense":    "pool <- embed + bias",
                  "classifier.out_proj": "labels <- pool + bias"},
        choice={"sequence_summary.summary": "pool <- embed + bias"},
        tokens={"classifier": "labels <- embed + bias"},
        qa={"qa_outputs": "labels <- embed + bias"},
    ),
    activated=("generator_predictions.dense", "encoder.layer.{layers}.output.LayerNorm", "head_act"),
    last_norm="generator_predictions.LayerNorm",
    tied={"generator_lm_head.weight": "embeddings.word_embeddings.weight"},
)
