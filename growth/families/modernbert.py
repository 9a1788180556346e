"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): pre-norm, rotary, gated, mostly local attention."""

from __future__ import annotations

from growth.families.table import Family


def layer_types(c) -> list[str]:
    return ["sliding_attention" if i % c.global_attn_every_n_layers else "full_attention"
            for i in range(c.num_hidden_layers)]  # fmt: skip


# fmt: off
MODERNBERT = Family(
    name="ModernBERT", model_type="modernbert", norm="layer", norms="pre", prefixes=("model.",),
    sizes=dict(vocab="vocab_size", embed="hidden_size", qkv=3, heads="num_attention_heads",
               head=lambda c: c.hidden_size // c.num_attention_heads, gates=2, ffn="intermediate_size",
               layers="num_hidden_layers", transform="hidden_size", labels=None),
    defaults=dict(attention_bias=False, mlp_bias=False, norm_bias=False, decoder_bias=True, classifier_bias=False,
                  tie_word_embeddings=True, global_attn_every_n_layers=3, layer_types=layer_types),
    body={
        "embeddings.tok_embeddings": "vocab | embed",
        "embeddings.norm":           "embed + bias if norm_bias",
        "layers.{layers>0}.attn_norm": "embed + bias if norm_bias",      # the embeddings' norm serves the first block
        "layers.{layers}.": {
            "attn.Wqkv": "(qkv heads head) <- embed + bias if attention_bias",
            "attn.Wo":   "embed <- (heads head) + bias if attention_bias",
            "mlp_norm":  "embed + bias if norm_bias",
            "mlp.Wi":    "(gates ffn) <- embed + bias if mlp_bias",
            "mlp.Wo":    "embed <- ffn + bias if mlp_bias",
        },
        "final_norm": "embed + bias if norm_bias",
    },
    heads=dict(
        transform={"head.dense": "transform <- embed + bias if classifier_bias",
                   "head.norm":  "transform + bias if norm_bias"},
        mlm={"decoder": "vocab <- transform + bias if decoder_bias"},
        classifier={"classifier": "labels <- transform + bias"},
    ),
    closing=("embeddings.norm",), last_norm="head.norm",
    rotary=lambda c: c.hidden_size // c.num_attention_heads,
    tied={"decoder.weight": "embeddings.tok_embeddings.weight"},
    per_layer=("layer_types",),
    roles=dict(query="attn.Wqkv", key="attn.Wqkv", value="attn.Wqkv"),
)
