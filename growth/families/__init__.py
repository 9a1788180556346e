"""One table per architecture. A new family is one file beside these and one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growth.errors import UserError, did_you_mean
from growth.families.bert import BERT
from growth.families.distilbert import DISTILBERT
from growth.families.electra import ELECTRA
from growth.families.gemma2 import GEMMA2
from growth.families.gemma3 import GEMMA3_TEXT
from growth.families.gpt2 import GPT2
from growth.families.gpt_neox import GPT_NEOX
from growth.families.llama import LLAMA
from growth.families.mistral import MISTRAL
from growth.families.mixtral import MIXTRAL
from growth.families.modernbert import MODERNBERT
from growth.families.olmo2 import OLMO2
from growth.families.phi3 import PHI3
from growth.families.qwen2 import QWEN2
from growth.families.qwen2_moe import QWEN2_MOE
from growth.families.qwen3 import QWEN3
from growth.families.roberta import ROBERTA
from growth.families.t5 import T5
from growth.families.table import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(BERT, ROBERTA, DISTILBERT, ELECTRA, MODERNBERT),
        *(GPT2, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3_TEXT, OLMO2, PHI3, MIXTRAL, QWEN2_MOE),
        T5,
    )
}

# families that no table can describe, and why
BEYOND = {"albert": "its layers are runs of one block, so none can be copied, cut or inserted"}


def of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in BEYOND:
        raise UserError(f"{kind} is not grown: {BEYOND[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"no table for model_type {kind!r}{did_you_mean(kind, FAMILIES)}; known: {', '.join(FAMILIES)}"
            " (a new family is one table, one file in growth/families)"
        )
    return FAMILIES[kind]
