"""T5 (Raffel et al. 2019, arXiv 1910.10683): two stacks; the first block of each holds the position bias of all."""

from __future__ import annotations

from growth.families.table import Family

# fmt: off
SELF = {
    "layer.0.SelfAttention.q": "(heads head) <- embed",
    "layer.0.SelfAttention.k": "(heads head) <- embed",
    "layer.0.SelfAttention.v": "(heads head) <- embed",
    "layer.0.SelfAttention.o": "embed <- (heads head)",
    "layer.0.layer_norm":      "embed",
}
CROSS = {
    "layer.1.EncDecAttention.q": "(heads head) <- embed",
    "layer.1.EncDecAttention.k": "(heads head) <- embed",
    "layer.1.EncDecAttention.v": "(heads head) <- embed",
    "layer.1.EncDecAttention.o": "embed <- (heads head)",
    "layer.1.layer_norm":        "embed",
}
FFN = {
    "DenseReluDense.wi if not gated": "ffn <- embed",
    "DenseReluDense.wi_0 if gated":   "ffn <- embed",
    "DenseReluDense.wi_1 if gated":   "ffn <- embed",
    "DenseReluDense.wo":              "embed <- ffn",
    "layer_norm":                     "embed",
}
T5 = Family(
    name="T5", model_type="t5", norm="rms", norms="pre", prefixes=("transformer.",), depth=("layers", "decoder_layers"),
    sizes=dict(vocab="vocab_size", embed="d_model", heads="num_heads", head="d_kv", ffn="d_ff",
               buckets="relative_attention_num_buckets", layers="num_layers", decoder_layers="num_decoder_layers",
               pool="d_model", labels=None),
    defaults=dict(layer_norm_epsilon=1e-6, num_decoder_layers=lambda c: c.num_layers,
                  relative_attention_num_buckets=32,
                  feed_forward_proj="relu", gated=lambda c: c.feed_forward_proj.startswith("gated-"),
                  tie_word_embeddings=True, scale_decoder_outputs=lambda c: c.tie_word_embeddings),
    body={
        "shared": "vocab | embed",
        "encoder.embed_tokens": "vocab | embed",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "buckets | heads",
        "encoder.block.{layers}.": {**SELF, "layer.1.": FFN},
        "encoder.final_layer_norm": "embed",
        "decoder.?": {
            "embed_tokens": "vocab | embed",
            "block.0.layer.0.SelfAttention.relative_attention_bias": "buckets | heads",
            "block.{decoder_layers}.": {**SELF, **CROSS, "layer.2.": FFN},
            "final_layer_norm": "embed",
        },
    },
    heads=dict(
        lm={"lm_head": "vocab <- embed"},
        sequence={"classification_head.dense":    "pool <- embed + bias",
                  "classification_head.out_proj": "labels <- pool + bias"},
        tokens={"classifier": "labels <- embed + bias"},
        qa={"qa_outputs": "labels <- embed + bias"},
    ),
    last_norm="decoder.final_layer_norm", head_scaled=False, head_scale="scale_decoder_outputs",
    epsilon="layer_norm_epsilon",
    ties="",                          # transformers does, whatever config.json says; T5 1.1 stores a head of its own
    tied={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight",
          "lm_head.weight": "shared.weight"},
    buffers=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    roles=dict(query="layer.0.SelfAttention.q", key="layer.0.SelfAttention.k", value="layer.0.SelfAttention.v"),
)
