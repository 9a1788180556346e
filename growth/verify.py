"""Does it still compute the same? The outputs of two checkpoints on the same tokens, in float64.

transformers computes RMS norms, and some softmaxes, in float32 whatever the model's type. Here both are replaced by
plain float64 ones, so that what is exact shows as exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.errors import UsageError, UserError
from growth.operate import seen
from growth.undo import lineage_of

ATTENTION = "growth_float64"
ROUNDINGS = 64  # of the stored type that an exact result may be off by, relative to its largest output
FLOAT64 = 1e-12
OUTPUTS = (
    *("logits", "prediction_logits", "seq_relationship_logits", "mc_logits", "start_logits", "end_logits"),
    *("last_hidden_state", "pooler_output"),
)


@dataclass(frozen=True)
class Verdict:
    """How far two checkpoints are apart, and what the second one's lineage promised."""

    promised: str  # exact | approximate | no | unknown
    max_abs: float
    mean_abs: float
    largest: float  # output of the first
    dtype: str
    tokens: int
    allowed: float

    @property
    def exact(self) -> bool:
        return self.max_abs <= self.allowed * self.largest

    @property
    def kept(self) -> bool:
        """Whether the promise holds."""
        return self.exact or self.promised != "exact"


def verify(a: Any, b: Any, *, rows: int = 2, length: int = 64, seed: int = 0, dtype: str = "float64"):
    """Compare two checkpoints, or models, on seeded random tokens; `dtype` float64, or float32 as users run it."""
    import torch

    first, second = seen(a), seen(b)
    anatomies = dissect(first), dissect(second)
    tokens = _tokens(anatomies, rows, length, seed)
    if dtype not in ("float64", "float32", "bfloat16"):
        raise UsageError(f"dtype {dtype!r}: float64, float32 or bfloat16")
    kind = getattr(torch, dtype)
    one, two = (_outputs(c, anatomy, tokens, kind) for c, anatomy in zip((first, second), anatomies, strict=True))
    gaps = [_apart(one[name], two[name]) for name in one if name in two]
    if not gaps:
        raise UserError(f"{a} and {b} have no output in common")
    return Verdict(
        promised=lineage_of(second).get("preserves", "unknown"),
        max_abs=max(float(gap.max()) for gap in gaps),
        mean_abs=sum(float(gap.sum()) for gap in gaps) / sum(gap.numel() for gap in gaps),
        largest=max(float(value.abs().max()) for value in one.values()),
        dtype=dtype,
        tokens=tokens.numel(),
        allowed=max(FLOAT64, ROUNDINGS * max(_epsilon(c, kind) for c in (first, second))),
    )


def _apart(one, two):
    """Of what both have: a wider model's first channels, the tokens of the smaller vocabulary."""
    n = min(one.shape[-1], two.shape[-1])
    return (two[..., :n] - one[..., :n]).abs()


def _epsilon(checkpoint, kind) -> float:
    """The coarsest rounding on the way: of a stored tensor, or of the arithmetic."""
    import torch

    from growth.ranges import FLOATS, torch_dtype

    stored = {torch_dtype(entry.dtype) for entry in checkpoint.values() if entry.dtype in FLOATS}
    return max(torch.finfo(dtype).eps for dtype in {*stored, kind})


def _tokens(anatomies: tuple[Anatomy, Anatomy], rows: int, length: int, seed: int):
    import torch

    vocab = min(anatomy.sizes["vocab"] for anatomy in anatomies)
    length = min(longest(anatomy, length) for anatomy in anatomies)
    return torch.randint(min(4, vocab - 1), vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def longest(anatomy: Anatomy, length: int) -> int:
    """At most so many tokens, if the table of positions has them (RoBERTa's start at 2)."""
    return min(length, anatomy.sizes.get("pos", length + 2) - 2)


def _outputs(checkpoint, anatomy: Anatomy, tokens, dtype) -> dict[str, Any]:
    """Every output of the model that its config names, by name."""
    import torch

    model = load(checkpoint, anatomy, dtype)
    with torch.no_grad():
        seen = model(**_inputs(model, tokens))
    return {name: seen[name].double() for name in OUTPUTS if seen.get(name) is not None}


def _inputs(model, tokens) -> dict[str, Any]:
    """What the model's class takes for tokens [rows, length]."""
    import torch

    if type(model).__name__.endswith("ForMultipleChoice"):
        tokens = tokens[:, None]  # one choice each
    if not model.config.is_encoder_decoder:
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    tokens = tokens.clone()
    tokens[:, -1] = model.config.eos_token_id  # where T5's classifier reads
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "decoder_input_ids": tokens.flip(0)}


