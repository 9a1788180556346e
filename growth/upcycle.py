"""Sparse upcycling: a dense model as a mixture of experts that starts as copies of its feed-forward part.

Komatsuzaki et al. 2022, arXiv 2212.05055. Where the router's weights sum to one, identical experts are the dense
model exactly, whatever the router says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from growth import families
from growth.anatomy import Anatomy, dissect
from growth.bits import Mask
from growth.errors import UsageError, UserError
from growth.families.table import Slot
from growth.masks import masks_of
from growth.noise import drawn
from growth.operate import PLAIN, Output, Result, delivered, opened
from growth.pieces import Computed, Fill, Piece
from growth.ranges import torch_dtype
from growth.reindex import Stream, widely

ROUTER = 0.02  # standard deviation of a fresh router
MOST = 10_000  # experts


@dataclass(frozen=True)
class Translation:
    """How a dense family becomes a sparse one: rows by name, and what the config must say."""

    to: str  # model_type
    architecture: str
    rows: Mapping[str, str]  # sparse row -> the dense row it copies, "normal" or "zero"
    defaults: Mapping[str, Any]  # of the dense family: where the sparse one's differ, they must be written out
    config: Callable[[Any, int, int], dict[str, Any]]  # (dense view, experts, chosen per token)
    impossible: tuple[str, ...] = ()  # config keys that the sparse family has no place for


COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
MIXTRAL = dict(
    to="mixtral",
    architecture="MixtralForCausalLM",
    rows={
        "block_sparse_moe.gate": "normal",
        "block_sparse_moe.experts.{experts}.w1": "mlp.gate_proj",
        "block_sparse_moe.experts.{experts}.w2": "mlp.down_proj",
        "block_sparse_moe.experts.{experts}.w3": "mlp.up_proj",
    },
    config=lambda c, experts, top: {"num_local_experts": experts, "num_experts_per_tok": top},
)
QWEN2_MOE = Translation(
    to="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    rows={
        "mlp.gate": "normal",
        **{f"mlp.experts.{{experts}}.{part}": f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")},
        # an expert for every token that says nothing yet: its last projection is zero
        "mlp.shared_expert.gate_proj": "mlp.gate_proj",
        "mlp.shared_expert.up_proj": "mlp.up_proj",
        "mlp.shared_expert.down_proj": "zero",
        "mlp.shared_expert_gate": "zero",
    },
    defaults={**COMMON, "max_position_embeddings": 32768},
    config=lambda c, experts, top: {
        **{"num_experts": experts, "num_experts_per_tok": top, "norm_topk_prob": True},  # else nothing sums to one
        **{"moe_intermediate_size": c.intermediate_size, "shared_expert_intermediate_size": c.intermediate_size},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "qkv_bias": True},
    },
)
TRANSLATIONS = {
    "llama": Translation(
        **MIXTRAL,
        defaults={**COMMON, "max_position_embeddings": 2048, "sliding_window": None},
        impossible=("attention_bias", "mlp_bias"),
    ),
    "mistral": Translation(**MIXTRAL, defaults={**COMMON, "max_position_embeddings": 131072, "sliding_window": 4096}),
    "qwen2": QWEN2_MOE,
}


def upcycle(
    src: Any,
    dst: str | Path | None = None,
    *,
    experts: int = 8,
    top: int = 2,
    noise: float = 0.0,
    seed: int = 0,
    output: Output = PLAIN,
) -> Any:
    """A mixture of `experts`, `top` of them for every token: exact, unless `noise` tells the experts apart at once."""
    if not 1 <= top <= experts <= MOST:
        raise UsageError(f"{top} of {experts} experts: at least one, at most all, and no more than {MOST}")
    if not 0 <= noise < math.inf:
        raise UsageError(f"noise {noise}: no less than 0")
    checkpoint = opened(src, dst, output)
    anatomy = dissect(checkpoint)
    arguments = {"experts": experts, "top": top, "noise": noise, "seed": seed}
    config = sparse_config(anatomy, experts, top)
    stream = sparse(checkpoint, anatomy, config, noise, seed)
    facts = {"maps": {"experts": [0] * experts}, "new": {"experts": list(range(experts))},
             "preserves": "approximate" if noise else "exact"}  # fmt: skip
    result = Result("upcycle", arguments, config, stream, facts, masks=_masks(checkpoint, anatomy, config, noise))
    return delivered(result, dst, output, checkpoint)


def _masks(checkpoint: Any, anatomy: Anatomy, config: Mapping[str, Any], noise: float) -> dict[str, Mask] | None:
    """Every expert has the mask of what it copies; noise would bring dead weights to life."""
    masks = masks_of(checkpoint, anatomy)
    return None if noise else {slot.name: masks[name] for slot, name in origins(anatomy, config) if name in masks}


def _table(anatomy: Anatomy) -> Translation:
    kind = anatomy.family.model_type
    if kind not in TRANSLATIONS:
        raise UserError(f"{anatomy.family.name} cannot be upcycled; {', '.join(TRANSLATIONS)} can")
    return TRANSLATIONS[kind]


def sparse_config(anatomy: Anatomy, experts: int, top: int) -> dict[str, Any]:
    """The config of the mixture."""
    table = _table(anatomy)
    view = anatomy.family.view(anatomy.config)
    if wrong := next((key for key in table.impossible if getattr(view, key)), None):
        raise UserError(f"config.json sets {wrong}, which {families.FAMILIES[table.to].name} has no place for")
    if (anatomy.config.get("architectures") or [table.architecture])[0] not in _language(anatomy, table):
        raise UserError(f"only a language model can be upcycled, not {anatomy.config['architectures'][0]}")
    stated = {
        "num_key_value_heads": view.num_key_value_heads,
        "head_dim": view.head_dim,
        "rope_parameters": _rope(anatomy),
    }
    stated |= {key: getattr(view, key) for key in anatomy.family.per_layer}
    own = {"model_type": table.to, "architectures": [table.architecture]}
    return {**table.defaults, **anatomy.config, **stated, **table.config(view, experts, top), **own}


def _rope(anatomy: Anatomy) -> dict[str, Any]:
    """Mixtral turns a hundred times as slowly as Mistral unless it is told (measured: 4.6 in logits)."""
    config = anatomy.config
    older = {
        "rope_type": "default",
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    return config.get("rope_parameters") or older


def _language(anatomy: Anatomy, table: Translation) -> set[str]:
    body = {slot.row.group for slot in anatomy.places}
    return set() if body - {"", "lm_head"} else {*(anatomy.config.get("architectures") or []), table.architecture}


def origins(anatomy: Anatomy, config: Mapping[str, Any]) -> Iterator[tuple[Slot, str]]:
    """Every place of the mixture, with the dense tensor that it copies, or `normal` or `zero`."""
    dense = {slot.key: name for slot, name in anatomy.places.items()}
    rows = _table(anatomy).rows
    for slot in families.of(config).slots(config, anatomy.prefix).values():
        block, _, module = slot.row.name.partition("}.")
        origin = rows.get(module)
        layer = tuple(place for place in slot.at if place[0] in anatomy.family.depth)
        row = slot.row.name if origin is None else f"{block}}}.{origin}"
        if origin in ("zero", "normal"):
            yield slot, origin
        elif name := dense.get((row, slot.part, layer)):
            yield slot, name


def sparse(checkpoint: Any, anatomy: Anatomy, config: Mapping[str, Any], noise: float, seed: int) -> Stream:
    """The tensors of the mixture."""
    dtype = next(iter(checkpoint.values())).dtype
    for slot, origin in origins(anatomy, config):
        if origin == "zero":
            yield slot.name, Fill(dtype, slot.shape, 0.0)
        elif origin == "normal":
            yield slot.name, Computed(dtype, slot.shape, partial(_router, slot, dtype, seed))
        else:
            yield slot.name, _copy(checkpoint, origin, slot, noise if "experts" in dict(slot.at) else 0.0, seed)


def _copy(checkpoint: Any, name: str, slot: Slot, noise: float, seed: int) -> Piece:
    entry = checkpoint[name]
    if not noise:
        return entry

    def make():
        tensor = checkpoint.tensor(name)
        return widely(lambda wide: wide + drawn(wide.shape, slot.name, seed, wide.dtype) * noise * wide.std(), tensor)

    return Computed(entry.dtype, entry.shape, make)


def _router(slot: Slot, dtype: str, seed: int):
    import torch

    return (drawn(slot.shape, slot.name, seed, torch.float32) * ROUTER).to(torch_dtype(dtype))
