"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from growth.families.llama import LLAMA


def layer_types(c) -> list[str]:
    """What transformers takes when config.json has no list: a sliding window from `max_window_layers` on."""
    full = c.max_window_layers if c.use_sliding_window else c.num_hidden_layers
    return ["sliding_attention" if i >= full else "full_attention" for i in range(c.num_hidden_layers)]


# fmt: off
BLOCK = LLAMA.body["layers.{layers}."]
QWEN2 = replace(
    LLAMA,
    name="Qwen2", model_type="qwen2",
    defaults={**LLAMA.defaults, "use_sliding_window": False, "max_window_layers": 28, "layer_types": layer_types},
    body={**LLAMA.body, "layers.{layers}.": {
        **BLOCK,
        "self_attn.q_proj": "(kv group head) <- embed + bias",
        "self_attn.k_proj": "(kv head) <- embed + bias",
        "self_attn.v_proj": "(kv head) <- embed + bias",
        "self_attn.o_proj": "embed <- (kv group head)",
    }},
    per_layer=("layer_types",),
)
