"""Where teacher values come from: ensembles as one distribution, teachers of other ids, what runs and when."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from launch import launch
from test_divergence import (
    ROWS,
    VOCABULARY,
    assert_same,
    draw,
    every_kind,
    formula,
    gradient,
    heads,
    learned,
    learning,
    made,
)

import growth
from distill import forecast, loading, preflight, recipe
from distill.context import Context
from distill.corpus import tokens, vocabulary
from distill.heads import Logits, Mixture
from distill.lesson import Data, Lesson
from distill.models import facts, freeze
from distill.objectives import Aligned, CrossEntropy, Divergence, divergence, token_sum
from distill.objectives.protocol import Needs
from distill.schedules import Progress, fixed
from distill.taps import OUTPUT, Tap, trace
from distill.teachers.alignment import Alignment
from distill.teachers.depth import shortened
from distill.teachers.frozen import alignment, insist_on_pieces
from distill.teachers.targets import Ensemble, Online, Targets
from growth import files
from growth.errors import UserError

# An ensemble as one distribution

COMBINE = ("mean_prob", "mean_logprob")
every_mean = pytest.mark.parametrize("combine", COMBINE)


def teachers(dtype=torch.float64, finish=(1.0, None)):
    """Three heads of other widths, scales and caps."""
    sides = [(4, (1.0, None)), (7, (0.7, None)), (9, (1.0, 2.0))]
    return [
        Logits(
            draw(ROWS, width, seed=10 + i, dtype=dtype),
            draw(VOCABULARY, width, seed=20 + i, dtype=dtype),
            draw(VOCABULARY, seed=30 + i, dtype=dtype),
            *finish,
        )
        for i, (width, finish) in enumerate(sides)
    ]


def together(members, combine):
    """Probabilities [N, V] of what the members say together, by the book."""
    p = torch.stack([made(member).softmax(-1) for member in members])
    p = p.mean(0) if combine == "mean_prob" else p.log().mean(0).exp()
    return p / p.sum(-1, keepdim=True)


@every_mean
@every_kind
def test_an_ensemble_is_compared_as_the_one_distribution_that_it_has(kind, share, combine, monkeypatch):
    student, members = heads(student=(0.8, 3.0))[0], teachers()
    p = (together(members, combine).log() / 1.5).softmax(-1)  # the temperature is that of the combined distribution
    theirs = formula(p, (made(student) / 1.5).softmax(-1), kind, **share).mean()
    for chunk, strip in ((192, 2**18), (4, 2 * VOCABULARY)):
        monkeypatch.setattr(token_sum, "CHUNK", chunk)
        monkeypatch.setattr(token_sum, "STRIP", strip)
        ours = divergence(student, Mixture(tuple(members), combine), kind, temperature=1.5, **share)
        assert_same(ours, theirs)
        assert_same(gradient(ours, *learned(student)), gradient(theirs, *learned(student)))


@every_mean
def test_padding_of_any_member_has_no_probability(combine):
    members = teachers()
    wide = [
        Logits(
            m.hidden,
            torch.cat([m.weight, draw(more, m.hidden.shape[1], seed=9)]),
            torch.cat([m.bias, 9 + draw(more, seed=8)]),
            m.scale,
            m.softcap,
        )
        for m, more in zip(members, (2, 0, 5), strict=True)
    ]
    found = Mixture(tuple(wide), combine)
    assert found.vocabulary == VOCABULARY
    assert_same(found.whole().exp(), together(members, combine))
    fewer = [Logits(m.hidden, m.weight[:20], m.bias[:20], m.scale, m.softcap) for m in members]
    assert_same(found.trimmed(20).whole().exp(), together(fewer, combine))


def test_equal_members_are_one_teacher_and_means_differ():
    one, *others = teachers()
    student = learning(ROWS, VOCABULARY)
    for combine in COMBINE:
        assert_same(divergence(student, Mixture((one, one), combine)), divergence(student, one))
    means = [Mixture((one, *others), combine).whole() for combine in COMBINE]
    assert_same(means[0].logsumexp(-1), torch.zeros(ROWS, dtype=torch.float64))
    assert_same(means[1].logsumexp(-1), torch.zeros(ROWS, dtype=torch.float64))
    assert not torch.allclose(*means)


def test_what_one_member_rules_out_is_possible_to_the_mean_of_probabilities_alone():
    logits = [draw(2, 5), draw(2, 5, seed=1)]
    logits[0][:, 3] = -torch.inf
    found = {combine: Mixture(tuple(map(Logits, logits)), combine).whole() for combine in COMBINE}
    assert_same(found["mean_prob"][:, 3], logits[1].log_softmax(-1)[:, 3] - torch.tensor(2.0).double().log())
    assert (found["mean_logprob"][:, 3] == -torch.inf).all() and not found["mean_logprob"].isnan().any()


def test_members_of_half_precision_are_combined_in_float32():
    members = teachers(torch.bfloat16)
    found = Mixture(tuple(members)).whole()
    wide = [Logits(*(x.double() for x in (m.hidden, m.weight, m.bias)), m.scale, m.softcap) for m in members]
    assert found.dtype == torch.float32
    assert_same(found.double(), Mixture(tuple(wide)).whole(), atol=1e-5)


@every_mean
def test_no_more_rows_than_a_chunk_are_made_at_once(combine, monkeypatch):
    """Not even where logits are there on both sides."""
    made_at_once, product = [], Mixture.product
    monkeypatch.setattr(token_sum, "CHUNK", 4)
    monkeypatch.setattr(Mixture, "product", lambda self, rows: made_at_once.append(rows) or product(self, rows))
    divergence(learning(ROWS, VOCABULARY), Mixture((Logits(draw(ROWS, VOCABULARY)), *teachers()), combine))
    assert [rows.stop - rows.start for rows in made_at_once] == [4, 4, 3]


# Sources


def model(seed, family="llama", **changes):
    return freeze(tiny.model(family, "causal", seed=seed, **changes))


def test_a_target_that_no_active_loss_asks_for_is_not_run():
    objectives = {
        "divergence": Divergence(target="t"),
        "divergence_2": Divergence(target="e", kind="jsd"),
        "ce": CrossEntropy(objective="causal"),
    }
    targets = Targets({"t": Online(model(1)), "e": Ensemble([model(2), model(3)], "mean_prob")}, objectives)
    batch = tiny.batch([[9], [4, 3]], 9)
    assert not targets(batch, ["ce"]) and targets.calls == {"t": 0, "e": 0}
    assert list(targets(batch, ["divergence_2", "ce"])) == [("e", "masked")] and targets.calls == {"t": 0, "e": 2}
    targets(batch, objectives)
    assert targets.calls == {"t": 1, "e": 4} and len(targets.models) == 3


def test_only_the_rows_of_pieces_are_compared_on_both_sides():
    """Student and teacher have padded heads of other sizes: neither's padding takes probability in any form."""
    batch, objectives = tiny.batch([[9], [7]], 9), {"divergence": Divergence(target="t", ce=0.5)}
    batch["labels"], mask = batch["labels"].clamp(max=54), (batch["segment_ids"] > 0).long()
    student, teacher = tiny.model("qwen2", "causal"), model(1, hidden_size=36, vocab_size=67)
    logits = [m(input_ids=batch["input_ids"], attention_mask=mask).logits for m in (student, teacher)]
    rows, labels = token_sum.scored(batch["labels"], batch["segment_ids"], causal=True)
    q, p = (x.double().flatten(0, 1)[rows][:, :55] for x in logits)
    expected = formula(p.softmax(-1), q.softmax(-1), "forward_kl").sum()
    expected += 0.5 * torch.nn.functional.cross_entropy(q, labels, reduction="sum")
    for source in (Online(teacher, 55), Ensemble([teacher, teacher], "mean_prob", 55)):
        targets = Targets({"t": source}, objectives)
        (term,) = Lesson(student, objectives)(batch, targets(batch, objectives), objectives).values()
        torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=0)


