"""Tiny random models of every family: pairwise distinct sizes, weights of standard deviation 0.3, no download.

Equal sizes hide a transposition and weights of 0.02 hide most mistakes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD, LENGTH = 61, 48, 40, 4, 6, 3, 10, 70
PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

ENCODER = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
           "num_attention_heads": HEADS, "max_position_embeddings": LENGTH, "pad_token_id": PAD}  # fmt: skip
DECODER = ENCODER | {"bos_token_id": CLS, "eos_token_id": SEP}
GROUPED = DECODER | {"num_key_value_heads": KV_HEADS}
FACTS = {
    "bert": ("Bert", "mlm", ENCODER),
    "roberta": ("Roberta", "mlm", ENCODER | {"type_vocab_size": 1, "bos_token_id": CLS, "eos_token_id": SEP}),
    "distilbert": ("DistilBert", "mlm", {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": FFN, "n_layers": LAYERS,
                                         "n_heads": HEADS, "max_position_embeddings": LENGTH, "pad_token_id": PAD}),
    "modernbert": ("ModernBert", "mlm", ENCODER | {"local_attention": 10, "global_attn_every_n_layers": 3,
                                                   "cls_token_id": CLS, "sep_token_id": SEP, "bos_token_id": CLS,
                                                   "eos_token_id": SEP}),
    "albert": ("Albert", "mlm", ENCODER | {"embedding_size": 26, "num_hidden_groups": 2}),
    "electra": ("Electra", "mlm", ENCODER | {"embedding_size": 26}),
    "gpt2": ("GPT2", "causal", {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_inner": FFN, "n_layer": LAYERS,
                                "n_head": HEADS, "n_positions": LENGTH, "bos_token_id": CLS, "eos_token_id": SEP}),
    "gpt_neox": ("GPTNeoX", "causal", DECODER | {"rotary_pct": 0.25}),
    "llama": ("Llama", "causal", GROUPED),
    "qwen2": ("Qwen2", "causal", GROUPED),
    "qwen3": ("Qwen3", "causal", GROUPED | {"head_dim": HEAD}),
    "mistral": ("Mistral", "causal", GROUPED | {"sliding_window": 5}),
    "gemma2": ("Gemma2", "causal", GROUPED | {"head_dim": HEAD, "sliding_window": 5, "query_pre_attn_scalar": 7}),
    "gemma3_text": ("Gemma3", "causal", GROUPED | {"head_dim": HEAD, "sliding_window": 5, "query_pre_attn_scalar": 7,
                                                   "sliding_window_pattern": 2}),
    "olmo2": ("Olmo2", "causal", GROUPED),
    "phi3": ("Phi3", "causal", GROUPED | {"sliding_window": 5}),
    "mixtral": ("Mixtral", "causal", GROUPED | {"num_local_experts": 5, "sliding_window": 5}),
    "qwen2_moe": ("Qwen2Moe", "causal", GROUPED | {"num_experts": 5, "num_experts_per_tok": 2,
                                                   "moe_intermediate_size": 28,
                                                   "shared_expert_intermediate_size": 31}),
    "t5": ("T5", None, {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": HEAD, "d_ff": FFN, "num_layers": LAYERS,
                        "num_heads": HEADS, "relative_attention_num_buckets": 16, "pad_token_id": PAD,
                        "relative_attention_max_distance": 20}),
}  # fmt: skip
EVERY = list(FACTS)
FAMILIES = [family for family in EVERY if family not in ("albert", "mixtral", "qwen2_moe")]  # a layer, a matrix: one
CLASSES = {None: "Model", "mlm": "ForMaskedLM", "causal": "ForCausalLM"}


def head(family: str) -> str | None:
    """The language-model head that this family has: mlm, causal or none."""
    return FACTS[family][1]


def attentions(family: str) -> tuple[str, ...]:
    """The attention implementations that the family knows on a CPU (Gemma-2 caps its scores: eager only)."""
    return ("eager",) if family == "gemma2" else ("sdpa", "eager")


def config(family: str, **changes):
    """A configuration whose sizes differ pairwise (dropout as the class has it); `changes` are keys of its class."""
    sizes = FACTS[family][2]
    settings = transformers.AutoConfig.for_model(family, **{**sizes, **changes})
    settings.architectures = [_class(family, None)]
    return settings


def model(family: str, head: str | None = None, seed: int = 0, attention: str | None = None, **changes):
    """A random float32 model in eval mode; `head` is None (the base model), "mlm" or "causal"."""
    settings = config(family, **changes)
    settings._attn_implementation = attention or attentions(family)[0]
    built = getattr(transformers, _class(family, head))(settings)
    built.config._experts_implementation = "eager"  # grouped_mm wants sizes that suit a GPU
    built.config.architectures = [type(built).__name__]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in built.parameters():
            noise = 0.3 * torch.randn(p.shape, generator=generator)
            p.copy_(noise if p.dim() > 1 else p + noise)  # a norm's gain stays around its neutral value
    return built.eval()


def save(model, path: Path, tokenizer=None) -> Path:
    """A checkpoint directory as transformers writes it, with the tokenizer's files when one is given."""
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return Path(path)


def tokenizer(size: int = VOCAB):
    """One token a character, [CLS] text [SEP]; a vocabulary of `size` entries that fits the tiny models."""
    letters = " etaoinshrdlucmfwypvbgkqjxz.,'-0123456789?!:;()\n"
    words = WORDS + list(letters)[: size - len(WORDS)]
    words += [f"[unused{i}]" for i in range(size - len(words))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=LENGTH, **dict(zip(names, WORDS, strict=True))
    )


def batch(lengths: list[list[int]], length: int, side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of random documents of the given lengths, one list a row: the Batch that models and objectives take."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), length), PAD)
    segments = torch.zeros_like(ids)
    for row, documents in enumerate(lengths):
        start = 0 if side == "right" else length - sum(documents)
        for number, size in enumerate(documents, start=1):
            ids[row, start : start + size] = torch.randint(len(WORDS), VOCAB, (size,), generator=generator)
            segments[row, start : start + size] = number
            start += size
    labels = torch.where(segments > 0, ids, -100)
    return {"input_ids": ids, "segment_ids": segments, "labels": labels, "sample_ids": torch.arange(len(lengths))}


def _class(family: str, head: str | None) -> str:
    stem, _, _ = FACTS[family]
    if family == "t5":
        return "T5EncoderModel"
    if (family, head) == ("gemma3_text", None):
        return "Gemma3TextModel"
    return stem + ("LMHeadModel" if (family, head) == ("gpt2", "causal") else CLASSES[head])
