import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroplast.statistics import (
    bootstrap_weights,
    can_tell,
    estimate,
    estimate_mean,
    interval,
    over_seeds,
    p_value,
    row_correlations,
)


def test_the_mean_of_a_constant_has_no_width():
    found = estimate_mean(bootstrap_weights(20, 0), np.full(20, 3.0))
    assert found.value == 3.0
    np.testing.assert_allclose(found.ci95, (3.0, 3.0))


def test_the_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        found = estimate_mean(bootstrap_weights(60, trial, 400), rng.normal(1.0, 2.0, size=60))
        covered += found.ci95[0] <= 1.0 <= found.ci95[1]
    assert 0.90 <= covered / 300 <= 0.98


def test_weights_repeat_with_the_seed_and_sum_to_one():
    first, again, other = bootstrap_weights(7, 1, 50), bootstrap_weights(7, 1, 50), bootstrap_weights(7, 2, 50)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    np.testing.assert_allclose(first.sum(axis=1), 1.0)


def test_a_statistic_that_is_no_number_gives_a_reason_instead():
    found = estimate(bootstrap_weights(4, 0, 100), lambda rows: np.full(len(rows), np.nan))
    assert found.value is None and found.ci95 is None and found.why


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 30))
def test_correlations_agree_with_numpy(seed: int, nodes: int):
    first, second = np.random.default_rng(seed).normal(size=(2, 4, nodes))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(row_correlations(first, second), expected, atol=1e-12)


def test_a_constant_row_has_no_correlation():
    assert np.isnan(row_correlations(np.ones((1, 5)), np.arange(5.0)[None]))[0]


def test_resamples_without_a_value_are_left_out_of_an_interval():
    low, high = interval(np.array([1.0, np.nan, 1.0, 1.0]))
    assert (low, high) == (1.0, 1.0)


def test_a_p_value_counts_ties_and_what_has_no_value():
    null = np.arange(19.0)
    assert p_value(18.0, null) == pytest.approx(2 / 20) and p_value(18.5, null) == pytest.approx(1 / 20)
    assert p_value(-1.0, null) == 1.0 and p_value(1e-12, np.full(19, 1e-13)) == pytest.approx(1 / 20)
    assert p_value(18.5, np.full(19, np.nan)) == 1.0
    assert p_value(np.nan, null) is None and p_value(1.0, np.empty(0)) is None
    assert can_tell(19) and not can_tell(18)


def test_the_interval_over_three_seeds_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(7), 0
    for _ in range(400):
        low, high = over_seeds(list(rng.normal(1.0, 2.0, size=3))).ci95
        covered += low <= 1.0 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_seeds_without_a_value_do_not_count_and_two_are_too_few():
    assert over_seeds([1.0, None, 3.0]).value is None
    assert over_seeds([1.0, None, 3.0, 2.0]).value == pytest.approx(2.0)
