"""Low rank plus sparse: the same mathematics as a dense layer, the same model when it is merged."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import lowrank_cases
import pytest
import tiny
import torch
import yaml
from engine_cases import BATCH, LR, OPTIM, Rows
from launch import launch
from safetensors.torch import load_file, save_file
from torch import nn

from distill import models, preflight, recipe, taps
from distill.context import Context
from distill.lesson import Lesson
from distill.lowrank import counting, students
from distill.lowrank.module import SparseLowRank, deviations
from distill.lowrank.spec import LowRankSpec
from distill.taps import trace
from growth import factored, families, scope
from growth.errors import UsageError, UserError
from growth.files import sha256

SPARSE = LowRankSpec(rank=7, alpha=3.0, density=0.1)
LOW = LowRankSpec(compress=2.5)
SPECS = pytest.mark.parametrize("spec", [SPARSE, LOW], ids=["sparse", "low"])
EVERY = pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family in families.FAMILIES])


def factors(out=13, into=9, rank=4, n=17, scale=0.7):
    """With a B that is not zero, as after training."""
    made = factored.drawn(out, into, rank, n, scale, torch.Generator().manual_seed(1))
    made.B.normal_(generator=torch.Generator().manual_seed(2))
    return made


def started(tmp_path, family="bert", spec=SPARSE, random=True, head=None, **changes):
    """The checkpoint of a student before its first step."""
    model = tiny.model(family, head=head or tiny.head(family), seed=3, **changes)
    return students.begin(lambda dst: tiny.save(model, dst), tmp_path / "start", spec, 5, random)


def outputs(model, head):
    with torch.no_grad():
        seen = trace(model, tiny.batch([[9], [7]], 9), [("hidden", -1)], torch.arange(16) if head else None)
    return (seen.logits if head else seen.taps["hidden", -1]).detach()


# One layer


@pytest.mark.parametrize("n", [17, 0])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_the_dense_matrix(n, biased):
    """Against autograd through W, which knows neither B nor A nor places; float64."""
    f, g = factors(n=n), torch.Generator().manual_seed(4)
    bias = nn.Parameter(torch.randn(13, generator=g)) if biased else None
    layer = SparseLowRank(f, bias).double()
    x = torch.randn(3, 5, 9, generator=g, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 13, generator=g, dtype=torch.float64)
    y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.parameters()], upstream)

    W = f.scale * f.B.double() @ f.A.double()
    for place, value in zip(f.indices.tolist(), f.values.tolist(), strict=True):
        W[place // 9, place % 9] += value
    W.requires_grad_()
    z = x @ W.T + (bias.double() if biased else 0)
    dx, G = torch.autograd.grad(z, [x, W], upstream)
    wanted = {"B": f.scale * G @ f.A.double().T, "A": f.scale * f.B.double().T @ G,
              "values": G.flatten()[f.indices.long()][None], "bias": upstream.sum((0, 1))}  # fmt: skip
    assert torch.allclose(y, z, atol=1e-12, rtol=0) and torch.allclose(found[0], dx, atol=1e-12, rtol=0)
    names = [name for name, _ in layer.named_parameters()]
    assert set(names) == {"B", "A"} | ({"values"} if n else set()) | ({"bias"} if biased else set())
    assert all(torch.allclose(d, wanted[k], atol=1e-12, rtol=0) for k, d in zip(names, found[1:], strict=True))


def test_between_forward_and_backward_no_dense_matrix_is_kept():
    layer, kept = SparseLowRank(factors(40, 50, 3, 30), None), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(2, 50, requires_grad=True)).sum().backward()
    assert sum(kept) == 2 * 50 + 3 * (40 + 50) + 30 + 30 < 40 * 50


def test_the_farthest_weight_and_its_gradient_are_those_that_autograd_finds():
    f, W = factors(n=0), torch.randn(13, 9, generator=torch.Generator().manual_seed(6))
    layer = SparseLowRank(f, None, W).double()
    layer(torch.randn(2, 9, dtype=torch.float64))
    (found,) = deviations(layer)
    wanted = (layer.scale * layer.B @ layer.A - W.double()).abs().max()
    assert torch.allclose(found, wanted, atol=1e-12) and layer.deviation is None
    pairs = zip(*(torch.autograd.grad(d, [layer.B, layer.A]) for d in (found, wanted)), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in pairs)


def test_places_are_as_many_as_said_ascending_and_in_32_bits_where_they_fit():
    made = factors(60, 50, 3, factored.places(60, 50, 0.03))
    assert made.indices.numel() == 90 and made.indices.dtype == torch.int32 and bool((made.indices.diff() > 0).all())
    assert factored.index_type(2**31) is torch.int32 and factored.index_type(2**31 + 1) is torch.int64


def test_an_svd_start_is_the_best_low_rank_and_the_largest_of_the_rest():
    W = torch.randn(14, 11, generator=torch.Generator().manual_seed(0))
    made = factored.split(W, 5, 10, scale=0.4)
    U, S, Vt = torch.linalg.svd(W.double())
    low = U[:, :5] @ S[:5].diag() @ Vt[:5]
    rest = (W - low).flatten()
    rest[rest.abs().argsort(descending=True)[:10]] = 0
    assert torch.allclose(W - made.merged(), rest.view(14, 11).float(), atol=1e-5)
    assert torch.allclose(made.B.norm(dim=0), made.A.norm(dim=1), rtol=1e-4)  # the root of S on both sides
    assert torch.allclose(factored.split(W, 11, 0, 1.0).merged(), W, atol=1e-5)  # of full rank: W itself


def test_a_rank_that_compresses_leaves_that_part_of_the_numbers():
    rank = factored.rank_of(768, 3072, 3.0)
    assert rank == 768 * 3072 // (3 * (768 + 3072)) and rank * (768 + 3072) <= 768 * 3072 / 3
    assert factored.rank_of(2, 2, 9.0) == 1


def test_refactoring_keeps_the_product_and_balances_the_factors():
    f = factors(rank=6)
    B, A = factored.balanced(f.B, f.A * 50)
    assert torch.allclose(B @ A, f.B @ f.A * 50, atol=1e-4)
    gram = B.T @ B
    assert torch.allclose(gram, A @ A.T, atol=1e-4) and torch.allclose(gram, gram.diag().diag(), atol=1e-4)
    assert torch.equal(factored.balanced(torch.zeros(5, 2), f.A[:2])[0], torch.zeros(5, 2))


# A whole student


@EVERY
@SPECS
def test_a_student_of_factors_computes_what_its_merged_checkpoint_does(family, spec, tmp_path):
    head = tiny.head(family)
    start = started(tmp_path, family, spec, random=False)
    held, dense = students.load(start, head), models.load(start, head)
    layers = [m for m in held.modules() if isinstance(m, SparseLowRank)]
    config = dense.config.to_dict()
    wanted = scope.matrices(families.of(config), config, ("attention", "ffn"))
    assert len(layers) == len([name for name in wanted if not name.startswith("decoder.")])
    found, wanted = outputs(held, head), outputs(dense, head)
    assert (found - wanted).abs().max() <= 1e-5 * max(float(wanted.abs().max()), 1.0)
    assert (wanted - outputs(tiny.model(family, head=head, seed=3), head)).abs().max() > 0.01  # it is a compression


@EVERY
def test_what_was_trained_is_exported_as_an_ordinary_model_and_its_factors(family, tmp_path):
    head = tiny.head(family)
    start = started(tmp_path, family, random=False)
    held = students.load(start, head)
    with torch.no_grad():
        for p in held.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    trained = {name: p.detach() for name, p in held.named_parameters() if ".0." not in name}  # block 0: unreached
    untouched = students.load(start, head).state_dict()
    held.load_state_dict({name: p for name, p in untouched.items() if name not in trained}, strict=False)
    made = {name: lambda p=p: p for name, p in trained.items()}
    model = students.export(start, made, tmp_path / "model")
    again = students.load(model, head)
    assert all(torch.equal(p, q) for p, q in zip(held.parameters(), again.parameters(), strict=True))
    found, wanted = outputs(models.load(model, head), head), outputs(held, head)
    assert (found - wanted).abs().max() <= 1e-5 * max(float(wanted.abs().max()), 1.0)


@SPECS
def test_what_is_counted_from_a_config_is_what_is_trained(spec, tmp_path):
    for family in ("bert", "gpt2", "llama"):
        held = students.load(started(tmp_path / family, family, spec, random=False), tiny.head(family))
        facts = models.facts(held.config)
        after = counting.facts(held.config, spec)
        assert after.parameters == sum(p.numel() for p in held.parameters())
        if spec is LOW:
            assert after.body == facts.body - (facts.parameters - after.parameters)
            block = taps.blocks(held.base_model)[0].parameters()
            assert after.blocks[0] == sum(p.numel() for p in block if p.dim() > 1)
            assert after.rebuilt == 0
        else:
            assert (after.body, after.blocks) == (facts.body, facts.blocks)
            ranks = [m for m in held.modules() if isinstance(m, SparseLowRank)]
            assert after.rebuilt == sum(8 * 7 * m.B.shape[0] * m.A.shape[1] for m in ranks)


@pytest.mark.parametrize(
    ("sizes", "rank", "density", "full", "held"),
    [
        ((512, 1376, 8, 8), 128, 0.03, 58.1, 43.5),
        ((768, 2048, 12, 12), 256, 0.03, 134.1, 96.5),
        ((1024, 2736, 24, 16), 256, 0.03, 368.0, 194.3),
        ((2048, 5461, 24, 32), 512, 0.03, 1339.1, 645.5),
        ((4096, 11008, 32, 32), 1024, 0.05, 6738, 3145),
    ],
)
def test_the_paper_s_models_have_its_numbers(sizes, rank, density, full, held):
    """Millions, of SLTrain's Table 2 as its configs give them."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {"model_type": "llama", "vocab_size": 32000, "architectures": ["LlamaForCausalLM"]}
    config |= dict(zip(keys, sizes, strict=True))
    facts = counting.facts(config, LowRankSpec(rank=rank, alpha=8.0, density=density))
    assert facts.parameters == pytest.approx(held * 1e6, rel=1e-3)
    assert models.facts(config).parameters == pytest.approx(full * 1e6, rel=1e-3)


