"""Gemma 2 (arXiv 2408.00118): norms before and behind every branch, gains stored as 1 + w, local and global layers."""

from __future__ import annotations

from dataclasses import replace

from growth.families.llama import LLAMA


def layer_types(c) -> list[str]:
    """What transformers takes when config.json has no list."""
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(c.num_hidden_layers)]


# fmt: off
GEMMA2 = replace(
    LLAMA,
    name="Gemma-2", model_type="gemma2", norms="sandwich", gain="1+w",
    defaults={**LLAMA.defaults, "head_dim": 256, "tie_word_embeddings": True, "layer_types": layer_types},
    body={**LLAMA.body, "layers.{layers}.": {
        **LLAMA.body["layers.{layers}."],
        "pre_feedforward_layernorm":  "embed",
        "post_feedforward_layernorm": "embed",
    }},
    embed_scale=True, head_scaled=False, closing=("post_attention_layernorm", "post_feedforward_layernorm"),
    per_layer=("layer_types",),
)
