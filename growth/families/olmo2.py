"""OLMo 2 (arXiv 2501.00656): norms behind the branches; queries and keys are normed over all heads at once."""

from __future__ import annotations

from dataclasses import replace

from growth.families.llama import LLAMA

# fmt: off
BLOCK = {name: row for name, row in LLAMA.body["layers.{layers}."].items() if name != "input_layernorm"}
OLMO2 = replace(
    LLAMA,
    name="OLMo-2", model_type="olmo2", norms="branch", defaults={**LLAMA.defaults, "rms_norm_eps": 1e-5},
    body={**LLAMA.body, "layers.{layers}.": {
        **BLOCK,
        "self_attn.q_norm":           "(kv group head)",
        "self_attn.k_norm":           "(kv head)",
        "post_feedforward_layernorm": "embed",
    }},
    closing=("post_attention_layernorm", "post_feedforward_layernorm"),
)