def test_a_start_is_a_function_of_seed_and_name_alone(tmp_path):
    starts = [
        factored.read(started(tmp_path / str(i), layers, head=head))
        for i, (layers, head) in enumerate([("bert", "mlm"), ("bert", None)])
    ]
    assert list(starts[0]) == list(starts[1]) and all(
        torch.equal(a.A, b.A) and torch.equal(a.indices, b.indices)
        for a, b in zip(starts[0].values(), starts[1].values(), strict=True)
    )
    drawn = list(starts[0].values())
    assert not torch.equal(drawn[0].A, drawn[1].A) and all(not f.B.any() and f.values.any() for f in drawn)
    assert all(float(f.A.abs().max()) <= f.A.shape[1] ** -0.5 for f in drawn)


# Under the engine (tests/lowrank_cases.py)


@functools.cache
def engines(ranks: int) -> dict:
    return launch("lowrank_cases.py", ranks=ranks, timeout=600)[0]


@functools.cache
def plain() -> torch.Tensor:
    """Two steps of plain torch in float64, with every W written out and its gradient found by autograd."""
    model = lowrank_cases.student().double()
    named = dict(model.named_parameters())
    for layer in model.modules():
        if isinstance(layer, SparseLowRank):
            layer.forward = functools.partial(written_out, layer)
    groups = [{"params": p, "weight_decay": OPTIM["weight_decay"] if p.dim() > 1 else 0.0} for p in named.values()]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=OPTIM["betas"], eps=OPTIM["eps"])
    lesson = Lesson(model, {"ce": lowrank_cases.LOSSES["ce"]})
    for step in range(2):
        batch = Rows().at(range(step * BATCH, (step + 1) * BATCH))
        count = float(lesson.objectives["ce"].count(batch)["mlm"])
        optimizer.zero_grad()
        (lesson(batch, {}, lesson.objectives)["ce.mlm"] / count + perturbation(model)).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), OPTIM["clip"])
        optimizer.step()
    return lowrank_cases.flat((name, p.detach()) for name, p in named.items() if p.grad is not None)


