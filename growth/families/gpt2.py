"""GPT-2 (Radford et al. 2019): Conv1D stores (in, out); query, key and value are fused as thirds."""

from __future__ import annotations

from growth.families.table import Family

# fmt: off
GPT2 = Family(
    name="GPT-2", model_type="gpt2", norm="layer", norms="pre", prefixes=("transformer.",),
    sizes=dict(vocab="vocab_size", pos="n_positions", embed="n_embd", qkv=3, heads="n_head",
               head=lambda c: c.n_embd // c.n_head, ffn="n_inner", layers="n_layer", labels=None),
    defaults=dict(n_inner=lambda c: 4 * c.n_embd, tie_word_embeddings=True, scale_attn_by_inverse_layer_idx=False),
    body={
        "wte": "vocab | embed",
        "wpe": "pos | embed",
        "h.{layers}.": {
            "ln_1":        "embed + bias",
            "attn.c_attn": "embed -> (qkv heads head) + bias",
            "attn.c_proj": "(heads head) -> embed + bias",
            "ln_2":        "embed + bias",
            "mlp.c_fc":    "embed -> ffn + bias",
            "mlp.c_proj":  "ffn -> embed + bias",
        },
        "ln_f": "embed + bias",
    },
    heads=dict(
        lm={"lm_head": "vocab <- embed"},
        choice={"multiple_choice_head.summary": "labels <- embed + bias"},
        sequence={"score": "labels <- embed"},
        tokens={"classifier": "labels <- embed + bias"},
        qa={"qa_outputs": "labels <- embed + bias"},
    ),
    last_norm="ln_f",
    tied={"lm_head.weight": "wte.weight"},
    by_index=("scale_attn_by_inverse_layer_idx",),
    buffers=("h.{layers}.attn.bias", "h.{layers}.attn.masked_bias"),
    roles=dict(query="attn.c_attn", key="attn.c_attn", value="attn.c_attn"),
)