# Schedules of objectives


def test_a_temperature_may_change_during_a_run():
    cooling = {"unit": "steps", "points": [[0, 4.0], [10, 1.0]], "shape": "linear"}
    value = Divergence(target="t", temperature=cooling, weight={"points": [[0, 1.0], [10, 0.0]]})
    now = fixed(value, Progress(5, 10))
    assert (now.temperature.value, now.weight.value, now.mask.value) == (2.5, 0.5, 0.15)
    assert fixed(now, Progress(9, 10)) == now and fixed(value, Progress(10, 10)).temperature.value == 1.0
    with pytest.raises(ValueError, match="only at some progress"):
        _ = value.temperature.value
    for wrong in (0.0, {"points": [[0, 1.0], [5, 0.0]]}):
        with pytest.raises(ValueError, match="greater than 0"):
            Aligned(target="t", temperature=wrong)


# Teachers of other tokenisers

TEXTS = ["the quick brown fox, ", "naïve café straße, the lazy dog. ", "x = f(1, 23)\n"] * 30


class Texts:
    """Packed rows of two documents each."""

    def __init__(self, tokenizer, length):
        self.tokenizer, self.length = tokenizer, length

    def at(self, positions, mask=None):
        rows = [self._row(p) for p in positions]
        ids, segments = (torch.stack(column) for column in zip(*rows, strict=True))
        labels = ids.masked_fill(segments == 0, -100)
        return {
            "input_ids": ids,
            "segment_ids": segments,
            "labels": labels,
            "sample_ids": torch.tensor(list(positions)),
        }

    def _row(self, position):
        ids, segments = torch.zeros(self.length, dtype=torch.long), torch.zeros(self.length, dtype=torch.long)
        at = 0
        for number in (1, 2):
            text = "".join(TEXTS[(position + k) % 5] for k in range(number))
            piece = torch.tensor(self.tokenizer(text).input_ids)[: self.length - at]
            ids[at : at + len(piece)], segments[at : at + len(piece)] = piece, number
            at += len(piece)
        return ids, segments


