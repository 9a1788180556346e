"""Laws of growth for every family and operator, over drawn sizes: identity, composition, the way back, the promise.

Each operator is run on each of the 18 families by every test run, once. `HYPOTHESIS_PROFILE=long` draws many more.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from test_width import EPSILON, RMS
from tiny_families import CONFIGS, load, save

import growth
from growth.anatomy import dissect
from growth.errors import UserError
from growth.families import FAMILIES

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
settings.register_profile("short", max_examples=1, derandomize=True, deadline=None, database=None,
                          phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
settings.register_profile("long", settings.get_profile("short"), max_examples=8, derandomize=False, print_blob=True)
VERIFY = importlib.import_module("growth.verify")  # the front door names the function so
PROFILE = settings.get_profile("long" if LONG else "short")
EXACT, APART = 1e-12, 1e-6  # of the largest output
TOKENS = torch.randint(2, 11, (2, 8), generator=torch.Generator().manual_seed(0))
GROUPED = [kind for kind in CONFIGS if "kv" in FAMILIES[kind].sizes]
POST = [kind for kind in CONFIGS if FAMILIES[kind].norms == "post"]
FIXED = [*POST, "modernbert"]  # what they write to the residual stream is normed: only whole multiples are exact


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A new path each time, for all the examples of all the laws."""
    place, number = tmp_path_factory.mktemp("laws"), itertools.count()
    globals()["fresh"] = lambda: place / str(next(number))
    yield
    source.cache_clear()
    before.cache_clear()


@cache
def source(kind, changes):
    epsilon = EPSILON.get(kind, "rms_norm_eps" if kind in RMS else "layer_norm_eps")
    felt = {epsilon: 1e-3} if epsilon else {}
    return save(fresh(), kind, dtype=torch.float64, **felt, **dict(changes))  # noqa: F821


def computed(path):
    """The logits in float64 throughout, of a model loaded without a missing, unexpected or misshapen tensor."""
    model, anatomy = load(path, dtype=torch.float64), dissect(growth.open(path))
    VERIFY._register_attention()
    model.set_attn_implementation(VERIFY.ATTENTION)
    VERIFY._plain_norms(model, anatomy)
    VERIFY._plain_routers(model, anatomy)
    more = {"decoder_input_ids": TOKENS.flip(0)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **more).logits


before = cache(computed)


def gap(one, other):
    """The largest difference of two models' logits, relative to the largest logit."""
    a, b = before(one), computed(other)
    n = min(a.shape[-1], b.shape[-1])
    assert a.abs().max() > 0.1
    return float((a[..., :n] - b[..., :n]).abs().max() / a.abs().max())


def values(path):
    checkpoint = growth.open(path)
    return {name: checkpoint.tensor(name) for name in checkpoint}


def same(one, other, tolerance=0.0):
    a, b = values(one), values(other)
    near = a.keys() == b.keys() and all(a[n].shape == b[n].shape and (a[n] - b[n]).abs().max() <= tolerance for n in a)
    return near and all(growth.open(one).config[k] == growth.open(other).config[k] for k in stated(one))


def stated(path):
    """The config keys that say how large a model is."""
    config = growth.open(path).config
    keys = [key for key in FAMILIES[config["model_type"]].sizes.values() if isinstance(key, str)]
    return [key for key in keys if key in config]


def made(operator, *sources, **asked):
    note(f"{operator.__name__} {[str(s) for s in sources]} {asked}")
    return operator(*sources, fresh(), **asked)  # noqa: F821


def promise(path):
    return json.loads((path / "growth.json").read_text())["preserves"]


# what a model may be: the first of each is what the short profile takes, so it is no trivial one


def of(draw, *choices):
    return draw(st.sampled_from(choices))


@st.composite
def sources(draw, kind):
    changes = SHAPES.get(kind, _encoder)(draw)
    return source(kind, tuple({**changes, "vocab_size": of(draw, 13, 17, 23)}.items()))


def _grouped(draw):
    kv, group = of(draw, 2, 3, 1), of(draw, 2, 1, 3)
    return dict(
        **dict(num_key_value_heads=kv, num_attention_heads=kv * group, hidden_size=kv * group * of(draw, 3, 2, 5)),
        **dict(
            head_dim=of(draw, 4, 6, 2), intermediate_size=of(draw, 7, 5, 11), num_hidden_layers=of(draw, 3, 2, 1, 4)
        ),
        tie_word_embeddings=of(draw, False, True),
    )


def _encoder(draw):
    """Four channels at least: a layer norm of two knows signs only, so that much is the same by chance."""
    heads = of(draw, 3, 2, 1)
    return dict(
        **dict(num_attention_heads=heads, hidden_size=heads * of(draw, 4, 6, 8)),
        **dict(intermediate_size=of(draw, 7, 5, 11), num_hidden_layers=of(draw, 3, 2, 1, 4)),
    )


