"""Scoring a corpus: ours against a plain transformers loop that pads and makes whole logits, in time and in memory.

    python benchmarks/scoring.py [--only times|memory] [--threads 1] [--repeats 3] [--rows 192]

The model is a Llama of random weights (4 layers of width 256) with a head of 32,000; the texts are paragraphs of the
prose of this Python, up to 512 tokens long, in random order. The sums of log-probabilities of all texts are compared
before anything is timed. `plain` takes 16 texts as they come, `sorted` takes them by length. Times are interleaved,
minimum of the repeats; CPU seconds beside those of the wall, for a shared machine disturbs them less. The floor counts
2 FLOP a parameter and token, without padding and without attention, at the matrix rate measured here. Extra memory is
the rise of a process's peak resident size during the call, in a process of its own, for two sizes of the head.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from divergence import matrix_rate, timed
from relation_kl import peak
from transformers import LlamaConfig, LlamaForCausalLM

from distill import corpus
from distill.evaluate.machine import facts
from distill.reading import next_tokens, passes
from distill.recipe import CorpusSpec
from distill.refine.likelihood import log_probabilities
from distill.refine.scoring import TOKENS
from growth.console import table
from growth.files import write_json

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH, VOCABULARIES = 16, 512, (32_000, 128_000)


def texts(rows: int) -> list[np.ndarray]:
    """Token ids of so many texts, drawn from all."""
    tokenizer = {"train": {"vocab": 4096, "kind": "bpe"}}
    spec = CorpusSpec(source="stdlib", tokenizer=tokenizer, length=LENGTH, heldout=0, packed=False)
    with tempfile.TemporaryDirectory() as root:
        corpus.prepare(spec, None, Path(root) / "c")
        text = corpus.open(Path(root) / "c")
        chosen = np.random.default_rng(0).permutation(len(text))
        found = [ids[segments > 0] for ids, segments in map(text.row, chosen)]
    return found[:rows]


def model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def plain(net, documents: list[np.ndarray], order: np.ndarray) -> np.ndarray:
    """Sums of log-probabilities: pad, make all logits, log-softmax, gather."""
    found = np.empty(len(documents))
    for first in range(0, len(order), BATCH):
        some = order[first : first + BATCH]
        ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(documents[i]) for i in some], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(documents[i])] for i in some])
        logits = net(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        logp = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None])[..., 0]
        found[some] = (logp * mask[:, 1:]).sum(1, dtype=torch.float64).numpy()
    return found


def as_they_come(net, documents):
    return plain(net, documents, np.arange(len(documents)))


def by_length(net, documents):
    return plain(net, documents, np.argsort([len(one) for one in documents], kind="stable"))


def ours(net, documents):
    found = np.empty(len(documents))
    for some in passes(np.array([len(one) for one in documents]), TOKENS):
        several = [documents[i] for i in some]
        logp = log_probabilities(*next_tokens(net, several)).double().numpy()
        found[some] = np.add.reduceat(logp, np.cumsum([0, *(len(one) - 1 for one in several[:-1])]))
    return found


FORMS = {"plain": as_they_come, "sorted": by_length, "ours": ours}


def padded(lengths: np.ndarray, order: np.ndarray) -> float:
    """Share of padding in batches of so many."""
    cuts = [lengths[order[i : i + BATCH]] for i in range(0, len(order), BATCH)]
    return 1 - lengths.sum() / sum(len(cut) * cut.max() for cut in cuts)


def times(options) -> dict:
    documents, net = texts(options.rows), model(VOCABULARIES[0])
    scores = {form: run(net, documents) for form, run in FORMS.items()}
    for form in FORMS:
        assert np.allclose(scores[form], scores["plain"], rtol=1e-5, atol=1e-3), form
    runs = {form: [] for form in FORMS}
    for _ in range(options.repeats):
        for form, run in FORMS.items():
            runs[form].append(timed(partial(run, net, documents), "cpu"))
    lengths = np.array([len(one) for one in documents])
    tokens, rate = int((lengths - 1).sum()), matrix_rate(torch.float32, "cpu")
    flop = 2 * sum(p.numel() for p in net.parameters()) * tokens
    return {
        "texts": len(documents), "tokens": tokens, "rate": rate, "floor": flop / rate,
        "largest_difference": float(np.abs(scores["ours"] - scores["plain"]).max()),
        "padding": {"plain": padded(lengths, np.arange(len(lengths))), "sorted": padded(lengths, np.argsort(lengths))},
        "wall": {form: min(wall for wall, _ in found) for form, found in runs.items()},
        "cpu": {form: min(cpu for _, cpu in found) for form, found in runs.items()},
    }  # fmt: skip


def memory(options) -> dict:
    return {form: {v: _extra(form, v, options) for v in VOCABULARIES} for form in ("plain", "ours")}


def _extra(form: str, vocabulary: int, options) -> float:
    """MiB that a call adds to the peak of a process of its own."""
    call = [sys.executable, __file__, "--threads", str(options.threads), "--probe", form, str(vocabulary)]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1])


def probe(form: str, vocabulary: int) -> float:
    documents = [np.arange(n) % 1000 for n in np.random.default_rng(0).integers(20, LENGTH, 2 * BATCH)]
    net = model(vocabulary)
    FORMS[form](net, [one[:8] for one in documents[:2]])  # thread pools and libraries are not the loop's
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    FORMS[form](net, documents)
    return peak() - before


def show_times(found: dict) -> None:
    print(f"{found['texts']} texts, {found['tokens']} tokens; padding " + ", ".join(
        f"{form} {share:.0%}" for form, share in found["padding"].items()))  # fmt: skip
    print(f"largest difference of a sum {found['largest_difference']:.1e}; {found['rate'] / 1e9:.0f} GFLOP/s measured")
    rows = [
        (form, f"{found['tokens'] / found['wall'][form]:,.0f}", f"{found['wall']['plain'] / found['wall'][form]:.2f}",
         f"{found['tokens'] / found['cpu'][form]:,.0f}", f"{found['cpu']['plain'] / found['cpu'][form]:.2f}",
         f"{found['floor'] / found['cpu'][form]:.0%}")
        for form in FORMS
    ]  # fmt: skip
    table(["form", "tokens a second", "of plain", "tokens a CPU second", "of plain", "of the matrix rate"], rows)


def show_memory(found: dict) -> None:
    rows = [(form, *(f"{mib:.0f} MiB" for mib in sizes.values())) for form, sizes in found.items()]
    table(["extra peak memory", *(f"vocabulary {v}" for v in VOCABULARIES)], rows)


PARTS = {"times": (times, show_times), "memory": (memory, show_memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.probe:
        print(probe(options.probe[0], int(options.probe[1])))
        return
    for name in [options.only] if options.only else PARTS:
        run, show = PARTS[name]
        found = run(options)
        show(found)
        write_json(RESULTS / f"scoring_{name}.json", {"figures": found, "threads": options.threads, **facts()})


if __name__ == "__main__":
    main()
