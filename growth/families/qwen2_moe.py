"""Qwen2-MoE (arXiv 2407.10671): Qwen2 with experts, and one more that every token passes. All layers sparse."""

from __future__ import annotations

from dataclasses import replace

from growth.families.qwen2 import QWEN2

# fmt: off
BLOCK = {name: row for name, row in QWEN2.body["layers.{layers}."].items() if not name.startswith("mlp.")}
EXPERT = {"gate_proj": "{ffn} <- embed", "up_proj": "{ffn} <- embed", "down_proj": "embed <- {ffn}"}


def expert(axis: str) -> dict[str, str]:
    return {f"{name}": row.format(ffn=axis) for name, row in EXPERT.items()}


QWEN2_MOE = replace(
    QWEN2,
    name="Qwen2-MoE", model_type="qwen2_moe",
    renormalised="norm_topk_prob", defaults={**QWEN2.defaults, "norm_topk_prob": False},
    sizes={**QWEN2.sizes, "ffn": "moe_intermediate_size", "shared": "shared_expert_intermediate_size",
           "experts": "num_experts", "one": 1},
    body={**QWEN2.body, "layers.{layers}.": {
        **BLOCK,
        "mlp.gate": "experts <- embed",
        "mlp.experts.{experts}.": expert("ffn"),
        "mlp.shared_expert.": expert("shared"),
        "mlp.shared_expert_gate": "one <- embed",
    }},
    in_memory={
        "mlp.experts.{experts}.gate_proj": "mlp.experts.gate_up_proj",
        "mlp.experts.{experts}.up_proj":   "mlp.experts.gate_up_proj",
        "mlp.experts.{experts}.down_proj": "mlp.experts.down_proj",
    },
)