def _neox(draw):
    heads = of(draw, 3, 2, 1)
    more = dict(hidden_size=heads * of(draw, 8, 4), rotary_pct=0.5, use_parallel_residual=of(draw, True, False))
    return {**_encoder(draw), "num_attention_heads": heads, **more}


def _renamed(draw, **names):
    return {names[key]: value for key, value in _encoder(draw).items()}


SHAPES = {
    **dict.fromkeys(GROUPED, _grouped),
    "mixtral": lambda draw: {
        **_grouped(draw),
        **dict(num_local_experts=of(draw, 3, 2), num_experts_per_tok=of(draw, 2, 1)),
    },
    "qwen2_moe": lambda draw: {
        **_grouped(draw),
        **dict(num_experts=of(draw, 3, 2), num_experts_per_tok=of(draw, 2, 1)),
        **dict(moe_intermediate_size=of(draw, 8, 9), shared_expert_intermediate_size=of(draw, 5, 4)),
    },
    "gpt_neox": _neox,
    "gpt2": lambda draw: _renamed(draw, num_attention_heads="n_head", hidden_size="n_embd", intermediate_size="n_inner",
                                  num_hidden_layers="n_layer"),
    "distilbert": lambda draw: _renamed(draw, num_attention_heads="n_heads", hidden_size="dim",
                                        intermediate_size="hidden_dim", num_hidden_layers="n_layers"),
    "t5": lambda draw: dict(
        **dict(num_heads=of(draw, 3, 2), d_kv=of(draw, 4, 5), d_model=of(draw, 7, 10), d_ff=of(draw, 9, 8)),
        **dict(num_layers=of(draw, 2, 1), num_decoder_layers=of(draw, 3, 1)),
        feed_forward_proj=of(draw, "relu", "gated-gelu"),
    ),
}  # fmt: skip


# every operator: what to ask of it, given the sizes of a source. What it promises is read from its lineage


def sizes_of(path):
    sizes = growth.inspect(path).sizes
    depth = FAMILIES[growth.open(path).config["model_type"]].depth
    return {**sizes, "depths": [sizes[axis] for axis in depth], "layers": min(sizes[axis] for axis in depth)}


def _order(draw, n):
    order = draw(st.lists(st.integers(0, n["layers"] - 1), min_size=2, max_size=5))
    return growth.stack, {"order": order}


def _random(draw, n):
    return growth.stack, {"factor": of(draw, 2, 3), "how": "random"}


def _insert(draw, n):
    return growth.insert, {"after": draw(st.lists(st.integers(0, n["layers"] - 1), min_size=1, max_size=3))}


def _doubled(draw, n):
    """All that follows the width where heads divide it, nothing else where they do not."""
    return growth.widen, {"hidden": n["embed"] * of(draw, 2, 3), "noise": of(draw, 0.3, 0.0)}


def _uneven(draw, n):
    heads = n["kv"] * n["group"] if "kv" in n else 1 if "buckets" in n else n["head"]
    up = n["embed"] + heads * of(draw, 1, 3)
    return growth.widen, {"hidden": up if up % n["embed"] else up + heads, "noise": of(draw, 0.3, 0.0)}


def _how(how):
    return lambda draw, n: (growth.widen, {**_uneven(draw, n)[1], "how": how})


def _ffn(draw, n):
    return growth.widen, {"ffn": n["ffn"] + of(draw, 3, 1, n["ffn"], 2 * n["ffn"] + 1), "noise": of(draw, 0.3, 0.0)}


