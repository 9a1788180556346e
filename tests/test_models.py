"""Models: what is found, what is refused, what is loaded, and what a student starts from."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distill import models, sources
from distill.drawn import Drawn
from distill.kinds import StudentSpec
from distill.taps import Tap, trace
from growth.errors import UserError

HEADED = [f for f in tiny.FAMILIES if tiny.head(f)]


def digest(model):
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def spec(*from_, sha256=None):
    return SimpleNamespace(from_=from_, revision=None, sha256=sha256)


def student(**given):
    """As a recipe has it."""
    return StudentSpec.model_validate(given)


@pytest.fixture
def saved(tmp_path):
    """A BERT with its head, and its tokenizer."""
    return tiny.save(tiny.model("bert", "mlm"), tmp_path / "bert", tiny.tokenizer())


def change(path, edit):
    """Rewrite the tensors of a checkpoint."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


# Loading


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_was_saved_is_what_is_loaded(family, tmp_path, capfd):
    for head in {None, tiny.head(family)}:
        model = tiny.model(family, head)
        loaded = models.load(tiny.save(model, tmp_path / str(head)), head)
        assert type(loaded) is type(model) and digest(loaded) == digest(model) and not loaded.training
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", HEADED)
def test_the_base_model_of_a_checkpoint_with_a_head(family, tmp_path, capfd):
    whole = tiny.model(family, tiny.head(family))
    loaded = models.load(tiny.save(whole, tmp_path / "whole"))
    ours, theirs = loaded.state_dict(), whole.base_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("other", ["BertForPreTraining", "BertForSequenceClassification"])
def test_another_head_is_left_out(other, tmp_path):
    whole = getattr(transformers, other)(tiny.config("bert"))
    base = models.load(tiny.save(whole, tmp_path / "other")).state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in whole.bert.state_dict().items())


def test_of_an_encoder_and_a_decoder_the_encoder_is_taken(tmp_path):
    whole = transformers.T5ForConditionalGeneration(tiny.config("t5", is_encoder_decoder=True))
    encoder = models.load(tiny.save(whole, tmp_path / "t5"))
    ours, theirs = encoder.encoder.state_dict(), whole.encoder.state_dict()
    assert type(encoder).__name__ == "T5EncoderModel" and all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt_neox"])
def test_a_head_that_is_not_there_is_made_new_from_the_seed_and_said_so(family, tmp_path, capfd):
    path = tiny.save(tiny.model(family), tmp_path / "base")
    one, same, other = (models.load(path, tiny.head(family), seed=seed) for seed in (1, 1, 2))
    assert digest(one) == digest(same) != digest(other)
    assert "start at random" in capfd.readouterr().err