def written_out(layer, x):
    W = (layer.scale * layer.B @ layer.A).flatten().scatter_add(0, layer.indices.long(), layer.values[0])
    return x @ W.view(layer.B.shape[0], -1).T + layer.bias


def perturbation(model):
    """PELA's, with epsilon 0.001."""
    layers = [m for m in model.modules() if isinstance(m, SparseLowRank)]
    return sum(((m.scale * m.B @ m.A - m.origin).abs().max() - 0.001) ** 2 for m in layers) / len(layers)


EVERYWHERE = pytest.mark.parametrize("ranks", [1, 2])


@EVERYWHERE
def test_every_stage_trains_factors_as_plain_torch_does(ranks):
    for cell, found in engines(ranks).items():
        ours = torch.tensor(found["weights"]).double()
        apart = (ours - plain()).norm() / plain().norm()
        assert apart <= (1e-5 if "fp32" in cell else 0.03), (cell, apart)


@EVERYWHERE
def test_refactoring_moves_no_weight_and_forgets_the_moments_on_every_stage(ranks):
    for cell, found in engines(ranks).items():
        assert found["moved"] <= 2e-6 and found["forgot"] and found["balanced"] <= 2e-5, (cell, found["moved"])


@EVERYWHERE
def test_a_stopped_run_goes_on_bit_for_bit_behind_a_refactoring(ranks):
    assert all(found["resumes"] for found in engines(ranks).values())