def _heads(draw, n):
    if "kv" in n:
        kv = n["kv"] * of(draw, 2, 3)
        heads = kv * n["group"]
        hidden = -(-n["embed"] // heads) * heads  # which Llama's must divide
        return growth.widen, {"kv_heads": kv, "heads": heads, "hidden": hidden, "noise": 0.3}
    if "buckets" in n:
        return growth.widen, {"heads": n["heads"] + of(draw, 1, 2), "noise": 0.3}
    return growth.widen, {"hidden": 2 * n["embed"], "heads": 2 * n["heads"], "noise": 0.3}


def _head_size(draw, n):
    if "kv" in n:
        return growth.widen, {"head_size": n["head"] * of(draw, 2, 4), "noise": 0.3}
    if "buckets" in n:
        return growth.widen, {"head_size": n["head"] + of(draw, 3, 1), "noise": 0.3}
    m = of(draw, 2, 3) if "pos" in n else 16  # what turns in float32, by powers of two alone: the fourth root is used
    return growth.widen, {"hidden": m * n["embed"], "heads": n["heads"], "head_size": m * n["head"], "noise": 0.3}


def _all(draw, n):
    return growth.widen, {**_doubled(draw, n)[1], **_ffn(draw, n)[1], "vocab": n["vocab"] + of(draw, 6, 1)}


def _padded(draw, n):
    unit = of(draw, 8, 16)
    return growth.widen, {"vocab_multiple": unit if n["vocab"] % unit else n["vocab"] + 1}


def _upcycle(draw, n):
    return growth.upcycle, {"experts": of(draw, 4, 3), "top": of(draw, 2, 1, 3)}


OPERATORS = {
    "stack": (CONFIGS, lambda draw, n: (growth.stack, {"factor": of(draw, 2, 3)})),
    "interleave": (CONFIGS, lambda draw, n: (growth.stack, {"factor": of(draw, 2, 3), "order": "interleave"})),
    "order": (CONFIGS, _order),
    "random": (CONFIGS, _random),
    "silent": ([k for k in CONFIGS if k not in POST], lambda draw, n: (growth.stack, {"factor": 2, "how": "zero"})),
    "insert": ([k for k in CONFIGS if k not in POST], _insert),
    "doubled": (CONFIGS, _doubled),
    "uneven": ([k for k in CONFIGS if k not in FIXED], _uneven),
    "ffn": (CONFIGS, _ffn),
    "heads": (CONFIGS, _heads),
    "head_size": (CONFIGS, _head_size),
    "padded": (CONFIGS, _padded),
    "all": (CONFIGS, _all),
    "weighted": ([*RMS, "t5"], _how("weighted")),
    "zero": ([*RMS, "t5"], _how("zero")),
    "mean": ([k for k in CONFIGS if FAMILIES[k].norm == "layer"], _how("mean")),
    "fpi": (CONFIGS, _how("fpi")),
    "aki": (CONFIGS, _how("aki")),
    "cut layers": (CONFIGS, lambda draw, n: (growth.cut, {"layers": [n["layers"] - 1]})),
    "cut ffn": (CONFIGS, lambda draw, n: (growth.cut, {"ffn": n["ffn"] - of(draw, 2, 1)})),
    "upcycle": (["llama", "mistral", "qwen2"], _upcycle),
    "experts": (
        ["llama", "mistral", "qwen2"],
        lambda draw, n: (growth.upcycle, {**_upcycle(draw, n)[1], "noise": 0.1}),
    ),
    **{
        f"tokens by {how}": (
            CONFIGS,
            lambda draw, n, how=how: (growth.vocabulary, {"size": n["vocab"] + 3, "how": how}),
        )
        for how in ("mean", "normal", "multivariate")
    },
}
PAIRS = [pytest.param(kind, name, id=f"{kind}-{name}") for name, (kinds, _) in OPERATORS.items() for kind in kinds]
MUST = {"silent", "insert", "doubled", "uneven", "ffn", "heads", "head_size", "padded", "all", "weighted", "zero"} | {
    "upcycle", "tokens by mean", "tokens by normal", "tokens by multivariate"}  # fmt: skip
NEVER = {"random", "aki", "experts"}  # the rest may be the identity at some sizes


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@settings(PROFILE)
@given(data=st.data())
def test_a_result_loads_and_computes_the_same_exactly_where_it_says_so(kind, name, data):
    src = data.draw(sources(kind))
    assume(name != "aki" or sizes_of(src)["layers"] > 1)  # one layer has none above it
    operator, asked = OPERATORS[name][1](data.draw, sizes_of(src))
    path = made(operator, src, **asked)
    dissect(growth.open(path))  # every tensor is as large as the config says
    if name in MUST:
        assert promise(path) == "exact"
    if name in NEVER:
        assert promise(path) != "exact"
    apart = gap(src, path)
    assert apart <= EXACT if promise(path) == "exact" else apart > APART


@pytest.mark.parametrize("kind", CONFIGS)
@settings(PROFILE)
@given(data=st.data())
def test_operators_that_keep_the_function_keep_it_one_after_the_other(kind, data):
    src = path = data.draw(sources(kind))
    names = [name for name in sorted(MUST) if kind in OPERATORS[name][0] and name != "upcycle"]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=3, max_size=3, unique=True)):
        operator, asked = OPERATORS[name][1](data.draw, sizes_of(path))
        path = made(operator, path, **asked)
        assert promise(path) == "exact"
    assert gap(src, path) <= 30 * EXACT


@pytest.mark.parametrize("kind", CONFIGS)
@settings(PROFILE)
@given(data=st.data())
def test_what_changes_nothing_gives_the_same_bytes(kind, data):
    src = data.draw(sources(kind))
    n = sizes_of(src)
    for operator, asked in (
        (growth.stack, {"factor": 1}),
        (growth.stack, {"factor": 1, "order": "interleave"}),
        (growth.cut, {"ffn": list(range(n["ffn"])), "vocab": n["vocab"]}),
        (growth.vocabulary, {"size": n["vocab"]}),
        *([(growth.stack, {"order": list(range(n["layers"]))})] if len(set(n["depths"])) == 1 else []),
    ):
        path = made(operator, src, **asked)
        assert same(src, path) and growth.open(src).digest() == growth.open(path).digest()
    assert same(src, growth.merge([src, src], fresh()), 1e-15)  # noqa: F821


