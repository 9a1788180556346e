"""Laws of `growth verify --text`: both losses on real text, against transformers' own; vectors without a head."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from click.testing import CliRunner
from tiny_families import save

import growth
from growth.cli import main
from growth.errors import UserError
from growth.reading import Likeness, Loss, on_text

WORDS = "it was the best of times, it was the worst of times.\n" * 20  # 1,060 characters, one token each


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Checkpoints with a tokenizer of their own."""
    home = tmp_path_factory.mktemp("sources")

    def get(kind, cls=None):
        path = home / f"{kind}-{cls}"
        if not path.exists():
            save(path, kind, cls)
            tiny.tokenizer(53).save_pretrained(path)
        return path

    return get


def windows(length):
    """[CLS] text [SEP] in rows of at most `length`, as the tiny tokenizer cuts them."""
    ids = tiny.tokenizer(53)(WORDS, add_special_tokens=False)["input_ids"]
    each = length - 2
    return [[tiny.CLS, *ids[at : at + each], tiny.SEP] for at in range(0, len(ids), each)]


def test_the_loss_is_what_transformers_makes_of_the_same_windows(source, text):
    model = transformers.AutoModelForCausalLM.from_pretrained(source("llama")).eval()
    total, tokens = 0.0, 0
    for row in windows(37):
        labels = torch.tensor([[i if i not in (tiny.CLS, tiny.SEP) else -100 for i in row]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row]), labels=labels).loss
        total, tokens = total + float(loss) * (len(row) - 2), tokens + len(row) - 2
    one, two = on_text(source("llama"), source("llama"), text)
    assert one == two and one.tokens == tokens == len(WORDS) and one.kind == "next"
    assert one.nats == pytest.approx(total / tokens, rel=1e-6) and one.perplexity == pytest.approx(
        2.718281828**one.nats
    )


@pytest.mark.parametrize(("kind", "hidden"), [("llama", 72), ("gpt2", 48), ("bert", 60), ("modernbert", 60)])
def test_a_model_that_was_widened_reads_alike_and_a_stacked_one_does_not(source, tmp_path, text, kind, hidden):
    src = source(kind)
    before, wide = on_text(src, growth.widen(src, tmp_path / "wide", hidden=hidden), text)
    assert wide.nats == pytest.approx(before.nats, rel=1e-5) and wide.tokens == before.tokens
    again, deep = on_text(src, growth.stack(src, tmp_path / "deep"), text)
    assert again == before and abs(deep.nats - before.nats) > 0.01


def test_masked_tokens_are_a_fixed_share_and_nothing_but_text(source, text):
    (loss, _) = on_text(source("bert"), source("bert"), text)
    assert loss.kind == "masked" and 0.1 * len(WORDS) < loss.tokens < 0.2 * len(WORDS)


def test_a_masked_token_is_hidden_from_the_model_that_predicts_it(source, tmp_path, text):
    """A model without attention that gives every token back: it knows what it sees, and what is masked it does not."""
    old = growth.open(source("bert"))
    tensors = {name: torch.zeros_like(old.tensor(name)) for name in old}
    table = torch.zeros(53, 30)
    table[:30, :30] = torch.eye(30)
    for name in old:
        if name.endswith(("LayerNorm.weight",)):
            tensors[name] = torch.full_like(old.tensor(name), 10.0)
    tensors["bert.embeddings.word_embeddings.weight"] = table
    tensors["cls.predictions.transform.dense.weight"] = torch.eye(30)
    src = growth.write(tmp_path / "src", old.config, tensors.items())
    tiny.tokenizer(53).save_pretrained(src)
    (loss, _) = on_text(src, src, text)
    assert loss.nats > 3


@pytest.mark.parametrize(("kind", "cls"), [("bert", "BertModel"), ("t5", None), ("llama", "LlamaModel")])
def test_without_a_head_vectors_are_compared(source, tmp_path, text, kind, cls):
    src = source(kind, cls)
    hidden = {"bert": 60, "t5": 45, "llama": 72}[kind]
    alike = on_text(src, growth.widen(src, tmp_path / "wide", hidden=hidden), text)
    assert isinstance(alike, Likeness) and alike.passages == len(windows({"bert": 35, "t5": 128, "llama": 37}[kind]))
    assert alike.least > 1 - 1e-6
    if hidden == 60:  # even copies keep every cosine
        assert alike.most < 1e-5
    other = on_text(src, growth.stack(src, tmp_path / "deep"), text)
    assert other.cosine < 0.999 and other.most > 1e-3


def test_a_head_and_none_are_compared_by_their_vectors(source, text):
    assert isinstance(on_text(source("bert"), source("bert", "BertModel"), text), Likeness)


def test_a_result_without_a_tokenizer_reads_with_that_of_its_source(source, tmp_path, text):
    path = growth.widen(source("llama"), tmp_path / "x", hidden=96)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    one, two = on_text(source("llama"), path, text)
    assert one.nats == pytest.approx(two.nats, rel=1e-6)


def test_texts_that_cannot_be_read_are_refused_in_a_line(source, tmp_path, text):
    src = source("llama")
    (tmp_path / "latin").write_bytes("schön\n".encode("latin-1") * 30)
    (tmp_path / "empty").write_text(" \n")
    bare = growth.write(tmp_path / "bare", growth.open(src).config, dict(growth.open(src)).items())
    large = save(tmp_path / "large", "llama", vocab_size=20)
    tiny.tokenizer(53).save_pretrained(large)
    for a, path, said in [
        (src, tmp_path / "absent", "is not a text file"),
        (src, tmp_path, "is not a text file"),
        (src, tmp_path / "latin", "is not UTF-8: .* at byte 3"),
        (src, tmp_path / "empty", "holds no text"),
        (bare, text, "has a tokenizer"),
        (large, text, "the tokenizer gives token .*, and the model has 20"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            on_text(a, a, path)
        assert "\n" not in str(error.value)


def test_the_command_prints_both_losses(source, tmp_path, text):
    src, deep = source("llama"), growth.stack(source("llama"), tmp_path / "deep")
    before, after = on_text(src, deep, text)
    done = CliRunner().invoke(main, ["verify", str(src), str(deep), "--text", str(text)])
    assert done.exit_code == 0, done.output
    assert f"loss of A             {before.nats:.6f} nats a token" in done.output
    assert f"loss of B             {after.nats:.6f} nats a token" in done.output and "1,060 next tokens" in done.output
    done = CliRunner().invoke(main, ["verify", str(source("t5")), str(source("t5")), "--text", str(text)])
    assert "1.000000 on average" in done.output and "loss" not in done.output


def test_a_hopeless_loss_has_a_perplexity_all_the_same():
    assert Loss("next", 1e5, 1).perplexity > 1e300
