"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT's body with heads of its own; positions start behind padding."""

from __future__ import annotations

from dataclasses import replace

from growth.families.bert import BERT

# fmt: off
ROBERTA = replace(
    BERT,
    name="RoBERTa", model_type="roberta", prefixes=("roberta.",),
    defaults={**BERT.defaults, "head_act": "gelu"},  # whatever the blocks have
    heads=dict(
        lm={"lm_head.dense":      "transform <- embed + bias",
            "lm_head.layer_norm": "transform + bias",
            "lm_head.bias":       "vocab",
            "lm_head.decoder":    "vocab <- transform + bias"},
        sequence={"classifier.dense":    "pool <- embed + bias",
                  "classifier.out_proj": "labels <- pool + bias"},
        tokens={"classifier": "labels <- embed + bias"},
        qa={"qa_outputs": "labels <- embed + bias"},
    ),
    activated=("lm_head.dense", "encoder.layer.{layers}.output.LayerNorm", "head_act"),
    last_norm="lm_head.layer_norm",
    tied={"lm_head.decoder.weight": "embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"},
)
