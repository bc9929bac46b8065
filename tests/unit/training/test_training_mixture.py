"""The order of samples: complete, in proportion, reachable anywhere, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import paired

from cpm_cluster.training.data.mixture import Mixture, permuted

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
KEYS = np.arange(1, 7, dtype=np.uint64)


def sent_by(keys, numbers, size: int):
    """Return where one permutation sends all numbers."""
    return permuted(numbers, size, np.repeat(keys[:, None], len(numbers), axis=1))


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_a_permutation_hits_every_number_once(size, key):
    sent = sent_by(KEYS * np.uint64(key), np.arange(size), size)

    assert sorted(sent.tolist()) == list(range(size))


@given(st.integers(1, 10**12), st.data())
def test_any_place_of_a_permutation_is_reached_without_the_others(size, data):
    some = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5, unique=True))

    sent = sent_by(KEYS, np.array(some), size)

    assert len(set(sent.tolist())) == len(some)
    assert sent.min() >= 0 and sent.max() < size
    assert sent[:1].tolist() == sent_by(KEYS, np.array(some[:1]), size).tolist()


def test_a_permutation_leaves_neither_order_nor_neighbourhood():
    sent = sent_by(KEYS, np.arange(10_000), 10_000)

    assert abs(np.corrcoef(np.arange(10_000), sent)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(sent)) == 1) < 0.001


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_has_every_sample_once_however_it_is_cut(sizes, window, seed):
    mixture = Mixture(sizes, None, seed, window)

    drawn, number = [], 0
    while mixture.epoch_of(number) < 2:
        part = mixture.window(number)
        assert 1 <= len(part) <= window
        drawn.extend(part.tolist())
        number += 1

    total = sum(sizes)
    assert sorted(drawn[:total]) == sorted(drawn[total:]) == list(range(total))


@settings(max_examples=50, deadline=None)
@given(sizes, st.data(), st.integers(2, 50), st.integers(1, 12))
def test_weighted_sources_are_drawn_in_exact_proportion_and_evenly(sizes, data, window, windows):
    weights = [data.draw(st.floats(0.01, 100)) for _ in sizes]
    mixture = Mixture(sizes, weights, 3, max(window, len(sizes)))

    drawn = np.concatenate([mixture.window(number) for number in range(windows)])

    source_of = np.repeat(np.arange(len(sizes)), sizes)[drawn]
    for source, (size, weight) in enumerate(paired(sizes, weights)):
        own = drawn[source_of == source]
        expected = len(drawn) * weight / sum(weights)
        assert abs(len(own) - expected) <= len(sizes)
        times = np.bincount(own - sum(sizes[:source]), minlength=size)
        assert times.max() - times.min() <= 1


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [1, 2, 10])
def test_a_tiny_source_of_great_weight_costs_little(size):
    mixture = Mixture([size, 100_000], [9, 1], 3)

    drawn = mixture.window(1)

    times = np.bincount(drawn[drawn < size])
    assert len(drawn) >= 50_000 and len(times) == size
    assert times.sum() == pytest.approx(0.9 * len(drawn), abs=2) and times.max() - times.min() <= 2


def test_a_window_does_not_depend_on_those_before_it():
    straight, direct = Mixture([30, 9], [1, 2], 5, 8), Mixture([30, 9], [1, 2], 5, 8)
    windows = [straight.window(number).tolist() for number in range(9)]

    assert direct.window(8).tolist() == windows[8]
    assert windows[0] != Mixture([30, 9], [1, 2], 6, 8).window(0).tolist()


def test_weights_count_relative_to_each_other():
    assert Mixture([30, 9], [1, 2], 5).window(1).tolist() == Mixture([30, 9], [0.25, 0.5], 5).window(1).tolist()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, [[0, 9, 2, 1, 7], [6, 3, 8, 4, 5], [4, 5, 1, 7, 0]]),
        ([1.0, 3.0], [[6, 1, 9, 7], [6, 5, 8, 8, 7], [9, 6, 6, 1]]),
    ],
)
def test_the_order_stays_what_it_was_so_that_a_run_can_go_on_with_a_later_version(weights, expected):
    mixture = Mixture([6, 4], weights, 7, 5)

    assert [mixture.window(number).tolist() for number in (0, 1, 1000)] == expected