# What cannot be


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"rank": 8, "density": 1.0}, "less than 1"),
        ({"rank": 8, "density": -0.1}, "greater than or equal to 0"),
        ({"rank": 0}, "greater than 0"),
        ({"density": 0.1}, "exactly one of rank, compress"),
        ({"rank": 8, "compress": 2.0}, "exactly one of rank, compress"),
        ({"compress": 3.0, "alpha": 2.0}, "a rank of its own"),
        ({"compress": 1.0}, "greater than 1"),
        ({"rank": 8, "scope": ["head"]}, "'attention' or 'ffn'"),
        ({"rank": 8, "scope": []}, "at least 1 item"),
    ],
)
def test_keys_that_mean_nothing_are_refused(keys, why):
    with pytest.raises(ValueError, match=why):
        LowRankSpec(**keys)


def test_a_rank_that_no_matrix_has_is_refused_by_name():
    model = tiny.model("bert")
    with pytest.raises(UserError, match=r"rank 41: encoder.layer.0.intermediate.dense is 40 x 48.*above 40"):
        counting.facts(model.config, LowRankSpec(rank=41, scope=["ffn"]))


def test_tied_matrices_and_a_scope_that_hits_nothing_are_refused(tmp_path):
    model = tiny.model("bert")
    layers = model.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    with pytest.raises(UserError, match=r"layer.0.output.dense.weight and encoder.layer.1.*are one tensor"):
        students.layers(model, ["ffn"])
    assert len(students.layers(model, ["attention"])) == 16
    import tiny_families

    mixtral = tiny_families.transformers.MixtralModel(tiny_families.config_of("mixtral"))
    with pytest.raises(UserError, match="scope ffn: no matrix of this Mixtral is one alone"):
        students.layers(mixtral, ["ffn"])


