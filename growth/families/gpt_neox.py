"""GPT-NeoX and Pythia (Black et al. 2022, arXiv 2204.06745): query, key and value are fused per head."""

from __future__ import annotations

from growth.families.table import Family


def rotated(c) -> int:
    """Pythia turns a quarter of every head."""
    return int(c.hidden_size // c.num_attention_heads * c.rope_parameters["partial_rotary_factor"])


def rope(c) -> dict:
    """What transformers makes of the older keys."""
    return {"rope_theta": c.rotary_emb_base, "partial_rotary_factor": c.rotary_pct, "rope_type": "default"}


# fmt: off
GPT_NEOX = Family(
    name="GPT-NeoX", model_type="gpt_neox", norm="layer", norms="pre", prefixes=("gpt_neox.",),
    sizes=dict(vocab="vocab_size", embed="hidden_size", heads="num_attention_heads", qkv=3,
               head=lambda c: c.hidden_size // c.num_attention_heads, ffn="intermediate_size",
               layers="num_hidden_layers", labels=None),
    defaults=dict(rope_parameters=rope, rotary_pct=0.25, rotary_emb_base=10000.0, attention_bias=True,
                  tie_word_embeddings=False),
    body={
        "embed_in": "vocab | embed",
        "layers.{layers}.": {
            "input_layernorm":           "embed + bias",
            "post_attention_layernorm":  "embed + bias",
            "attention.query_key_value": "(heads qkv head) <- embed + bias if attention_bias",
            "attention.dense":           "embed <- (heads head) + bias if attention_bias",
            "mlp.dense_h_to_4h":         "ffn <- embed + bias",
            "mlp.dense_4h_to_h":         "embed <- ffn + bias",
        },
        "final_layer_norm": "embed + bias",
    },
    heads=dict(
        lm={"lm_head?": "vocab <- embed", "embed_out?": "vocab <- embed"},      # embed_out: before transformers 5
        sequence={"score": "labels <- embed"},
        tokens={"classifier": "labels <- embed + bias"},
        qa={"qa_outputs": "labels <- embed + bias"},
    ),
    last_norm="final_layer_norm", rotary=rotated,
    in_memory={"embed_out": "lm_head.weight"},
    tied={"lm_head.weight": "embed_in.weight", "embed_out.weight": "embed_in.weight"},
    buffers=("layers.{layers}.attention.bias", "layers.{layers}.attention.masked_bias",
             "layers.{layers}.attention.rotary_emb.inv_freq"),
    roles=dict(query="attention.query_key_value", key="attention.query_key_value", value="attention.query_key_value"),
)
