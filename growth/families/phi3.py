"""Phi-3 and Phi-4 (arXiv 2404.14219): Llama with fused matrices: queries, keys and values; gate and up.

With as many key-value heads as heads the fused rows are three equal parts. With fewer of them they are parts of
unequal size, which are one axis here: depth, width and neurons may change, the number of heads may not.
"""

from __future__ import annotations

from dataclasses import replace

from growth.families.llama import LLAMA


def grouped(c) -> bool:
    return c.num_key_value_heads != c.num_attention_heads


def rotated(c) -> int:
    """Phi-4-mini turns three quarters of every head."""
    return int(c.hidden_size // c.num_attention_heads * c.rope_parameters["partial_rotary_factor"])


def rope(c) -> dict:
    """What transformers makes of the older keys."""
    return {"rope_theta": c.rope_theta, "partial_rotary_factor": c.partial_rotary_factor, "rope_type": "default"}


# fmt: off
PHI3 = replace(
    LLAMA,
    name="Phi-3", model_type="phi3",
    sizes=dict(vocab="vocab_size", embed="hidden_size", qkv=3, heads="num_attention_heads",
               shared=lambda c: c.num_key_value_heads if c.grouped else None,
               all=lambda c: c.num_attention_heads + 2 * c.num_key_value_heads if c.grouped else None,
               head=lambda c: c.hidden_size // c.num_attention_heads, gates=2, ffn="intermediate_size",
               layers="num_hidden_layers", labels=None),
    follows=dict(num_key_value_heads=lambda s: s["shared"] or s["heads"]),
    defaults=dict(num_key_value_heads=lambda c: c.num_attention_heads, grouped=grouped, rms_norm_eps=1e-5,
                  tie_word_embeddings=False, rope_parameters=rope, rope_theta=10000.0, partial_rotary_factor=1.0),
    body={
        "embed_tokens": "vocab | embed",
        "layers.{layers}.": {
            "input_layernorm":                   "embed",
            "self_attn.qkv_proj if not grouped": "(qkv heads head) <- embed",
            "self_attn.qkv_proj if grouped":     "(all head) <- embed",
            "self_attn.o_proj":                  "embed <- (heads head)",
            "post_attention_layernorm":          "embed",
            "mlp.gate_up_proj":                  "(gates ffn) <- embed",
            "mlp.down_proj":                     "embed <- ffn",
        },
        "norm": "embed",
    },
    rotary=rotated,
    roles=dict(query="self_attn.qkv_proj", key="self_attn.qkv_proj", value="self_attn.qkv_proj"),
)
