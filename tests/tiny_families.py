"""Tiny models of every family, on the meta device or on disk. Sizes are pairwise distinct, weights are large."""

from __future__ import annotations

import torch
import transformers

LLAMA = dict(
    **dict(vocab_size=53, hidden_size=48, intermediate_size=41, num_hidden_layers=4, max_position_embeddings=37),
    **dict(num_attention_heads=6, num_key_value_heads=3, head_dim=10),
)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
BERT = dict(
    **dict(vocab_size=53, hidden_size=30, num_attention_heads=5, intermediate_size=41, num_hidden_layers=3),
    **dict(max_position_embeddings=37, type_vocab_size=4),
)
CONFIGS = {
    "bert": BERT,
    "roberta": BERT,
    "distilbert": dict(vocab_size=53, dim=30, n_heads=5, hidden_dim=41, n_layers=3, max_position_embeddings=37),
    "electra": {**BERT, "embedding_size": 26},
    "modernbert": {**BERT, **SPECIAL, "cls_token_id": 1, "sep_token_id": 1, "num_hidden_layers": 4},
    "gpt2": dict(vocab_size=53, n_embd=30, n_head=5, n_inner=41, n_layer=2, n_positions=37, **SPECIAL),
    "gpt_neox": {**BERT, **SPECIAL, "num_hidden_layers": 4},
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": {**LLAMA, "sliding_window_pattern": 3},
    "phi3": {**BERT, **SPECIAL, "num_hidden_layers": 4},
    "olmo2": {**LLAMA, **SPECIAL},
    "mixtral": {**LLAMA, "num_local_experts": 5},
    "qwen2_moe": {**LLAMA, "num_experts": 5, "moe_intermediate_size": 41, "shared_expert_intermediate_size": 31},
    "t5": dict(
        **dict(vocab_size=53, d_model=30, num_heads=5, d_kv=4, d_ff=41, num_layers=2, num_decoder_layers=3),
        **dict(relative_attention_num_buckets=31),
    ),
}
LANGUAGE_MODELS = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "electra": "ElectraForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "t5": "T5ForConditionalGeneration",
}


def config_of(model_type, **changes):
    return transformers.AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})


def classes(model_type):
    """Every PyTorch class that transformers builds from this config."""
    kind = type(config_of(model_type))
    module = model_type.removesuffix("_text")
    modeling = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=["x"])
    found = [getattr(modeling, name) for name in modeling.__all__]
    return [c for c in found if getattr(c, "config_class", None) is kind and not c.__name__.endswith("PreTrainedModel")]


def save(path, model_type, cls=None, seed=0, dtype=torch.float32, **changes):
    """A checkpoint whose weights have standard deviation 0.3, so that mistakes show."""
    config = config_of(model_type, **changes)
    torch.manual_seed(seed)
    model = getattr(transformers, cls or LANGUAGE_MODELS[model_type])(config).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(path)
    return path


def load(path, cls=None, dtype=torch.float32):
    """The model by transformers itself, with its report of missing, unexpected and mismatched tensors."""
    config = transformers.AutoConfig.from_pretrained(path)
    cls = getattr(transformers, cls or LANGUAGE_MODELS[config.model_type])
    model, report = cls.from_pretrained(path, output_loading_info=True, dtype=dtype, attn_implementation="eager")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model.config._experts_implementation = "eager"  # grouped_mm wants sizes that suit a GPU
    return model.eval()


def logits(model, length=11):
    """Of fixed tokens, in the model's own precision."""
    tokens = torch.arange(2 * length).reshape(2, length) * 7 % 50 + 2
    inputs = {"decoder_input_ids": tokens.flip(0)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **inputs).logits