def test_factors_that_are_not_of_the_weights_beside_them_are_refused(tmp_path):
    start = started(tmp_path)
    path, story = start / factored.WEIGHTS, json.loads((start / factored.STORY).read_text())
    held = load_file(path)
    first = next(iter(story["weights"]))

    def spoiled(key, change):
        save_file(held | {f"{first}.{key}": change(held[f"{first}.{key}"].clone())}, path)
        with pytest.raises(UserError) as caught:
            students.load(start, "mlm")
        return str(caught.value)

    assert f"{first} is not what" in spoiled("values", lambda t: t + 0.01)
    assert "ascending places" in spoiled("indices", lambda t: t.flip(0))
    assert "ascending places" in spoiled("indices", lambda t: t + 48 * 48)
    assert "not finite" in spoiled("A", lambda t: t * float("nan"))
    assert "says [7, 48]" in spoiled("A", lambda t: t[:6].contiguous())
    save_file({name: t for name, t in held.items() if name != f"{first}.B"}, path)
    with pytest.raises(UserError, match="are not of one model"):
        students.load(start, "mlm")


# A run


STEPS = 8
TRAIN = {"data": "text", "optim": {"batch": 4, "weight_decay": 0.1}, "lr": 0.01, "save_every": 2}
CE = [{"ce": {"objective": "mlm"}}]
STAGES = {
    "fresh": TRAIN
    | {
        "student": {"new": {"like": "teacher"}, "lowrank": {"rank": 7, "alpha": 3.0, "density": 0.1}},
        "loss": CE,
        "hooks": [{"refactor": {"every": 3, "recovery": 2}}],
        "stop": {"steps": STEPS},
    },
    "small": TRAIN
    | {
        "student": {"cut": {"from": "teacher", "layers": [0, 3]}, "lowrank": {"compress": 2.0}},
        "targets": {"t": {"from": "teacher"}},
        "loss": [{"relation_kl": {"target": "t", "heads": 6, "relations": ["qq", "kk", "vv"]}}],
        "stop": {"steps": 2},
    },
    "near": TRAIN
    | {
        "student": {"from": "teacher", "lowrank": {"compress": 2.0}},
        "loss": [*CE, {"perturbation": {"weight": 0.1}}],
        "stop": {"steps": 2},
    },
    "dense": TRAIN | {"student": {"from": "fresh"}, "loss": CE, "stop": {"steps": 2}},
}
ROWS = {"student": "fresh", "baseline": "fresh.start", "small": "small", "dense": "dense"}
RECIPE = {
    "recipe": "factors",
    "engine": {"zero": 1, "precision": "bf16", "micro_batch": 2},
    "models": {"teacher": {"from": "teacher"}},
    "corpora": {"text": {"source": "synthetic", "tokenizer": "teacher", "length": 64, "heldout": 0.1, "limit": 800}},
    "stages": [
        *({"id": name, "train": train} for name, train in STAGES.items()),
        {"id": "report", "evaluate": {"rows": ROWS, "on": ["heldout_loss"], "data": "text"}},
    ],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with a teacher and a recipe."""
    path = tmp_path_factory.mktemp("place")
    tiny.save(tiny.model("bert", head="mlm"), path / "teacher", tiny.tokenizer())
    first = RECIPE | {"stages": RECIPE["stages"][:1]}
    for name, stages in {"factors": RECIPE, "first": first}.items():
        (path / f"{name}.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def place(written):
    """The same, run to its end."""
    ended = run(written, "whole")
    assert ended.returncode == 0, ended.stderr
    return written


def run(place, out, file="factors.yaml", fault=""):
    command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", file, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)


def test_a_run_leaves_an_ordinary_model_with_its_factors_beside_it(place, monkeypatch):
    import transformers

    for stage in ("fresh", "small"):
        model = place / "whole" / stage / "model"
        plain, info = transformers.AutoModelForMaskedLM.from_pretrained(model, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        held = students.load(model, "mlm")
        assert (outputs(held, "mlm") - outputs(plain.eval(), "mlm")).abs().max() < 1e-5
    metrics = json.loads((place / "whole/fresh/stage.json").read_text())["metrics"]
    monkeypatch.chdir(place)
    cost = _cost(place)
    assert metrics["flops"] == STEPS * cost.step()
    lowrank, plain = metrics["lowrank"], models.facts(place / "whole/fresh/model").parameters
    assert lowrank["matrices"] == 24 and lowrank["whole"] - lowrank["held"] == plain - cost.student.parameters
    frozen = json.loads((place / "whole/small/stage.json").read_text())["metrics"]["frozen"]
    assert {n for n in frozen if "layer.1" in n and n.endswith(("B", "A"))} == {
        f"encoder.layer.1.{name}.{key}" for key in "BA"
        for name in ("attention.output.dense", "intermediate.dense", "output.dense")
    }  # fmt: skip
    assert "factors.json" not in [path.name for path in (place / "whole/dense/model").iterdir()]
    rows = json.loads((place / "whole/report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(ROWS) and len({row["params"] for row in rows}) == 2


def test_factors_of_a_model_are_told_how_far_they_are_from_it(place):
    start, model = (place / "whole/near" / name for name in ("start", "model"))
    origin, before = load_file(start / students.ORIGIN), load_file(place / "teacher/model.safetensors")
    assert all(torch.equal(W, before[name]) for name, W in origin.items()) and len(origin) == 24
    apart = [((f.merged() - origin[name]).abs().max() - 0.001) ** 2 for name, f in factored.read(start).items()]
    told = json.loads((place / "whole/near/log.jsonl").read_text().splitlines()[0])["terms"]
    assert told["perturbation.max"] == pytest.approx(float(sum(apart)) / 24, rel=0.05)  # bf16
    assert not (model / students.ORIGIN).exists()


def _cost(place):
    read = recipe.load(place / "factors.yaml")
    planned = preflight.Planned(read, Context(read, place / "whole", 0))
    cost = planned.cost(read.stage("fresh"))
    assert cost.runs == 2 and cost.student.rebuilt > 0
    return cost


def test_the_rate_comes_back_after_every_refactoring(place):
    log = (place / "whole/fresh/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in log] == pytest.approx([0.01] * 3 + [0.005, 0.01, 0.01, 0.005, 0.01])


def test_a_killed_run_of_factors_ends_as_the_one_left_in_peace(place):
    """Killed after a refactoring, with moments and a count of steps that are younger than the run."""
    assert run(place, "hard", "first.yaml", fault="train.step:kill:6").returncode == -9
    ended = run(place, "hard", "first.yaml")
    assert ended.returncode == 0 and "resumed from" in ended.stderr, ended.stderr
    for file in ("model.safetensors", factored.WEIGHTS):
        found, wanted = (place / out / "fresh/model" / file for out in ("hard", "whole"))
        assert sha256(found) == sha256(wanted)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("fresh.train.student.lowrank.alpha=null", "'alpha' is needed"),
        ("fresh.train.student.lowrank.rank=41", "rank 41: encoder.layer.0.intermediate.dense is 40 x 48"),
        ("fresh.train.student.lowrank=null", "refactor needs a student with lowrank"),
        ("near.train.student.lowrank.density=0.1", "perturbation needs a student made from a model, with lowrank of d"),
    ],
)
def test_a_recipe_of_factors_that_cannot_be_is_refused_before_anything_runs(written, monkeypatch, change, why):
    monkeypatch.chdir(written)
    with pytest.raises(UsageError, match=why):
        read = recipe.load("factors.yaml", [f"stages.{change}"])
        preflight.check(read, Context(read, written / "never", 0), 1)