def load(checkpoint, anatomy: Anatomy, dtype):
    """The model by transformers, computing in one type throughout; a tensor missing from the files is an error."""
    import torch

    _register_attention()
    kind = _class(checkpoint, anatomy)
    try:
        how = {"output_loading_info": True, "dtype": dtype, "attn_implementation": ATTENTION}
        model, report = checkpoint.loaded(kind, **how)
    except Exception as error:  # whatever transformers has against it
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{checkpoint.path}: transformers cannot load it: {said[:300]}") from error
    if report["missing_keys"]:
        raise UserError(f"{checkpoint.path} lacks {sorted(report['missing_keys'])[0]} of {kind.__name__}")
    model.config._experts_implementation = "eager"
    if dtype == torch.float64:
        _plain_norms(model, anatomy)
        _plain_routers(model, anatomy)
    return model.eval()


def _class(checkpoint, anatomy: Anatomy):
    """What config.json names, or the model without a head where nothing is named and no head is stored."""
    import transformers

    names = anatomy.config.get("architectures") or []
    if not names and all(slot.row.body for slot in anatomy.places):
        return transformers.AutoModel
    if not names:
        raise UserError(f"{checkpoint.path}: config.json names no architecture, so the class of its head is not known")
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(f"{checkpoint.path}: transformers has no model {names[0]}")
    return kind


def quiet() -> None:
    """Neither bars nor reports of transformers between the lines of a command."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _register_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)


def attention(module, query, key, value, mask, scaling=None, softcap=None, position_bias=None, **_):
    """Softmax attention without a change of type; heads of keys and values are repeated for their group of queries."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # [B, H, T, d]
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # [B, H, T, T]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    for bias in (position_bias, mask):
        scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def _plain_norms(model, anatomy: Anatomy) -> None:
    """The family's table says which modules are norms, and how they store their gain."""
    import torch

    family = anatomy.family
    for slot in anatomy.places if family.norm == "rms" else ():
        if slot.row.body and slot.row.is_norm and slot.part == ".weight":
            name = slot.name.removeprefix(anatomy.prefix).removesuffix(".weight")
            module = model.base_model.get_submodule(name)  # whatever the files put in front of it
            epsilon = getattr(family.view(anatomy.config), family.epsilon)
            module.forward = _rms(module, epsilon, 1.0 if family.gain == "1+w" else 0.0)
    if family.embed_scale:  # kept in float32 by transformers
        table = model.base_model.get_submodule(family.rows[0].name)
        table.embed_scale = torch.tensor(math.sqrt(anatomy.sizes["embed"]), dtype=torch.float64)


def _plain_routers(model, anatomy: Anatomy) -> None:
    """Experts are weighed in float32 by transformers."""
    if "experts" not in anatomy.sizes:
        return
    kind = model._can_record_outputs["router_logits"].target_class
    summing = anatomy.family.view(anatomy.config).holds(anatomy.family.renormalised)

    def plain(module, _, made):
        logits, _, chosen = made
        weights = logits.softmax(-1).gather(-1, chosen)  # [tokens, chosen]
        return logits, weights / weights.sum(-1, keepdim=True) if summing else weights, chosen

    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(plain)


def _rms(module, epsilon: float, offset: float):
    return lambda x: x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (offset + module.weight)
