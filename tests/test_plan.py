"""The published laws of growth, to the digits that were published."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

import growth
from growth.cli import main
from growth.errors import UsageError
from growth.plan import SPEED_UP, saved


@pytest.mark.parametrize(
    ("parameters", "tokens", "small"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_the_four_published_growth_times_are_reproduced(parameters, tokens, small):
    assert abs(growth.plan(parameters, tokens).small_tokens - small) < 0.005e9


def test_a_speed_up_is_not_a_saving():
    assert f"{saved(SPEED_UP):.0%}" == "35%" and saved(0) == 0 and saved(1) == 0.5


def test_the_small_model_costs_its_parameters_times_its_tokens():
    made = growth.plan(7e9, 300e9, factor=4)
    assert made.small_share == pytest.approx(6 * 7e9 / 4 * made.small_tokens / made.flops)
    assert made.training_bytes == 112e9


@pytest.mark.parametrize("asked", [(1, 1e9, 4), (7e9, 1, 4), (7e9, 1e9, 1), (float("nan"), 1e9, 4), (7e9, 1e308, 4)])
def test_plans_that_mean_nothing_are_refused(asked):
    with pytest.raises(UsageError):
        growth.plan(*asked)


def test_too_few_tokens_to_grow_are_said():
    with pytest.raises(UsageError, match="too few to grow"):
        growth.plan(70e9, 1e9)


def test_the_command_promises_no_seconds():
    said = CliRunner().invoke(main, ["plan", "--params", "7e9", "--tokens", "2e12"]).output
    assert "11.1 B tokens" in said and "35% of them saved" in said and "not known before a run" in said
