"""Qwen3 (arXiv 2505.09388): Llama with a norm over each head of queries and keys."""

from __future__ import annotations

from dataclasses import replace

from growth.families.llama import LLAMA
from growth.families.qwen2 import QWEN2

# fmt: off
QWEN3 = replace(
    LLAMA,
    name="Qwen3", model_type="qwen3",
    defaults={**QWEN2.defaults, "head_dim": 128},
    body={**LLAMA.body, "layers.{layers}.": {
        **LLAMA.body["layers.{layers}."],
        "self_attn.q_norm": "head",
        "self_attn.k_norm": "head",
    }},
    per_layer=("layer_types",),
)
