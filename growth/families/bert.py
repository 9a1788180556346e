"""BERT (Devlin et al. 2018, arXiv 1810.04805)."""

from __future__ import annotations

from growth.families.table import Family

# fmt: off
BERT = Family(
    name="BERT", model_type="bert", norm="layer", norms="post", prefixes=("bert.",),
    sizes=dict(vocab="vocab_size", pos="max_position_embeddings", type="type_vocab_size", embed="hidden_size",
               heads="num_attention_heads", head=lambda c: c.hidden_size // c.num_attention_heads,
               ffn="intermediate_size", layers="num_hidden_layers",
               pool="hidden_size", transform="hidden_size", pair=2, labels=None),
    defaults=dict(type_vocab_size=2, tie_word_embeddings=True, hidden_act="gelu"),
    body={
        "embeddings.word_embeddings":       "vocab | embed",
        "embeddings.position_embeddings":   "pos | embed",
        "embeddings.token_type_embeddings": "type | embed",
        "embeddings.LayerNorm":             "embed + bias",
        "encoder.layer.{layers}.": {
            "attention.self.query":       "(heads head) <- embed + bias",
            "attention.self.key":         "(heads head) <- embed + bias",
            "attention.self.value":       "(heads head) <- embed + bias",
            "attention.output.dense":     "embed <- (heads head) + bias",
            "attention.output.LayerNorm": "embed + bias",
            "intermediate.dense":         "ffn <- embed + bias",
            "output.dense":               "embed <- ffn + bias",
            "output.LayerNorm":           "embed + bias",
        },
        "pooler.?": {"dense": "pool <- embed + bias"},
    },
    heads=dict(
        mlm={"cls.predictions.transform.dense":     "transform <- embed + bias",
             "cls.predictions.transform.LayerNorm": "transform + bias",
             "cls.predictions.bias":                "vocab",
             "cls.predictions.decoder":             "vocab <- transform + bias"},
        nsp={"cls.seq_relationship": "pair <- pool + bias"},
        classifier={"classifier": "labels <- pool + bias"},
        qa={"qa_outputs": "labels <- embed + bias"},
    ),
    activated=("cls.predictions.transform.dense", "encoder.layer.{layers}.output.LayerNorm", "hidden_act"),
    last_norm="cls.predictions.transform.LayerNorm",
    tied={"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
          "cls.predictions.decoder.bias": "cls.predictions.bias"},
    buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    roles=dict(query="attention.self.query", key="attention.self.key", value="attention.self.value"),
)
