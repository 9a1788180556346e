"""Laws of a saving: against a power law whose crossings are known, over seeds, and said when there is none."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import random
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import scipy.stats
import yaml

from distill import recipe as recipes
from distill import report
from distill.evaluate import METRICS, RESULT
from distill.evaluate.saving import Curve, Outcome, beside, curve, interval, speed_up
from distill.report import savings
from distill.report.curves import average, race
from growth.errors import UserError
from growth.plan import SPEED_UP, saved

SEEDS = range(3)


def power_law(first, last, n, cheaper=1.0, spacing="even"):
    """Loss 9 - log10(FLOPs) as if each had cost `cheaper` times as much: a straight line in log FLOPs."""
    steps = [i / n for i in range(n + 1)]
    flops = [first + (last - first) * s if spacing == "even" else first * (last / first) ** s for s in steps]
    return Curve.of((x, 9 - math.log10(x / cheaper)) for x in flops)


# One seed


@pytest.mark.parametrize("n, spacing", [(2, "even"), (7, "even"), (7, "log"), (200, "even")])
@pytest.mark.parametrize("cheaper", [0.35, 0.65, 0.999, 1.4])
def test_a_saving_that_is_known_is_found_however_rarely_it_was_evaluated(n, spacing, cheaper):
    scratch, mine = power_law(1e3, 1e6, 5), power_law(2e3, 2e6, n, cheaper, spacing)
    assert mine.outcome(scratch) == (pytest.approx(1 - cheaper, abs=1e-9), 0)


def test_a_row_against_itself_saves_nothing_even_where_it_got_worse_again():
    scratch = Curve((0, 10, 20, 30), (5, 3, 2, 2.5))
    assert scratch.outcome(scratch) == (0, 0)


def test_what_scratch_lost_again_is_not_credited_to_others():
    scratch, mine = Curve((0, 10, 20, 30), (5, 2.5, 2, 2.5)), Curve((0, 20), (5, 2.5))
    assert mine.outcome(scratch).share == pytest.approx(-1)  # 20 against the 10 of its first visit, not 30


def test_the_first_segment_from_nothing_is_a_straight_line():
    assert Curve((0.0, 10.0), (4.0, 2.0)).reach(3.5) == pytest.approx(2.5)


def test_what_starts_at_the_loss_has_cost_what_was_spent_before():
    assert Curve((7, 9), (2.0, 1.0)).reach(2.5) == 7


def test_a_loss_that_was_not_reached_is_a_gap_and_no_number():
    assert Curve((1, 2, 3), (5, 3, 3.5)).outcome(Curve((1, 9), (4, 2.75))) == (None, 0.25)


def test_a_scratch_that_learned_nothing_is_no_yardstick():
    assert Curve((1, 2), (5, 3)).outcome(Curve((0, 9), (4, 4.5))) is None


def test_speed_up_and_saving_are_the_words_of_growth_plan():
    assert speed_up(saved(SPEED_UP)) == pytest.approx(SPEED_UP)
    assert f"{SPEED_UP:.1%} {saved(SPEED_UP):.0%}" == "54.6% 35%"


# Over seeds


def test_the_interval_is_that_of_scipy_and_needs_two():
    values = [0.31, 0.24, 0.42]
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == (pytest.approx(low), pytest.approx(high))
    assert interval([0.3]) is None


def test_the_interval_holds_the_truth_nineteen_times_in_twenty():
    draw = random.Random(0)
    samples = [interval([draw.gauss(0.3, 0.1) for _ in SEEDS]) for _ in range(2000)]
    assert mean(low < 0.3 < high for low, high in samples) == pytest.approx(0.95, abs=0.015)


def raced(*shares, gap=0.02):
    outcomes = [Outcome(share, gap if share is None else 0.0) for share in shares]
    return savings.Runner("grown", [], [], outcomes, scratch=False)


@pytest.mark.parametrize(
    "shares, said",
    [
        ((0.29, 0.31, 0.33), "with 31% fewer FLOPs (95% interval 26% to 36%, 3 seeds), a speed-up of 45%."),
        ((-0.13, -0.12, -0.11), "with 12% more FLOPs (95% interval 10% to 14%, 3 seeds)."),
        ((-0.1, 0.2, 0.2), "with 10% fewer FLOPs (95% interval -33% to 53%, 3 seeds, within the noise), a speed-up"),
        ((0.31,), "with 31% fewer FLOPs (one seed, so no interval), a speed-up of 45%."),
        ((None,), "grown does not reach the loss of scratch: 0.020 nats a token remain."),
        ((0.3, None, 0.31), "in 1 of 3 seeds: 0.020 nats a token remain; the FLOPs saved in the others are 30%, 31%."),
    ],
)
def test_one_plain_sentence_says_what_was_saved(shares, said):
    sentence = savings.sentence(raced(*shares), "scratch")
    assert said in sentence and sentence.startswith("grown ")
    assert "second" not in sentence


def test_a_mean_over_the_seeds_that_made_it_is_not_given():
    assert raced(0.3, None, 0.31).shares is None and raced(0.3, 0.2).shares == [0.3, 0.2]


def test_the_mean_curve_is_the_mean_of_its_seeds_evaluation_by_evaluation():
    assert average([Curve((1, 2), (4, 2)), Curve((3, 4, 5), (2, 1, 0))]) == Curve((2, 3), (3, 1.5))


# A run


def entries(points):
    """A log with an evaluation at every second step, before the first one too."""
    first, *later = points
    yield {"step": 0, "tokens": 0, "flops": first[0], "heldout": first[1]}
    for i, (flops, loss) in enumerate(later):
        rest = {"lr": 0.1, "grad_norm": 1.0, "terms": {"ce": loss}, "tokens_per_second": 9.0, "teacher_share": 0.0}
        yield {"step": 2 * i + 1, "tokens": i, "flops": flops - 1, **rest}
        yield {"step": 2 * i + 2, "tokens": i, "flops": flops, **rest, "heldout": loss}


def leave(directory, points, before=0):
    (directory / "model").mkdir(parents=True)
    (directory / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries(points)))
    (directory / "stage.json").write_text(json.dumps({"metrics": {"flops_before": before}}))


def train(student):
    return {"train": {"student": student, "data": "text", "loss": [{"ce": {"objective": "causal"}}],
                      "optim": {"batch": 4}, "lr": 0.1, "stop": {"steps": 8}, "evaluate_every": 2}}  # fmt: skip


RECIPE = {
    "recipe": "raced",
    "seed": 5,
    "seeds": 3,
    "models": {"base": {"from": "base"}},
    "corpora": {"text": {"source": "synthetic", "tokenizer": "base"}},
    "stages": [
        {"id": "small", **train({"new": {"like": "base"}})},
        {"id": "stacked", "grow": {"from": "small", "ops": [{"stack": {"factor": 4}}]}},
        {"id": "grown", **train({"from": "stacked"})},
        {"id": "alone", **train({"new": {"like": "stacked"}})},
        {"id": "worth", "evaluate": {"rows": {"grown": "grown", "scratch": "alone", "begun": "stacked"},
                                     "on": ["saving"]}},
    ],
}  # fmt: skip


def bench_of(rows, recipe=RECIPE):
    trained = {s["id"]: SimpleNamespace(evaluate_every=s["train"].get("evaluate_every")) for s in recipe["stages"]
               if "train" in s and s["id"] in rows.values()}  # fmt: skip
    return SimpleNamespace(scratch=rows.get("scratch"), trained=trained)


def measured(run, rows):
    """The metric as the evaluation asks it: one subject a row and seed."""
    saving, bench = METRICS["saving"], bench_of(rows)
    found = {}
    for label, reference in rows.items():
        subjects = [SimpleNamespace(path=run / f"{reference}@{seed}" / "model") for seed in (5, 6, 7)]
        scores = list(saving.measure(subjects, bench))
        found[label] = None if None in scores else [score.value for score in scores]
    return found


def make_run(run, target=1.0):
    """grown costs 200 before it begins, and is 10 % cheaper with each seed; small ends at 5.6."""
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    for n, seed in enumerate((5, 6, 7)):
        leave(run / f"small@{seed}", power_law(10, 200, 4).points)
        mine = power_law(300, 1500, 6, cheaper=(0.7 - 0.1 * n) * target)
        leave(run / f"grown@{seed}", [(x - 200, y) for x, y in mine.points], before=200)
        leave(run / f"alone@{seed}", [(0, 9.0), *power_law(100, 1000, 9).points])
        (run / f"stacked@{seed}" / "model").mkdir(parents=True)
        (run / f"stacked@{seed}" / "stage.json").write_text("{}")
    write_result(run)
    return run


def write_result(run):
    rows = RECIPE["stages"][-1]["evaluate"]["rows"]
    found = measured(run, rows)
    saving = METRICS["saving"]
    (run / "worth").mkdir(exist_ok=True)
    (run / "worth" / RESULT).write_text(json.dumps({
        "metrics": {"saving": {"title": saving.title, "better": "high", "digits": 3, "quality": False, "note": "n"}},
        "rows": [{"name": label, "role": {"scratch": "scratch", "begun": "baseline"}.get(label, "student"),
                  "reference": reference, "params": 1000,
                  "metrics": {} if found[label] is None else {"saving": {
                      "mean": mean(found[label]), "seeds": found[label], "better": "high", "error": None}}}
                 for label, reference in rows.items()],
        "machine": {"cores": 1, "cpu": "one", "memory": 10**9, "gpu": None}, "versions": {}, "command": "distill run",
    }))  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(run directory with its report, what the terminal showed)."""
    run, terminal = make_run(tmp_path_factory.mktemp("raced")), io.StringIO()
    with redirect_stdout(terminal), pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.report.say", print)
        patch.setattr("growth.console.say", print)
        report.rebuild(run)
    return run, terminal.getvalue()


