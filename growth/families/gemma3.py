"""Gemma 3 (arXiv 2503.19786), its text part: Gemma 2 with a norm over each head of queries and keys."""

from __future__ import annotations

from dataclasses import replace

from growth.families.gemma2 import GEMMA2


def layer_types(c) -> list[str]:
    """What transformers takes when config.json has no list: five local layers, then one that sees all."""
    return ["sliding_attention" if (i + 1) % c.sliding_window_pattern else "full_attention"
            for i in range(c.num_hidden_layers)]  # fmt: skip


# fmt: off
GEMMA3_TEXT = replace(
    GEMMA2,
    name="Gemma-3", model_type="gemma3_text",
    defaults={**GEMMA2.defaults, "sliding_window_pattern": 6, "layer_types": layer_types},
    body={**GEMMA2.body, "layers.{layers}.": {
        **GEMMA2.body["layers.{layers}."],
        "self_attn.q_norm": "head",
        "self_attn.k_norm": "head",
    }},
)