@functools.cache
def pair():
    """A student, a teacher of another tokeniser, and how their texts are aligned."""
    ours, theirs = vocabulary.train("bpe", 300, TEXTS), vocabulary.train("unigram", 90, TEXTS)
    student = tiny.model("qwen2", "causal", vocab_size=len(ours), max_position_embeddings=256)
    teacher = model(1, hidden_size=36, vocab_size=len(theirs), max_position_embeddings=256)
    return student, teacher, ours, Alignment(ours, theirs, 256)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["likelihood", "shared", "sorted"])
def test_a_teacher_of_other_ids_reads_the_same_text_however_the_batch_is_cut(kind, packed):
    student, teacher, ours, alignment = pair()
    objectives = {"aligned": Aligned(target="t", kind=kind)}
    source = Online(teacher, alignment=alignment)
    lesson, targets = Lesson(student, objectives), Targets({"t": source}, objectives)
    found = []
    for micro_batch in (4, 2, 1):
        data = Data(Texts(ours, 60), 4, micro_batch, packed, torch.device("cpu"), 0, targets.alignments)
        total, count = torch.zeros(()), 0.0
        for batch in data(0):
            assert batch["t.ids"].max() < 90 and batch["t.ids"].shape != batch["input_ids"].shape
            (term,) = lesson(batch, targets(batch, objectives), objectives).values()
            total, count = total + term, count + float(objectives["aligned"].count(batch)[kind])
        found.append((total / count, count, gradient(total / count, *student.parameters())))
    (whole, n, slopes), *others = found
    assert n > 40 and whole > 0 and source.calls == 7
    for loss, m, parts in others:
        assert m == n
        assert_same(loss, whole, atol=1e-5)
        for one, other in zip(parts, slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# How deep a teacher is loaded


@pytest.mark.parametrize("family", tiny.EVERY)
def test_a_teacher_is_read_no_deeper_than_its_taps_and_says_the_same(family, tmp_path):
    """What lies behind is not even looked at. ALBERT's layers are one."""
    taps = [Tap("query", -3), Tap("value", 1), Tap("hidden", -4)]
    path, needs = tiny.save(tiny.model(family, tiny.head(family)), tmp_path / family), [Needs(target=frozenset(taps))]
    config, whole = files.read_json(path / "config.json"), loading.load(path)
    first = shortened(config, needs)
    assert (first is None) == (family == "albert")
    if first:
        stored = {name: growth.open(path).tensor(name) for name in growth.open(path)}
        for name in stored:
            if re.search(r"\.[23]\.", name) and not re.search("experts|sparse_moe", name):
                stored[name].fill_(torch.nan)
        growth.write(tmp_path / "spoilt", config, stored.items())
        short, batch = loading.load(tmp_path / "spoilt", first=first), tiny.batch([[9], [4]], 9)
        found, expected = (trace(model, batch, taps, layers=tiny.LAYERS).taps for model in (short, whole))
        assert all(torch.equal(found[t], expected[t]) for t in taps)
        sizes = [sum(p.numel() for p in model.parameters()) for model in (short, whole)]
        assert sizes[0] < 0.62 * sizes[1] and facts(first).blocks == facts(config).blocks[:2]
    deeper = [Needs(target=frozenset({tap})) for tap in (OUTPUT, Tap("key", -1))]
    assert not any(shortened(config, [*needs, one]) for one in (*deeper, Needs(head="causal", target_head=True)))


# What is refused before data is read

RECIPE = {
    "recipe": "small",
    "models": {"student": "student", "teacher": "teacher"},
    "corpora": {"text": {"source": "nowhere.txt", "tokenizer": "student", "length": 64}},
    "stages": [
        {
            "id": "s",
            "train": {
                "student": {"from": "student"},
                "data": "text",
                "targets": {"t": {"from": "teacher"}},
                "loss": [{"divergence": {"target": "t"}}],
                "optim": {"batch": 4},
                "lr": 0.01,
                "stop": {"steps": 2},
            },
        },
    ],
}


def permuted(tokenizer):
    """The same pieces; two of them have changed places."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    from test_vocabularies import rebuilt

    return rebuilt(tokenizer, lambda c: c.update(content))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Tokenisers and models, made once."""
    path = tmp_path_factory.mktemp("kept")
    bpe, unigram = vocabulary.train("bpe", 300, TEXTS), vocabulary.train("unigram", 90, TEXTS)
    for name, tokenizer, size, family in (
        ("student", bpe, len(bpe), "llama"),
        ("padded", bpe, len(bpe) + 11, "llama"),
        ("permuted", permuted(bpe), len(bpe), "llama"),
        ("other", unigram, len(unigram), "llama"),
        ("small", unigram, len(unigram) - 1, "llama"),
        ("short", unigram, len(unigram), "gpt2"),
        ("bare", None, len(bpe), "llama"),
    ):
        places = {"n_positions": 63} if family == "gpt2" else {}
        tiny.save(tiny.model(family, "causal", vocab_size=size, **places), path / name, tokenizer)
    return path


@pytest.fixture
def check(kept, tmp_path, monkeypatch):
    """Preflight of RECIPE with another teacher and other losses; returns what it says."""
    monkeypatch.chdir(tmp_path)

    def said(teacher: str, *overrides: str, loss: list | None = None, targets: dict | None = None) -> str:
        written = copy.deepcopy(RECIPE)
        written["models"] = {"student": str(kept / "student"), "teacher": str(kept / teacher)}
        train = written["stages"][0]["train"]
        train["loss"], train["targets"] = loss or train["loss"], targets or train["targets"]
        Path("small.yaml").write_text(yaml.safe_dump(written))
        read = recipe.load("small.yaml", overrides)
        try:
            preflight.check(read, Context(read, Path("out"), 0), 1)
        except UserError as error:
            return str(error)
        return ""

    return said


def test_logits_over_a_permuted_vocabulary_of_the_same_size_are_refused_with_the_first_pieces(check):
    said = check("permuted")
    assert "corpora.text.tokenizer: student's, but teacher has learned other ids: 2 of 300 ids are of other" in said
    assert "'e' and 't'" in said and "`aligned`" in said


def test_a_padded_head_is_no_other_vocabulary(check):
    assert check("padded") == check("student") == ""


def test_logits_of_a_model_without_a_tokeniser_are_refused(check):
    assert "teacher brings no tokeniser, so nobody can say what its logits are of" in check("bare")


def test_an_ensemble_is_checked_member_by_member_and_cannot_be_tapped(check):
    both = {"t": {"ensemble": ["student", "teacher"]}}
    assert check("padded", targets=both) == ""
    assert "teacher has learned other ids" in check("permuted", targets=both)
    for loss in ({"relation_kl": {"target": "t", "heads": 6}}, {"aligned": {"target": "t"}}):
        said = check("student", targets=both, loss=[loss])
        assert "targets.t.ensemble: several teachers have only a distribution" in said
        assert f"together, and {next(iter(loss))} needs more" in said


def test_of_a_teacher_in_shares_every_rank_holds_a_part_and_the_head_that_is_read(check):
    loss = [{"relation_kl": {"target": "t", "heads": 6}}]
    where = {place: {"t": {"from": "teacher", "placement": place}} for place in ("replicated", "zero3")}

    def held(place, losses):
        assert check("padded", targets=where[place], loss=losses) == ""
        read = recipe.load("small.yaml")
        planned = preflight.Planned(read, Context(read, Path("out"), 0))
        return forecast.forecast(read.stages[0], planned, 4).memory["teachers"], planned.facts("teacher").head * 4

    (whole, head), (shared, _) = held("replicated", loss), held("zero3", loss)
    assert shared == whole / 4 and held("zero3", [{"divergence": {"target": "t"}}])[0] == (whole - head) / 4 + head
    with pytest.raises(UserError, match="placement: of from and ensemble; other values have no weights of their own"):
        check("padded", targets={"t": {"ema": 0.9, "placement": "zero3"}})


def test_tokenisers_that_were_learned_on_the_way_are_compared_when_a_stage_begins(kept):
    learned = vocabulary.train("bpe", 300, TEXTS[::-1][:2])
    text = SimpleNamespace(tokenizer=learned, facts=tokens.facts(learned))
    context = SimpleNamespace(model=lambda name: kept / name)
    teacher = SimpleNamespace(config=SimpleNamespace(vocab_size=300))
    with pytest.raises(UserError, match=r"student and the corpus have different vocabularies: .* `aligned` divergence"):
        insist_on_pieces(teacher, "student", context, text)
    own = tokens.load(kept / "student")
    insist_on_pieces(teacher, "student", context, SimpleNamespace(tokenizer=own, facts=tokens.facts(own)))
    teacher.config.vocab_size = 299
    with pytest.raises(UserError, match="the teacher's head has 299 rows, its tokeniser 300 ids"):
        insist_on_pieces(teacher, "student", context, SimpleNamespace(tokenizer=own, facts=tokens.facts(own)))


def test_a_teacher_that_has_learned_the_same_tokeniser_needs_no_spans(kept):
    text = SimpleNamespace(tokenizer=tokens.load(kept / "student"))
    context = SimpleNamespace(model=lambda name: kept / name)
    assert alignment("other", context, text).longest is None
    with pytest.raises(UserError, match="padded has the tokeniser of the corpus; `divergence`"):
        alignment("padded", context, text)


ALIGNED = [{"aligned": {"target": "t"}}]


def test_a_teacher_of_another_tokeniser_teaches_by_spans_alone(check):
    assert "ids are of other pieces" in check("other")
    assert check("other", loss=ALIGNED) == ""
    said = check("other", loss=[*ALIGNED, {"divergence": {"target": "t"}}])
    assert "`aligned` alone reads in the teacher's own ids; another loss needs a target of its own" in said


def test_spans_where_whole_distributions_can_be_compared_are_refused(check):
    for teacher in ("student", "padded"):
        said = check(teacher, loss=ALIGNED)
        assert "teacher has the tokeniser of the corpus; `divergence` compares whole distributions, exactly" in said


def test_a_teacher_that_cannot_read_the_text_in_its_own_ids_is_refused(check):
    said = check("short", loss=ALIGNED)
    assert "corpora.text.length: 64 tokens, but targets.t has positions for 63" in said
    assert "the tokeniser of teacher has 90 ids, the model knows 89" in check("small", loss=ALIGNED)
    assert "teacher brings no tokeniser to read with" in check("bare", loss=ALIGNED)


# Whole recipes (tests/target_cases.py)


@functools.cache
def results(zero: int) -> dict:
    more = ("phase", "aligned", "aligned_whole") if zero == 0 else ()
    cases = ("together", "apart", "placed", *more)
    return launch("target_cases.py", zero, *cases)[0]


def relative(one: list, other: list) -> float:
    a, b = torch.tensor(one).double(), torch.tensor(other).double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("zero", [0, 3])
def test_cross_entropy_in_the_pass_of_a_divergence_is_the_loss_beside_it(zero):
    """With a teacher of another width and a padded head."""
    one, two = (results(zero)[case]["s"] for case in ("together", "apart"))
    assert relative(one["gradient"], two["gradient"]) <= 1e-6
    assert relative(one["gradient"], results(0)["apart"]["s"]["gradient"]) <= 1e-6
    for joint, apart in zip(one["log"], two["log"], strict=True):
        total = sum(apart["weights"][key.split(".")[0]] * value for key, value in apart["terms"].items())
        assert joint["terms"]["divergence.jsd and ce"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("zero", [0, 3])
def test_where_the_weights_of_teachers_lie_changes_no_loss_of_a_recipe(zero):
    seen = results(zero)["placed"]
    for name in ("taps", "both", "several"):
        whole, shared = (seen[f"{name}_{place}"] for place in ("replicated", "zero3"))
        assert relative(shared["gradient"], whole["gradient"]) <= 1e-6
        assert [entry["terms"] for entry in shared["log"]] == [entry["terms"] for entry in whole["log"]]
    taps, both = (seen[f"{name}_zero3"]["metrics"]["teacher_flops"] for name in ("taps", "both"))
    assert taps < 0.6 * both  # two layers of four, and no head


def test_teachers_of_a_phase_do_not_run_after_it():
    """SALT's figure, and that of an ensemble: two micro-batches of two models in each of two steps."""
    seen = results(0)["phase"]["s"]
    assert [entry["teacher_forwards"] for entry in seen["log"]] == [{"t": 4}, {"t": 4}, {"t": 0}, {"t": 0}]
    assert seen["metrics"]["teacher_forwards"] == {"t": 8}
    assert [set(entry["weights"]) for entry in seen["log"]] == [{"divergence", "ce"}] * 2 + [{"ce"}] * 2


def test_a_student_learns_from_a_stage_with_a_tokeniser_of_its_own():
    losses = [entry["terms"]["aligned.likelihood"] for entry in results(0)["aligned"]["s"]["log"]]
    assert sum(losses[-3:]) < 0.3 * sum(losses[:3])
    whole, cut = (results(0)[case]["s"] for case in ("aligned_whole", "aligned"))
    for key in ("grad_norm", "terms"):  # the teacher was trained in other micro-batches too
        assert cut["log"][0][key] == pytest.approx(whole["log"][0][key], rel=1e-4)
    assert cut["metrics"]["teacher_forwards"] == {"t": 24} and whole["metrics"]["teacher_forwards"] == {"t": 12}
