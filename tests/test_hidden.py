"""Distances of hidden states, and the views of a row that objectives read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.testing import assert_close

from distill import corpus, models, projections, taps, views
from distill.lesson import Lesson, named_losses
from distill.objectives import OBJECTIVES, Hidden, hidden
from distill.objectives.hidden_sum import hidden_count, hidden_sum
from distill.schedules import Progress, fixed
from distill.teachers.targets import Online, Targets

PACKED = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 0], [1] * 11, [2, 2, 1, 1, 3, 3, 0, 0, 4, 4, 5]])
KINDS = [("mse", "sum"), ("mse", "mean"), ("cosine", None)]
FORMS = [(kind, position, reduction) for kind, reduction in KINDS for position in ("first", "mean", "all")]
every_form = pytest.mark.parametrize("form", FORMS)
WIDTH = 7


def draw(seed, shape=PACKED.shape):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute(teacher, student, segments, kind, position, reduction):
    """One document at a time."""
    measure = {
        "sum": lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b, strict=True)),
        "mean": lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / WIDTH,
        None: lambda a, b: 1 - a @ b / (a @ a * (b @ b)) ** 0.5,
    }[reduction]
    distances = []
    for b, numbers in enumerate(segments.tolist()):
        for number in {n for n in numbers if n}:
            places = [t for t, n in enumerate(numbers) if n == number]
            sides = [[x[b, t] for t in places] for x in (student, teacher)]
            chosen = [{"first": x[:1], "mean": [sum(x) / len(x)], "all": x}[position] for x in sides]
            distances += [measure(*pair) for pair in zip(*chosen, strict=True)]
    return sum(distances) / len(distances)


@every_form
def test_loss_and_gradient_are_those_of_brute_force(form):
    teacher, student = draw(1), draw(2).requires_grad_()
    ours, theirs = (f(teacher, student, PACKED, *form) for f in (hidden, brute))
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert_close(*gradients, rtol=0, atol=1e-12)


@every_form
def test_how_a_batch_is_cut_into_parts_and_rows_changes_nothing(form):
    teacher, student = draw(1), draw(2)
    whole = hidden(teacher, student, PACKED, *form)
    parts = [slice(b, b + 1) for b in range(len(PACKED))]
    totals = [hidden_sum(teacher[b], student[b], PACKED[b], *form) for b in parts]
    count = sum(hidden_count(PACKED[b], form[1]) for b in parts)
    assert_close(sum(totals) / count, whole, rtol=0, atol=1e-12)
    apart = corpus.unpack({"input_ids": torch.arange(33).view(3, 11), "segment_ids": PACKED, "labels": PACKED,
                           "sample_ids": torch.arange(3)})  # fmt: skip
    sides = (x.flatten(0, 1)[apart["input_ids"]] for x in (teacher, student))
    assert_close(hidden(*sides, apart["segment_ids"], *form), whole, rtol=0, atol=1e-12)


@every_form
def test_it_is_zero_against_itself_and_where_nothing_is_real(form):
    assert_close(hidden(draw(1), draw(1), PACKED, *form).item(), 0.0, rtol=0, atol=1e-15)
    assert hidden(draw(1), draw(2), torch.zeros_like(PACKED), *form) == 0


def test_half_precision_is_compared_in_float32():
    teacher, student = (draw(seed).bfloat16() for seed in (1, 2))
    wide = hidden(teacher.double(), student.double(), PACKED)
    assert_close(hidden(teacher, student, PACKED).double(), wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_last_is_what_the_model_hands_on_a_number_a_blocks_output_embeddings_what_the_first_is_given(family):
    model, batch = tiny.model(family, tiny.head(family)), tiny.batch([[7], [4]], 7)
    wanted = [taps.OUTPUT, taps.Tap("hidden", 1), taps.EMBEDDINGS]
    rows = torch.tensor([0, 3]) if tiny.head(family) else None
    found = taps.trace(model, batch, wanted, rows).taps
    mask = (batch["segment_ids"] > 0).long()
    after = model.base_model(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
    real = batch["segment_ids"] > 0
    assert_close(found[taps.OUTPUT][real], after.last_hidden_state[real], rtol=0, atol=0)
    assert_close(found["hidden", 1][real], after.hidden_states[2][real], rtol=0, atol=0)
    assert_close(found[taps.EMBEDDINGS][real], after.hidden_states[0][real], rtol=0, atol=0)


# Views


def objectives(**more) -> dict:
    return {
        "ce": OBJECTIVES["ce"](objective="mlm"),
        "hidden": Hidden(target="t", position="first", view="plain", reduction="sum"),
        "hidden_2": Hidden(target="t", position="mean", view="plain", student_layer=1, teacher_layer=2),
        "hidden_3": Hidden(
            target="t", kind="cosine", student_layer=["embeddings", 0, 2], teacher_layer=["embeddings", 1, 3]
        ),
        **more,
    }


def masked() -> dict:
    """Rows of two documents and padding, some tokens hidden."""
    batch = tiny.batch([[5, 4], [8]], 11)
    hidden = torch.zeros_like(batch["labels"], dtype=torch.bool)
    hidden[0, [1, 6]] = hidden[1, [0, 3]] = True
    return {
        **batch,
        "input_ids": batch["input_ids"].masked_fill(hidden, tiny.MASK),
        "labels": batch["labels"].masked_fill(~hidden, -100),
    }


def runs(model) -> list:
    """The token ids of every forward pass from now on."""
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda table, inputs: seen.append(inputs[0]))
    return seen


def pair(named, student="bert", teacher="bert"):
    student = tiny.model(student, tiny.head(student), seed=1, num_hidden_layers=3)
    frozen = models.freeze(tiny.model(teacher, seed=2))
    return Lesson(student, named), Targets({"t": Online(frozen)}, named), runs(student), runs(frozen)


def test_plain_is_the_row_before_anything_was_hidden():
    batch = masked()
    assert torch.equal(views.of(batch, "plain")["input_ids"], tiny.batch([[5, 4], [8]], 11)["input_ids"])
    assert views.of(batch, "masked") is batch


def test_each_model_runs_once_on_each_view_whoever_reads_it():
    named, batch = objectives(), masked()
    lesson, targets, student, teacher = pair(named)
    lesson(batch, targets(batch, named), named)
    for seen in (student, teacher):
        assert [torch.equal(ids, batch["input_ids"]) for ids in seen] == [True, False]
    assert views.passes(named) == {None: 2, "t": 2} and views.passes({"ce": named["ce"]}) == {None: 1}


def test_a_view_that_no_active_objective_reads_is_not_run():
    named, batch = objectives(), masked()
    lesson, targets, student, teacher = pair(named)
    lesson(batch, targets(batch, {"ce": named["ce"]}), {"ce": named["ce"]})
    assert (len(student), len(teacher)) == (1, 0)
    lesson(batch, targets(batch, {"hidden": named["hidden"]}), {"hidden": named["hidden"]})
    assert torch.equal(student[1], teacher[0]) and not torch.equal(student[1], batch["input_ids"])


def test_where_nothing_is_hidden_there_is_one_view():
    named = {"ce": OBJECTIVES["ce"](objective="causal"), "hidden": Hidden(target="t")}
    lesson, targets, student, teacher = pair(named, "llama", "llama")
    batch = tiny.batch([[5, 4], [8]], 11)
    lesson(batch, targets(batch, named), named)
    assert (len(student), len(teacher)) == (1, 1) and views.passes(named) == {None: 1, "t": 1}


def test_one_step_is_that_of_the_paper_written_out():
    """Lee et al. 2023: masked language modelling of one view, the distance of [CLS] of the other."""
    named, batch = {name: objectives()[name] for name in ("ce", "hidden")}, masked()
    lesson, targets, *_ = pair(named)
    lesson.double(), targets.models[0].double()
    student, teacher, plain = lesson.student, targets.models[0], tiny.batch([[5, 4], [8]], 11)["input_ids"]
    terms = lesson(batch, targets(batch, named), named)
    counts = {f"{name}.{term}": n for name, o in named.items() for term, n in o.count(batch).items()}
    ours = sum(terms[key] / counts[key] for key in terms)
    predicted, distances = [], []
    for row, places in ((0, slice(0, 5)), (0, slice(5, 9)), (1, slice(0, 8))):
        logits, labels = student(batch["input_ids"][row : row + 1, places]).logits[0], batch["labels"][row, places]
        predicted += [torch.nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="none")]
        firsts = [m.base_model(plain[row : row + 1, places]).last_hidden_state[0, 0] for m in (student, teacher)]
        distances.append((firsts[0] - firsts[1].detach()).square().sum())
    theirs = torch.cat(predicted).mean() + sum(distances) / len(distances)
    trained = list(student.parameters())
    gradients = [torch.autograd.grad(x, trained, allow_unused=True, retain_graph=True) for x in (ours, theirs)]
    assert_close(ours, theirs, rtol=1e-12, atol=0)
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_losses_of_one_kind_have_names_weights_and_schedules_of_their_own():
    """Several relations, too: qq at its full weight, vv fading."""
    fading = {"unit": "fraction", "points": [[0, 1.0], [1, 0.0]]}
    given = [
        ("relation_kl", OBJECTIVES["relation_kl"](target="t", relations=["qq"], heads=6)),
        ("relation_kl", OBJECTIVES["relation_kl"](target="t", relations=["vv"], heads=6, weight=fading)),
        ("hidden", Hidden(target="t", weight=0.5)),
    ]
    named = named_losses(SimpleNamespace(objectives=lambda: given))
    weights = {name: fixed(loss, Progress(3, 4)).weight.value for name, loss in named.items()}
    assert weights == {"relation_kl": 1.0, "relation_kl_2": 0.25, "hidden": 0.5}
    lesson, targets, *_ = pair(named)
    terms = lesson(masked(), targets(masked(), named), named)
    assert set(terms) == {"relation_kl.qq", "relation_kl_2.vv", "hidden.last"}


# Projections


def projected(**keys):
    """A lesson of one loss on a teacher that is wider, and its projection."""
    named = {"hidden": Hidden(target="t", project=True, **keys)}
    drawn = projections.drawn({"hidden": (tiny.HIDDEN, 54)}, seed=0)
    wide = models.freeze(tiny.model("bert", seed=2, hidden_size=54))
    lesson = Lesson(tiny.model("bert", seed=1), named, projections=drawn)
    return lesson.double(), Targets({"t": Online(wide.double())}, named), lesson.projections["hidden"].weight


def test_one_projection_serves_all_layers_of_a_loss_and_learns():
    """Against the two models written out; a layer of the student is multiplied with W, then compared."""
    lesson, targets, weight = projected(student_layer=["embeddings", 0, 1], teacher_layer=["embeddings", 1, 3])
    batch = tiny.batch([[9]], 9)
    terms = lesson(batch, targets(batch, lesson.objectives), lesson.objectives)
    states = [m(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
              for m in (lesson.student, targets.models[0])]  # fmt: skip
    wanted = [((states[0][m] @ weight.T - states[1][n]) ** 2).mean() for m, n in ((0, 0), (1, 2), (2, 4))]
    assert [name.removeprefix("hidden.") for name in terms] == ["embeddings", "layer_0", "layer_1"]
    counts = lesson.objectives["hidden"].count(batch).values()
    for term, count, other in zip(terms.values(), counts, wanted, strict=True):
        assert_close(term / count, other, rtol=1e-9, atol=0)
    found, other = (torch.autograd.grad(sum(x), weight)[0] for x in (terms.values(), [w * 9 for w in wanted]))
    assert_close(found, other, rtol=1e-8, atol=1e-10)


def test_a_projection_is_drawn_from_the_seed_and_its_name():
    first, again = (projections.drawn({"hidden": (4, 5)}, seed=1) for _ in range(2))
    more = projections.drawn({"hidden_2": (4, 5), "hidden": (4, 5)}, seed=1)
    other = projections.drawn({"hidden": (4, 5)}, seed=2)
    assert first["hidden"].weight.equal(again["hidden"].weight) and first["hidden"].weight.equal(more["hidden"].weight)
    assert not any(first["hidden"].weight.equal(x.weight) for x in (more["hidden_2"], other["hidden"]))


def test_projections_lie_beside_the_model_by_the_name_of_their_loss(tmp_path):
    projections.write(tmp_path, {"student.a": lambda: torch.zeros(2)})
    assert not list(tmp_path.iterdir())
    made = {"student.a": lambda: torch.zeros(2), "projections.hidden.weight": lambda: torch.ones(3, 2)}
    projections.write(tmp_path, made)
    assert load_file(tmp_path / projections.FILE)["hidden.weight"].equal(torch.ones(3, 2))


# What cannot work


def wrong(student="bert", teacher="bert", changes=None, **keys) -> list[str]:
    sides = [models.facts(tiny.config(student)), models.facts(tiny.config(teacher, **(changes or {})))]
    return Hidden(target="t", **keys).check(*sides)


def test_what_cannot_work_is_said():
    assert wrong() == wrong("llama", "llama", position="mean") == []
    assert wrong(changes={"hidden_size": 36}) == [
        "the student is 48 wide, the teacher 36; `project: true` learns a map between them"
    ]
    assert wrong(changes={"hidden_size": 36}, project=True) == []
    assert wrong(student_layer=4, teacher_layer=-5) == [
        "student_layer=4: the bert has 4 layers, 0 to 3",
        "teacher_layer=-5: the bert has 4 layers, 0 to 3",
    ]
    assert wrong(student_layer=["embeddings", 0, 1], teacher_layer=["embeddings", 1, 9]) == [
        "teacher_layer=9: the bert has 4 layers, 0 to 3"
    ]
    assert wrong(student_layer=[3, -1], teacher_layer=[0, 1]) == [
        "student_layer: of 4 layers, layer 3 is listed twice under two numbers"
    ]
    (said,) = wrong("llama", "llama", position="first")
    assert said == "position first: of a causal model it sees nothing but itself; mean and all say more"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"position": "cls"}, "Input should be"),
        ({"view": "unmasked"}, "Input should be"),
        ({"student_layer": "first"}, "Input should be"),
        ({"student_layer": []}, "at least 1"),
        ({"student_layer": [0, 1]}, "lists 2, teacher_layer 1; each layer of one has one of the other"),
        ({"student_layer": [1, 1], "teacher_layer": [0, 1]}, "each layer at most once"),
        ({"kind": "cosine", "reduction": "sum"}, "a cosine is one number"),
    ],
)
def test_a_wrong_recipe_is_refused(keys, said):
    with pytest.raises(ValidationError, match=said):
        Hidden(target="t", **keys)
