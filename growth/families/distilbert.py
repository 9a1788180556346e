"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108)."""

from __future__ import annotations

from growth.families.table import Family

# fmt: off
DISTILBERT = Family(
    name="DistilBERT", model_type="distilbert", norm="layer", norms="post", prefixes=("distilbert.",),
    sizes=dict(vocab="vocab_size", pos="max_position_embeddings", embed="dim", heads="n_heads",
               head=lambda c: c.dim // c.n_heads, ffn="hidden_dim", layers="n_layers",
               pool="dim", transform="dim", labels=None),
    defaults=dict(tie_word_embeddings=True, activation="gelu"),
    body={
        "embeddings.word_embeddings":     "vocab | embed",
        "embeddings.position_embeddings": "pos | embed",
        "embeddings.LayerNorm":           "embed + bias",
        "transformer.layer.{layers}.": {
            "attention.q_lin":   "(heads head) <- embed + bias",
            "attention.k_lin":   "(heads head) <- embed + bias",
            "attention.v_lin":   "(heads head) <- embed + bias",
            "attention.out_lin": "embed <- (heads head) + bias",
            "sa_layer_norm":     "embed + bias",
            "ffn.lin1":          "ffn <- embed + bias",
            "ffn.lin2":          "embed <- ffn + bias",
            "output_layer_norm": "embed + bias",
        },
    },
    heads=dict(
        mlm={"vocab_transform":  "transform <- embed + bias",
             "vocab_layer_norm": "transform + bias",
             "vocab_projector":  "vocab <- transform + bias"},
        pooled={"pre_classifier": "pool <- embed + bias"},
        classifier={"classifier": "labels <- pool + bias"},
        qa={"qa_outputs": "labels <- embed + bias"},
    ),
    activated=("vocab_transform", "transformer.layer.{layers}.output_layer_norm", "activation"),
    last_norm="vocab_layer_norm",
    tied={"vocab_projector.weight": "embeddings.word_embeddings.weight"},
    buffers=("embeddings.position_ids",),
    roles=dict(query="attention.q_lin", key="attention.k_lin", value="attention.v_lin"),
)
