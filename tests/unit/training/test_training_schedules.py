"""Learning rates at the steps where one would look: first, peak, middle, end."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_cluster.training.schedules import (
    constant,
    cosine,
    learning_rate,
    linear,
    noam,
    wsd,
)

ALL = [cosine, linear, wsd, noam, constant]


@pytest.mark.parametrize("schedule", ALL)
def test_warm_up_is_linear_to_the_peak(schedule):
    assert [schedule(step, 100, 10, 0.1) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize("schedule", ALL)
def test_without_warm_up_the_first_step_is_near_the_peak(schedule):
    assert schedule(1, 100, 0, 0.1) == pytest.approx(1.0, abs=0.02)


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor():
    assert cosine(55, 100, 10, 0.2) == pytest.approx(0.6)
    assert cosine(100, 100, 10, 0.2) == pytest.approx(0.2)


def test_linear_falls_evenly_to_the_floor():
    assert [linear(step, 110, 10, 0.5) for step in (35, 60, 110)] == pytest.approx([0.875, 0.75, 0.5])


def test_wsd_stays_at_the_peak_until_the_last_tenth():
    assert [wsd(step, 100, 10, 0.1) for step in (11, 50, 90)] == [1.0, 1.0, 1.0]
    assert [wsd(step, 100, 10, 0.1) for step in (95, 100)] == pytest.approx([0.55, 0.1])


def test_noam_falls_with_the_inverse_square_root_but_not_below_the_floor():
    assert noam(40, 1000, 10, 0.1) == pytest.approx(math.sqrt(10 / 40))
    assert noam(10_000, 20_000, 10, 0.1) == 0.1


@pytest.mark.parametrize("schedule", ALL)
def test_a_run_that_only_warms_up_ends_at_the_peak(schedule):
    assert schedule(10, 10, 10, 0.1) == 1.0


def test_constant_stays():
    assert constant(100, 100, 10, 0.1) == 1.0


def test_the_rate_is_the_peak_times_the_factor(tiny_settings):
    training = replace(tiny_settings().training, lr=3e-4, steps=100, warmup_steps=10, schedule="linear")

    assert learning_rate(5, training) == pytest.approx(1.5e-4)
    assert learning_rate(100, training) == pytest.approx(3e-5)


@given(st.sampled_from(ALL), st.integers(1, 200), st.data(), st.floats(0, 1))
def test_the_factor_never_leaves_zero_to_one(schedule, steps, data, floor):
    warmup, step = data.draw(st.integers(0, steps)), data.draw(st.integers(1, steps))

    assert 0 <= schedule(step, steps, warmup, floor) <= 1 + 1e-12