@pytest.mark.parametrize("kind", CONFIGS)
@settings(PROFILE)
@given(data=st.data())
def test_two_changes_of_depth_are_the_one_that_they_make_together(kind, data):
    src = data.draw(sources(kind))
    n = sizes_of(src)["layers"]
    for order in ("stack", "interleave"):
        twice = made(growth.stack, made(growth.stack, src, factor=2, order=order), factor=3, order=order)
        assert same(twice, made(growth.stack, src, factor=6, order=order))
    first = data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=4))
    then = data.draw(st.lists(st.integers(0, len(first) - 1), min_size=2, max_size=4))
    twice = made(growth.stack, made(growth.stack, src, order=first), order=then)
    assert same(twice, made(growth.stack, src, order=[first[i] for i in then]))
    if kind not in POST:
        twice = made(growth.insert, made(growth.insert, src, after=[0]), after=[0])
        assert same(twice, made(growth.insert, src, after=[0, 0]))


@pytest.mark.parametrize("kind", CONFIGS)
@settings(PROFILE)
@given(data=st.data())
def test_depth_and_width_do_not_know_of_each_other(kind, data):
    """Without noise, which is drawn for each layer."""
    src = data.draw(sources(kind))
    asked = {**_all(data.draw, sizes_of(src))[1], "noise": 0.0}
    one = made(growth.widen, made(growth.stack, src, factor=2), **asked)
    other = made(growth.stack, made(growth.widen, src, **asked), factor=2)
    assert same(one, other)


@pytest.mark.parametrize("kind", CONFIGS)
@settings(PROFILE)
@given(data=st.data())
def test_the_way_back_gives_the_source(kind, data):
    src = data.draw(sources(kind))
    n = sizes_of(src)
    grown = made(growth.stack, src, factor=of(data.draw, 2, 3))
    assert same(src, made(growth.undo, grown))
    if len(set(n["depths"])) == 1:
        assert same(src, made(growth.cut, grown, layers=list(range(n["layers"]))))
    assert same(src, made(growth.undo, made(growth.stack, src, factor=2, order="interleave")))
    if kind not in POST:
        assert same(src, made(growth.undo, made(growth.insert, src, **_insert(data.draw, n)[1])))
    assert same(src, made(growth.undo, made(growth.widen, src, **_all(data.draw, n)[1])), 1e-12)
    assert same(src, made(growth.cut, made(growth.vocabulary, src, size=n["vocab"] + 3), vocab=n["vocab"]))
    units = data.draw(st.permutations(range(n["ffn"])))
    back = sorted(range(n["ffn"]), key=units.__getitem__)
    assert same(src, made(growth.cut, made(growth.cut, src, ffn=units), ffn=back))


@pytest.mark.parametrize("kind", CONFIGS)
@settings(PROFILE)
@given(data=st.data())
def test_merging_is_fair(kind, data):
    """The order of sources does not matter, nor whether three are merged at once or by and by."""
    src = data.draw(sources(kind))
    other, third = made(growth.cut, src, ffn=data.draw(st.permutations(range(sizes_of(src)["ffn"])))), src
    assert same(made(growth.merge, [src, other], weights=[0.25, 0.75]),
                made(growth.merge, [other, src], weights=[0.75, 0.25]))  # fmt: skip
    half = made(growth.merge, [src, other])
    at_once = made(growth.merge, [src, other, third], weights=[0.25, 0.25, 0.5])
    assert same(made(growth.merge, [half, third]), at_once, 1e-12)
    ends = made(growth.merge, [other], how="task", base=src)
    assert same(ends, other, 1e-12)


def test_a_block_without_a_norm_of_its_own_gets_one_where_it_is_not_the_first():
    """ModernBERT's first block has none in front of its attention; a model of one block has no other to copy from."""
    src = source("modernbert", (("num_hidden_layers", 1),))
    path = growth.stack(src, fresh())  # noqa: F821
    assert torch.equal(values(path)["model.layers.1.attn_norm.weight"], torch.ones(30, dtype=torch.float64))
    assert gap(src, path) > APART


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_way_back_is_refused_where_there_is_none(kind):
    src = source(kind, ())
    for path in (src, growth.widen(src, fresh(), ffn=50, how="aki")):  # noqa: F821
        with pytest.raises(UserError):
            growth.undo(path, fresh())  # noqa: F821
