"""From a batch with segment numbers to what a model's forward takes: masks and positions, per family.

A row holds one document, padded (a plain mask does), or several, packed: then every token sees its own document only
and positions start again with each, so that outputs are those of the documents alone. Which families can do that, and
how, is the table; tests/test_layout.py and tests/test_more_families.py prove each row of it. Rows of a family that is
not in it are padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from growth.errors import UserError
from growth.families import FAMILIES


class Layout(NamedTuple):
    """What a family's forward needs."""

    packed: str | None  # how rows of several documents are masked: by positions, a 4-D mask, or one mask a layer type
    positions: bool = True  # it takes position_ids
    skip: bool = False  # its positions start behind the padding index (RoBERTa)
    cache: bool = False  # it would fill a key-value cache unless told not to
    ends: bool = False  # its positions are a table, of a family that growth does not know


DECODER = Layout("positions", cache=True)  # transformers makes the mask itself where positions start again
ENCODER = Layout("mask")
AFTER_PADDING = Layout("mask", skip=True, ends=True)
LAYOUTS = {
    **dict.fromkeys(("bert", "distilbert", "electra", "eurobert", "nomic_bert"), ENCODER),
    **dict.fromkeys(("albert", "ernie", "megatron-bert", "rembert"), ENCODER._replace(ends=True)),
    "roberta": Layout("mask", skip=True),
    **dict.fromkeys(("camembert", "data2vec-text", "mpnet", "roberta-prelayernorm"), AFTER_PADDING),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), AFTER_PADDING),
    "modernbert": Layout("masks"),
    "t5": Layout("mask", positions=False),  # relative positions: the same inside a document wherever it stands
    **dict.fromkeys(("gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"), DECODER),
    **dict.fromkeys(("olmo2", "phi3", "mixtral", "qwen2_moe"), DECODER),
    **dict.fromkeys(("arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "glm", "glm4", "granite"), DECODER),
    **dict.fromkeys(("helium", "hunyuan_v1_dense", "ministral", "modernbert-decoder", "nemotron", "olmo"), DECODER),
    **dict.fromkeys(("olmo3", "phi", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"), DECODER),
    "gpt_bigcode": DECODER._replace(ends=True),
}
MAY_DECODE = (  # as their config says
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
)
UNKNOWN = Layout(None, positions=False)


def packable(config) -> bool:
    """Whether several documents may share a row without seeing each other."""
    return _layout(config).packed is not None and _separates(config)


def _separates(config) -> bool:
    """Flash attention takes positions for documents in rows of their own alone, and no 4-D mask at all."""
    return config._attn_implementation in (None, "sdpa", "eager", "flex_attention")


def longest(config) -> int | None:
    """Tokens that a row may have; None where positions are computed, so that no table ends."""
    family, layout = FAMILIES.get(config.model_type), _layout(config)
    if layout.ends:
        places = config.max_position_embeddings
    else:
        places = family.sizes_of(config.to_dict()).get("pos") if family else None
    return places - (config.pad_token_id + 1) if places and layout.skip else places


def inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keyword arguments of the model's forward for a batch of input_ids [B, T] and segment_ids [B, T]."""
    segments, config = batch["segment_ids"], model.config
    layout = _layout(config)
    known = {"input_ids": batch["input_ids"]}
    if layout.positions:
        known["position_ids"] = positions(segments) + (config.pad_token_id + 1 if layout.skip else 0)
    if layout.cache:
        known["use_cache"] = False
    if bool((segments > 1).any()):
        return known | _packed(layout, model, segments)
    return known | {"attention_mask": (segments > 0).long()}


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """One document a row, padded on the right with token 0, which nothing sees."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    segments = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        segments[i, : len(row)] = 1
    return {"input_ids": ids, "segment_ids": segments}


def positions(segments: Tensor) -> Tensor:
    """0, 1, 2 ... within each run of equal segment numbers: [B, T] -> [B, T]."""
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return place - torch.where(starts, place, 0).cummax(1).values


def _layout(config) -> Layout:
    layout = LAYOUTS.get(config.model_type, UNKNOWN)
    if config.model_type in MAY_DECODE and config.is_decoder:
        return layout._replace(packed=None)  # the 4-D mask would show it the future
    return layout


def _packed(layout: Layout, model: nn.Module, segments: Tensor) -> dict[str, Tensor]:
    config = model.config
    if layout.packed is None:
        raise UserError(f"{config.model_type} cannot keep packed documents apart; corpora need packed: false")
    if not _separates(config):
        raise UserError(f"packed rows need sdpa, eager or flex attention, not {config._attn_implementation}")
    if layout.packed == "positions":
        return {}  # a mask of any kind would switch transformers' own separation off
    together = segments[:, None, :, None] == segments[:, None, None, :]  # [B, 1, T, T]; padding sees padding: no NaN
    if layout.packed == "mask":
        return {"attention_mask": _as(together, model)}
    place = torch.arange(segments.shape[1], device=segments.device)
    near = (place[:, None] - place[None, :]).abs() <= config.sliding_window
    return {
        "attention_mask": {
            "full_attention": _as(together, model),
            "sliding_attention": _as(together & near, model),
        }
    }


def _as(mask: Tensor, model: nn.Module) -> Tensor:
    """A boolean mask in the form of the attention implementation: all but sdpa add it to the scores."""
    if model.config._attn_implementation == "sdpa":
        return mask
    # the least finite number, as transformers has it: with minus infinity a row without keys would be NaN
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )
