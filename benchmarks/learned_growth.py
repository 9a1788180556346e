"""What learning the maps is worth: held-out loss of a small Llama grown in several ways, at once and after some steps.

    python benchmarks/learned_growth.py WORK

The text is the language reference that comes with Python; the small model is trained on nine tenths of it first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import growth
from growth.batches import batches

VOCAB, SMALL, AFTER, LEARNING = 1500, 600, 100, 100
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WIDER = {"hidden": 128, "heads": 8, "kv_heads": 4, "ffn": 352}
TRIES = [("copies", 0.0002), ("copies", 0.001), ("copies", 0.005), ("random", 0.0002), ("random", 0.001)]
REPLACE = growth.Output(overwrite=True)


def split(home: Path) -> tuple[Path, Path]:
    """Text to learn from, and text to be tried on."""
    words = "\n".join(topics[name] for name in sorted(topics))
    paths = home / "text.txt", home / "heldout.txt"
    for path, part in zip(paths, (words[: len(words) * 9 // 10], words[len(words) * 9 // 10 :]), strict=True):
        path.write_text(part)
    return paths


def tokenizer(text: Path):
    """Byte-level pairs of this text."""
    raw = Tokenizer(models.BPE(unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    raw.train([str(text)], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


def small(text: Path, path: Path) -> Path:
    """Three layers of 64 channels."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=176, num_hidden_layers=3, **heads)
    settings = transformers.LlamaConfig(**sizes, max_position_embeddings=128, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(settings)
    model.config.architectures = ["LlamaForCausalLM"]
    for part in (tokenizer(text), model):
        part.save_pretrained(path)
    train(model, batches(path, text, number=SMALL, seed=1), SMALL, 0.002)
    model.save_pretrained(path)
    return path


def train(model, read, steps: int, rate: float) -> None:
    """AdamW, a tenth of warm-up, then down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    shape = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, 10 * (s + 1) / steps) * (1 - s / steps))
    model.train()
    for batch in read:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shape.step()


def heldout(model, tried: list[dict]) -> float:
    """Mean loss of a batch."""
    model.eval()
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in tried) / len(tried)


def main(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    text, rest = split(home)
    src = small(text, home / "small")
    tried = list(batches(src, rest, number=8, seed=9))

    def row(name: str, path: Path) -> None:
        model = transformers.LlamaForCausalLM.from_pretrained(path)
        start = heldout(model, tried)
        train(model, batches(src, text, number=AFTER, seed=5), AFTER, 0.001)
        print(f"| {name} | {start:.4f} | {heldout(model, tried):.4f} |", flush=True)

    print(f"| grown | at once | after {AFTER} steps |\n|---|---|---|")
    row("not at all", src)
    for way, sizes in (("twice as deep", {"factor": 2}), ("twice as wide", WIDER)):
        plain = growth.stack if "factor" in sizes else growth.widen
        row(f"{way}: {plain.__name__}", plain(src, home / "grown", **sizes, output=REPLACE))
        for start, rate in TRIES if "hidden" in sizes else TRIES[:3]:
            read = batches(src, text, number=LEARNING, seed=3)
            how = dict(start=start, steps=LEARNING, lr=rate)
            path = growth.learn(src, home / "grown", batches=read, **sizes, **how, output=REPLACE)
            row(f"{way}: learn, from {start}, lr {rate}", path)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main(Path(sys.argv[1]))