def test_the_metric_counts_what_was_spent_before_and_pairs_the_seeds(told):
    found = measured(told[0], {"grown": "grown", "scratch": "alone", "begun": "stacked"})
    assert found["grown"] == pytest.approx([0.3, 0.4, 0.5])
    assert found["scratch"] == [0, 0, 0] and found["begun"] is None


def test_the_start_of_a_stage_has_no_saving(told):
    subjects = [SimpleNamespace(path=told[0] / "grown@5" / "start")]
    assert list(METRICS["saving"].measure(subjects, bench_of({"scratch": "alone"}))) == [None]


def test_table_sentence_and_json_say_the_same(told):
    run, terminal = told
    sentence = "grown reaches the loss of scratch with 40% fewer FLOPs (95% interval 15% to 65%, 3 seeds)"
    markdown = (run / "report.md").read_text()
    assert sentence in terminal and f"**{sentence}, a speed-up of 67%.**" in markdown
    assert "**0.400** (0.152 to 0.648)" in markdown and "| begun | 1.0 k | - |" in markdown
    found = {row["name"]: row["metrics"] for row in json.loads((run / "report.json").read_text())["rows"]}
    assert found["grown"]["saving"]["seeds"] == pytest.approx([0.3, 0.4, 0.5])
    assert "nothing to compare" not in terminal


