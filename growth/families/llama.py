"""Llama (Touvron et al. 2023, arXiv 2302.13971), with grouped queries."""

from __future__ import annotations

from growth.families.table import Family

# fmt: off
LLAMA = Family(
    name="Llama", model_type="llama", norm="rms", norms="pre", prefixes=("model.", "transformer."),
    sizes=dict(vocab="vocab_size", embed="hidden_size", kv="num_key_value_heads",
               group=lambda c: c.num_attention_heads // c.num_key_value_heads, head="head_dim",
               ffn="intermediate_size", layers="num_hidden_layers", labels=None),
    follows=dict(num_attention_heads=lambda s: s["kv"] * s["group"]),
    defaults=dict(num_key_value_heads=lambda c: c.num_attention_heads,
                  head_dim=lambda c: c.hidden_size // c.num_attention_heads,
                  attention_bias=False, mlp_bias=False, rms_norm_eps=1e-6, tie_word_embeddings=False),
    body={
        "embed_tokens": "vocab | embed",
        "layers.{layers}.": {
            "input_layernorm":          "embed",
            "self_attn.q_proj":         "(kv group head) <- embed + bias if attention_bias",
            "self_attn.k_proj":         "(kv head) <- embed + bias if attention_bias",
            "self_attn.v_proj":         "(kv head) <- embed + bias if attention_bias",
            "self_attn.o_proj":         "embed <- (kv group head) + bias if attention_bias",
            "post_attention_layernorm": "embed",
            "mlp.gate_proj":            "ffn <- embed + bias if mlp_bias",
            "mlp.up_proj":              "ffn <- embed + bias if mlp_bias",
            "mlp.down_proj":            "embed <- ffn + bias if mlp_bias",
        },
        "norm": "embed",
    },
    heads=dict(
        lm={"lm_head": "vocab <- embed"},
        classifier={"score.weight": "labels <- embed", "score.bias?": "labels"},    # tokens have a bias, sequences none
        qa={"qa_outputs": "labels <- embed + bias"},
    ),
    last_norm="norm", rotary=lambda c: c.head_dim, epsilon="rms_norm_eps",
    multiples=(("hidden_size", "num_attention_heads"),),
    tied={"lm_head.weight": "embed_tokens.weight"},
    buffers=("layers.{layers}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    roles=dict(query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj"),
)