def test_a_dtype_is_what_is_asked_for(saved):
    assert models.load(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def lose(name):
    return lambda tensors: tensors.pop(name)


def put(name, make):
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


QUERY = "bert.encoder.layer.2.attention.self.query.weight"
FAULTS = {
    "a shape": (put(QUERY, lambda t: t[:, 1:].contiguous()), r"is F32 \[48, 47\], .* asks for float \[48, 48\]"),
    "the vocabulary": (
        put("bert.embeddings.word_embeddings.weight", lambda t: t[:49].clone()),
        r"\[49, 48\], config.json asks for float \[61, 48\]",
    ),
    "integers": (put(QUERY, lambda t: t.to(torch.int32)), r"query.weight is I32"),
    "nan": (put(QUERY, lambda t: t.clone().fill_(torch.nan)), "query.weight not finite"),
    "infinity": (put(QUERY, lambda t: t.index_fill(0, torch.tensor([3]), torch.inf)), "query.weight not finite"),
    "a missing tensor": (lose(QUERY), "lacks bert.encoder.layer.2.attention.self.query.weight"),
    "half a head": (lose("cls.predictions.transform.dense.bias"), "lacks cls.predictions.transform.dense.bias"),
    "a stranger": (put("bert.adapter.weight", lambda _: torch.ones(3)), "has no place for: bert.adapter.weight"),
    "a stray head": (put("score.weight", lambda _: torch.ones(3)), "has no place for: score.weight"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_whole_is_refused_by_tensor(fault, saved):
    edit, reason = FAULTS[fault]
    change(saved, edit)
    with pytest.raises(UserError, match=reason):
        models.load(saved, "mlm")


def test_buffers_of_old_checkpoints_are_no_strangers(saved):
    change(saved, put("bert.embeddings.position_ids", lambda _: torch.arange(tiny.LENGTH)[None]))
    assert models.load(saved).config.vocab_size == tiny.VOCAB


def test_a_shape_is_checked_under_its_name_on_the_disk_too(tmp_path):
    path = tiny.save(tiny.model("gpt_neox", "causal"), tmp_path / "neox")  # `lm_head` in memory
    change(path, put("embed_out.weight", lambda t: t[:49].clone()))
    with pytest.raises(UserError, match=r"(head|embed_out)\.weight"):
        models.load(path, "causal")


def describe(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def test_code_that_comes_with_a_checkpoint_is_never_run(saved, tmp_path):
    (saved / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    describe(saved, auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"})
    with pytest.raises(UserError, match="brings its own code"):
        models.load(saved)
    assert not (tmp_path / "canary").exists()


def test_a_pickle_is_never_opened(tmp_path):
    model, path = tiny.model("bert"), tmp_path / "pickled"
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(UserError, match="convert it to safetensors"):
        models.load(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nothing"}, "no model_type 'nothing'"),
        ({"model_type": ["bert"]}, "no model_type"),
        ({"hidden_act": "nothing"}, "no BertForMaskedLM can be built .* nothing is known as 'nothing'"),
        ({"id2label": "x"}, "not a bert config"),
        ({"hidden_size": "wide"}, "not a bert config"),
        ({"num_attention_heads": 7}, "no BertForMaskedLM can be built .* multiple of the number of attention heads"),
        ({"num_hidden_layers": 5}, "lacks bert.encoder.layer.4"),
        ({"architectures": ["LlamaForCausalLM"]}, "has no place for: cls"),
    ],
)
def test_a_config_that_transformers_cannot_read_is_refused(saved, changes, reason):
    describe(saved, **changes)
    with pytest.raises(UserError, match=reason):
        models.load(saved)


@pytest.mark.parametrize("value", [None, -1, "x"])
def test_a_config_with_any_one_value_broken_is_measured_or_refused(value):
    sound = tiny.config("bert", num_hidden_layers=1).to_dict()
    for key in sound:
        with suppress(UserError):
            models.facts({**sound, key: value})


@pytest.mark.parametrize(("family", "head"), [("bert", "causal"), ("llama", "mlm"), ("t5", "mlm")])
def test_a_head_that_the_family_does_not_have_is_refused(family, head, tmp_path):
    path = tiny.save(tiny.model(family), tmp_path / "model")
    with pytest.raises(UserError, match=f"{family} has no .*-language-model head"):
        models.load(path, head)


# Facts


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_facts_are_those_of_the_loaded_model(family, tmp_path):
    model = tiny.model(family, tiny.head(family))
    facts = models.facts(tiny.save(model, tmp_path / "model"))
    taps = trace(model, tiny.batch([[5]], 5), [Tap(r, -1) for r in ("query", "key", "value", "hidden")]).taps
    widths = {role: t.shape[-1] * (t.shape[1] if t.dim() == 4 else 1) for (role, _), t in taps.items()}
    assert facts.widths == widths and facts.parameters == sum(p.numel() for p in model.parameters())
    assert (facts.family, facts.layers, facts.vocab) == (family, tiny.LAYERS, tiny.VOCAB)
    assert (facts.heads, facts.kv_heads) == (taps["query", -1].shape[1], taps["key", -1].shape[1])
    assert facts.causal == (tiny.head(family) == "causal")


# Finding


def test_the_first_source_at_hand_is_taken(saved, tmp_path):
    there = spec(str(tmp_path / "absent"), "no-such-org/no-such-model", "package:no_such_package/model", str(saved))
    assert models.resolve(there, "teacher") == saved


def test_a_model_inside_a_package_is_found_without_importing_it(saved, tmp_path, monkeypatch):
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    saved.rename(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert models.resolve(spec("package:carrier/model"), "teacher") == package / "model"
    assert "carrier" not in sys.modules


@pytest.mark.parametrize("source", ["package:carrier/../../etc", "package:a.b/model", "package:carrier//etc"])
def test_a_path_that_leaves_its_package_is_refused(source):
    with pytest.raises(UserError, match="package:NAME/SUBPATH"):
        models.resolve(spec(source), "teacher")


def test_a_model_in_the_hub_cache_needs_no_network(saved, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "models--org--small"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    for directory in (snapshot, blobs, cache / "refs"):
        directory.mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    for file in saved.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    found = models.resolve(spec("org/small"), "teacher")
    assert found == snapshot and digest(models.load(found, "mlm")) == digest(models.load(saved, "mlm"))
    start = models.seed_checkpoint(student(**{"from": "t"}), {"t": found}.get, tmp_path / "start", None, 0)
    assert (start / "tokenizer.json").is_file() and not (start / "tokenizer.json").is_symlink()


def test_a_model_that_is_nowhere_is_named_with_where_was_looked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model teacher: none of org/absent, package:absent/model .*HF_HUB_OFFLINE"):
        models.resolve(spec("org/absent", "package:absent/model"), "teacher")


def test_weights_are_pinned_by_their_digest(saved):
    right = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert models.resolve(spec(str(saved), sha256=right), "teacher") == saved
    with pytest.raises(
        UserError, match=f"teacher: the weights in .* have sha256 {right}, the recipe asks for {'0' * 64}"
    ):
        models.resolve(spec(str(saved), sha256="0" * 64), "teacher")


def test_the_digest_of_shards_sees_every_shard(tmp_path):
    model = tiny.model("bert")
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    before = sources.weights_sha256(tmp_path / "a")
    shard = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert sources.weights_sha256(tmp_path / "a") != before


# Starting


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_random_weights_depend_on_seed_and_name_alone(family):
    # GPT-2 and ModernBERT draw their output projections the smaller the deeper they are
    depth = tiny.LAYERS if family in ("gpt2", "modernbert") else tiny.LAYERS - 1
    torch.manual_seed(5)
    one = models.fresh(tiny.config(family), tiny.head(family), 1).base_model.state_dict()
    small = tiny.config(family, **{DEPTH.get(family, "num_hidden_layers"): depth})
    torch.manual_seed(6)
    same, other = (models.fresh(small, None, seed).state_dict() for seed in (1, 2))
    shared = one.keys() & same.keys()
    assert len(shared) > 5 * depth and all(torch.equal(one[name], same[name]) for name in shared)
    assert not any(torch.equal(same[name], other[name]) for name in shared if same[name].dim() == 2)


DEPTH = {"distilbert": "n_layers", "gpt2": "n_layer", "t5": "num_layers"}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_random_weights_are_spread_as_transformers_spreads_them(family):
    sizes = {} if family in DEPTH else {"hidden_size": 240}
    ours = models.fresh(tiny.config(family, **sizes), tiny.head(family), 1)
    theirs = type(ours)(tiny.config(family, **sizes))
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))  # what is tied is tied
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.std(correction=0).item() == pytest.approx(b.std(correction=0).item(), rel=0.25), name
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())


@pytest.mark.parametrize("family", tiny.EVERY)
def test_random_weights_are_written_one_after_the_other_as_they_would_be_made_together(family, tmp_path, monkeypatch):
    config, head, together = tiny.config(family), tiny.head(family), []
    models.save(models.fresh(tiny.config(family), head, 3), tmp_path / "whole", carry=None)
    make = Drawn._make
    monkeypatch.setattr(Drawn, "_make", lambda self, some: together.append(some) or make(self, some))
    monkeypatch.setattr(models, "fresh", None)
    models.seed_checkpoint(student(new={"config": config.to_dict()}), {}.get, tmp_path / "start", head, 3)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "start" / file.name).read_bytes() == file.read_bytes()
    most = max(sum(p.numel() for p in some) for some in together) / max(p.numel() for some in together for p in some)
    assert most <= (4 if family == "t5" else 1.5)  # its attention draws four matrices in one go, experts two


STARTS = {
    "new like": (student(new={"like": "teacher"}), "mlm"),
    "new config": (student(new={"config": tiny.config("llama", num_hidden_layers=2).to_dict()}), "causal"),
    "from": (student(**{"from": "teacher"}), None),
    "cut": (student(cut={"from": "teacher", "layers": (0, 3)}), None),
    "cut without a head": (student(cut={"from": "headless", "layers": 2}), "mlm"),
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_start_is_the_same_bytes_for_the_same_seed(kind, saved, tmp_path):
    (wanted, head), headless = STARTS[kind], tiny.save(tiny.model("bert"), tmp_path / "headless", tiny.tokenizer())
    refs = {"teacher": saved, "headless": headless}
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    one, same, other = (
        models.seed_checkpoint(wanted, refs.__getitem__, tmp_path / name, head, seed, corpus=tmp_path)
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    files = {file.name for file in one.iterdir()}
    assert all((one / name).read_bytes() == (same / name).read_bytes() for name in files - {"growth.json"})
    drawn = models.weights_sha256(one) != models.weights_sha256(other)
    assert drawn == (kind not in ("from", "cut"))  # nothing random in these
    assert "tokenizer.json" in files  # its own, or for random weights the corpus's
    assert models.load(one, head).config.model_type in ("bert", "llama")


def test_a_cut_student_has_the_layers_asked_for_and_keeps_the_head(saved, tmp_path):
    wanted = student(cut={"from": "t", "layers": (0, 3)})
    start = models.load(models.seed_checkpoint(wanted, {"t": saved}.get, tmp_path / "start", None, 0), "mlm")
    whole = models.load(saved, "mlm")
    for new, old in ((0, 0), (1, 3)):
        ours, theirs = (m.bert.encoder.layer[i].state_dict() for m, i in ((start, new), (whole, old)))
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("start")] == ["start"]
    assert torch.equal(start.cls.predictions.transform.dense.weight, whole.cls.predictions.transform.dense.weight)


@pytest.mark.parametrize("head", [None, "mlm"])
def test_an_export_is_the_start_with_what_was_trained(head, saved, tmp_path):
    model = models.load(saved, head)
    trained = {n: p.detach() + 1 for n, p in model.named_parameters() if ".layer.1." in n}
    made = {name: lambda tensor=tensor: tensor for name, tensor in trained.items()}
    models.export(saved, made, tmp_path / "out")
    for name, tensor in models.load(models.export(saved, made, tmp_path / "out"), head).named_parameters():
        assert torch.equal(tensor, trained.get(name, model.get_parameter(name)))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")


# A teacher


def test_a_frozen_teacher_never_drifts():
    teacher, pupil = models.freeze(tiny.model("bert", seed=1).train()), tiny.model("bert", seed=2).train()
    before, batch = digest(teacher), tiny.batch([[9], [12]], 12)
    optimizer = torch.optim.AdamW([*pupil.parameters(), *teacher.parameters()], lr=0.01, weight_decay=0.1)
    for _ in range(20):
        target = trace(teacher, batch, [("value", -1)]).taps["value", -1]
        (trace(pupil, batch, [("value", -1)]).taps["value", -1] - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert digest(teacher) == before and not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_full_disk_is_one_line_before_and_during_the_writing_of_a_model(saved, tmp_path, monkeypatch):
    def write(name):
        with pytest.raises(UserError) as caught:
            models.seed_checkpoint(student(**{"from": "t"}), {"t": saved}.get, tmp_path / name, None, 0)
        assert not list(tmp_path.glob(f"{name}*")) and "\n" not in str(caught.value)
        return str(caught.value)

    def fail(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
        assert "No space left" in write("during")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "a model needs" in write("before")