def test_the_picture_is_linked_and_knows_what_a_row_was_made_from(told):
    run, _ = told
    assert "](saving.png)" in (run / "report.md").read_text()
    assert (run / "saving.png").read_bytes().startswith(b"\x89PNG")
    rows = [{"name": label, "role": label, "reference": reference} for label, reference in
            RECIPE["stages"][-1]["evaluate"]["rows"].items()]  # fmt: skip
    grown, scratch = savings.gather(run, rows)
    assert [seeds[0].flops[-1] for seeds in grown.before] == [200] and not scratch.before
    assert grown.curves[0].flops[0] == 300 and scratch.scratch and not scratch.outcomes


def test_a_loss_that_was_not_reached_is_said_in_table_and_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.report.plots.draw", lambda *_: {})
    run = make_run(tmp_path, target=4.0)
    report.rebuild(run)
    markdown = (run / "report.md").read_text()
    assert "| grown | 1.0 k | not reached |" in markdown
    assert "grown does not reach the loss of scratch in 3 of 3 seeds" in markdown
    found = {row["name"]: row["metrics"] for row in json.loads((run / "report.json").read_text())["rows"]}
    assert "saving" not in found["grown"]


def test_the_axis_is_logarithmic_beyond_a_decade_only(tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr("distill.report.curves._level", lambda panel, *_: panels.append(panel))
    for last in (5e3, 1e6):
        seeds = [power_law(1e3, last, 8)]
        race(tmp_path / "x.png", [savings.runner("scratch", seeds, seeds, [])])
        left, right = panels[-1].get_xlim()
        bottom, top = panels[-1].get_ylim()
        assert left < last < right and bottom < seeds[0].loss[-1] < top
    assert [panel.get_xscale() for panel in panels] == ["linear", "log"]


@pytest.mark.parametrize(
    "rows, changed, message",
    [
        ({"grown": "grown"}, {}, "call a row `scratch`"),
        ({"grown": "grown", "scratch": "alone"}, {"alone": None}, "held-out losses of alone"),
        ({"grown": "grown", "scratch": "stacked"}, {}, "held-out losses of stacked"),
        ({"grown": "grown", "scratch": "alone"}, {"grown": None}, "a row to compare with alone"),
    ],
)
def test_a_saving_that_cannot_be_is_refused_before_training(rows, changed, message):
    bench = bench_of(rows)
    for stage, every in changed.items():
        bench.trained[stage].evaluate_every = every
    with pytest.raises(UserError, match=message):
        METRICS["saving"].check(bench)


def test_the_scratch_of_a_seed_lies_beside_it(tmp_path):
    assert beside(tmp_path / "grown@2", "alone").name == "alone@2"
    assert beside(tmp_path / "grown", "alone").name == "alone"


def test_a_stage_without_evaluations_has_no_curve(tmp_path):
    leave(tmp_path / "x", [(1, 2)])
    assert curve(tmp_path / "x") == Curve((1,), (2,))
    (tmp_path / "x" / "log.jsonl").write_text('{"step": 1, "flops": 3}\n')
    assert curve(tmp_path / "x") is None and curve(tmp_path / "y") is None


# The equal search for learning rates


@pytest.fixture(scope="module")
def sweeping():
    path = Path(__file__).parent.parent / "benchmarks" / "growth_savings.py"
    spec = importlib.util.spec_from_file_location("growth_savings", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def sweep(sweeping, tmp_path):
    (tmp_path / "raced.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    name = str(tmp_path / "raced.yaml")
    return sweeping.Sweep(name, [], recipes.load(name), tmp_path / "runs")


PLANS = [(rate, seed) for rate in (0.5, 1.0, 2.0) for seed in (5, 6)]


def fill(sweep, cheaper, worse):
    """Runs of one seed: grown saves by `cheaper[rate]`, scratch ends higher by `worse[rate]`; seed 6 saves 0.1 more."""
    for rate, seed in PLANS:
        out = sweep.out(rate, seed)
        leave(out / "small", power_law(10, 200, 4).points)
        factor = cheaper[rate] - 0.1 * (seed == 6)
        leave(out / "grown", [(x - 200, y) for x, y in power_law(300, 1500, 6, factor).points], before=200)
        scratch = [(0, 9.0), *((x, y + worse[rate]) for x, y in power_law(100, 1000, 9).points)]
        leave(out / "alone", scratch)
        (out / "recipe.yaml").write_text(recipes.dump(recipes.load(sweep.name, [f"seed={seed}", "seeds=1"])))


def test_both_arms_are_judged_at_their_own_best_rate(sweeping, sweep, tmp_path, capsys):
    fill(sweep, cheaper={0.5: 0.6, 1.0: 0.7, 2.0: 0.8}, worse={0.5: 0.2, 1.0: 0.1, 2.0: 0.0})
    grown, scratch = sweep.arms(PLANS)
    found = sweeping.summary("raced", grown, scratch)
    assert found["best"]["grown"] == 0.5 and found["best"]["scratch"] == 2.0
    assert found["best"]["saved"] == pytest.approx([0.4, 0.5])
    assert found["arms"]["scratch"]["0.5"] == {"heldout": [pytest.approx(6.2)] * 2, "flops": [1000, 1000]}
    low = {rate: told["saved"] for rate, told in found["same_rate"].items()}  # the target lies higher by `worse`
    assert low["1"] == pytest.approx([1 - 0.7 * 10**-0.1, 1 - 0.6 * 10**-0.1])
    sweeping.show(found)
    shown = capsys.readouterr().out
    assert "best against best: grown reaches the loss of scratch with 45% fewer FLOPs (95% interval" in shown
    assert shown.count("*") == 2 and "6.0000 ± 0.0000" in shown
    sweeping.write(tmp_path / "results", found, grown, scratch)
    written = json.loads((tmp_path / "results" / "raced.json").read_text())
    assert [len(curve) for curve in written["curves"]["grown"]["1"]] == [7, 7] and len(written["curves"]["before"]) == 1
    assert (tmp_path / "results" / "raced.png").read_bytes().startswith(b"\x89PNG")


def test_a_rate_moves_the_big_model_of_both_arms_and_nothing_else(sweep):
    changed = recipes.load(sweep.name, sweep.changes(0.0005, 6))
    rates = {stage.id: stage.train.lr.points[0][1] for stage in changed.stages if stage.train}
    assert rates == {"small": 0.1, "grown": pytest.approx(5e-5), "alone": pytest.approx(5e-5)}
    assert (changed.seed, changed.seeds) == (6, 1)
    assert sweep.before() == ["small"]


def test_what_does_not_depend_on_the_rate_is_taken_from_a_run_of_the_same_seed(sweeping, tmp_path):
    (tmp_path / "a" / "corpora").mkdir(parents=True)
    (tmp_path / "a" / "recipe.yaml").write_text("recipe: raced\n")
    (tmp_path / "a" / "small" / "snapshots").mkdir(parents=True)
    for state, taken in (("running", False), ("done", True)):
        (tmp_path / "a" / "small" / "stage.json").write_text(json.dumps({"state": state}))
        sweeping.borrow(tmp_path / "b", iter([tmp_path / "a"]), ["small"])
        assert (tmp_path / "b").exists() == taken
    assert sorted(path.name for path in (tmp_path / "b").rglob("*")) == [
        "corpora",
        "recipe.yaml",
        "small",
        "stage.json",
    ]
