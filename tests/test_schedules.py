from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from distill.schedules import Progress, Schedule, Value

SHAPES = ["linear", "cosine", "geometric", "hold"]


def at(schedule, step, steps=100):
    return Schedule.model_validate(schedule).at(Progress(step, steps, tokens=step * 10, flops=step * 1e9))


def test_a_bare_number_is_the_same_everywhere():
    assert [at(3, step) for step in (0, 7, 10**9)] == [3.0] * 3


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_starts_and_ends_in_its_points_and_stays_there(shape):
    schedule = {"points": [[2, 4.0], [10, 1.0]], "shape": shape}
    assert [at(schedule, x) for x in (0, 2, 10, 99)] == [4.0, 4.0, 1.0, 1.0]


def test_midway_linear_is_the_mean_geometric_its_own_mean_and_hold_the_left_value():
    middle = {shape: at({"points": [[0, 4.0], [10, 1.0]], "shape": shape}, 5) for shape in SHAPES}
    assert middle == pytest.approx({"linear": 2.5, "cosine": 2.5, "geometric": 2.0, "hold": 4.0})


def test_cosine_leaves_flat_and_a_quarter_of_the_way_is_the_formula():
    assert at({"points": [[0, 1.0], [100, 0.0]], "shape": "cosine"}, 25) == pytest.approx((1 + 2**-0.5) / 2)


def test_shapes_per_segment():
    schedule = {"points": [[0, 0.0], [10, 1.0], [20, 1.0], [30, 0.01]], "shape": ["linear", "hold", "geometric"]}
    assert [at(schedule, x) for x in (5, 15, 25)] == pytest.approx([0.5, 1.0, 0.1])


@pytest.mark.parametrize(("unit", "end"), [("steps", 100), ("fraction", 1), ("tokens", 1000), ("flops", 100e9)])
def test_every_unit_counts_its_own_thing(unit, end):
    assert at({"unit": unit, "points": [[0, 0.0], [end, 1.0]]}, 30) == pytest.approx(0.3)


def test_a_fraction_of_an_unknown_length_is_refused():
    with pytest.raises(ValueError, match="number of steps"):
        Schedule(unit="fraction", points=[[0, 1.0], [1, 0.0]]).at(Progress(3))


@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=6), st.sampled_from(SHAPES), st.integers(0, 600))
def test_a_value_stays_between_its_neighbours(ys, shape, step):
    points = [[100 * i, y] for i, y in enumerate(ys)]
    near = ys[min(step // 100, len(ys) - 1)], ys[min(step // 100 + 1, len(ys) - 1)]
    assert min(near) - 1e-9 <= at({"points": points, "shape": shape}, step) <= max(near) + 1e-9


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("0.1", "expected a number"),
        (True, "expected a number"),
        ([[0, 1]], "expected a number"),
        (float("nan"), "finite"),
        ({"points": []}, "at least one"),
        ({"points": [[0, "1"]]}, "valid number"),
        ({"points": [[0, 1, 2]]}, "at most 2"),
        ({"points": [[5, 1], [5, 2]]}, "grow"),
        ({"points": [[-1, 1], [5, 2]]}, "0 or more"),
        ({"unit": "fraction", "points": [[0, 1], [2, 0]]}, "from 0 to 1"),
        ({"points": [[0, 1], [9, 0]], "shape": "geometric"}, "above 0"),
        ({"points": [[0, 1], [9, 0]], "shape": ["hold", "hold"]}, "1 segments, 2 shapes"),
        ({"points": [[0, 1]], "form": "hold"}, "form"),
        ({"points": [[0, 1]], "unit": "epochs"}, "unit"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        Schedule.model_validate(wrong)


@pytest.mark.parametrize("given", [0.5, {"unit": "tokens", "points": [[0, 1.0], [9, 2.0]], "shape": ["hold"]}])
def test_written_and_read_again_it_is_equal(given):
    schedule = Schedule.model_validate(given)
    assert Schedule.model_validate(schedule.model_dump(mode="json")) == schedule


def test_as_a_field_it_takes_numbers_and_has_a_schema_for_both():
    class Loss(Value):
        weight: Schedule = Schedule.constant(1.0)

    assert Loss(weight=2).weight == Schedule.constant(2)
    assert {"type": "number"} in TypeAdapter(Schedule).json_schema()["anyOf"]
