"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with experts, which are an axis in names like layers."""

from __future__ import annotations

from dataclasses import replace

from growth.families.mistral import MISTRAL

# fmt: off
BLOCK = {name: row for name, row in MISTRAL.body["layers.{layers}."].items() if not name.startswith("mlp.")}
MIXTRAL = replace(
    MISTRAL,
    name="Mixtral", model_type="mixtral",
    defaults={**MISTRAL.defaults, "rms_norm_eps": 1e-5},
    sizes={**MISTRAL.sizes, "experts": "num_local_experts"},
    body={**MISTRAL.body, "layers.{layers}.": {
        **BLOCK,
        "block_sparse_moe.gate": "experts <- embed",
        "block_sparse_moe.experts.{experts}.": {"w1": "ffn <- embed", "w2": "embed <- ffn", "w3": "ffn <- embed"},
    }},
    in_memory={
        "block_sparse_moe.gate": "mlp.gate.weight",
        "block_sparse_moe.experts.{experts}.w1": "mlp.experts.gate_up_proj",       # w1 of an expert, then its w3
        "block_sparse_moe.experts.{experts}.w3": "mlp.experts.gate_up_proj",
        "block_sparse_moe.experts.{experts}.w2": "mlp.experts.down_proj",
    },
)
