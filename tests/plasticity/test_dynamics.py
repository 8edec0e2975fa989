"""Ways whose coupling, hysteresis and times are known; the intervals cover them about as often as they say."""

import numpy as np
import pytest

from neuroplast.localisation import matched_test
from neuroplast.plasticity.dynamics import Way, coupling, half_way_of_mean, hysteresis, random_couplings
from neuroplast.statistics import bootstrap_weights

PROMPTS = 40
WEIGHTS = bootstrap_weights(PROMPTS, 0, 400)
STEPS = np.array([0, 1, 2, 4, 8, 16, 32])
FALL = np.array([4.0, 3.0, 1.0, -1.5, -4.5, -7.5, -9.0])
RISE = np.array([-9.0, -6.0, -3.5, -0.5, 1.5, 2.8, 3.3])
TRIALS = 200
NOMINAL = (0.90, 0.99)
"""Where the share of covered truths is looked for: 95 % less what a bootstrap of 40 prompts falls short by."""


def noisy(means: np.ndarray, rng: np.random.Generator, of_prompt: float = 1.0, of_step: float = 0.2) -> np.ndarray:
    """(point, prompt): prompts differ, and each differs a little more at every step."""
    prompts = rng.normal(0, of_prompt, size=PROMPTS)
    return means[:, None] + prompts + rng.normal(0, of_step, size=(len(means), PROMPTS))


def way(logit_diff: np.ndarray, strength: np.ndarray, rng: np.random.Generator | None = None) -> Way:
    if rng is None:
        return Way(STEPS, *(np.repeat(each[:, None], PROMPTS, axis=1) for each in (logit_diff, strength)))
    return Way(STEPS, noisy(logit_diff, rng), noisy(strength, rng))


def on_a_line(logit_diff: np.ndarray) -> np.ndarray:
    return 1.0 + 0.3 * logit_diff


def test_a_class_that_is_as_strong_at_the_same_logit_difference_has_no_hysteresis():
    found = hysteresis(way(FALL, on_a_line(FALL)), way(RISE, on_a_line(RISE)), WEIGHTS)
    assert found.value == pytest.approx(0.0, abs=1e-9)


def test_a_class_that_is_weaker_on_the_way_back_has_just_that_hysteresis():
    found = hysteresis(way(FALL, on_a_line(FALL)), way(RISE, on_a_line(RISE) - 0.7), WEIGHTS)
    assert found.value == pytest.approx(-0.7, abs=1e-9)


def test_where_a_way_passes_a_level_several_times_the_mean_counts():
    def steps(*values: float) -> np.ndarray:
        return np.array(values)[:, None]

    there = Way(np.arange(5), steps(0.0, 0.5, 1.0, 1.5, 2.0), steps(0.0, 0.0, 0.0, 0.0, 0.0))
    up = [0.0, 0.5, 1.0, 1.5, 2.0]
    back = Way(np.arange(13), steps(*up, 1.5, 1.0, 0.5, 0.0, *up[1:]), steps(*[1.0] * 5, *[4.0] * 4, *[1.0] * 4))
    found = hysteresis(there, back, bootstrap_weights(1, 0, 100))
    # Up at 1, down at 4 but for the first quarter, where it climbs from 1 to 4; up at 1 but for as long from 4 to 1.
    down, again = (3 * 4 + 2.5) / 4, (3 * 1 + 2.5) / 4
    assert found.value == pytest.approx((1 + down + again) / 3, abs=0.02)


def test_what_lies_between_steps_that_are_far_apart_is_left_out():
    def bent(logit_diff: np.ndarray) -> np.ndarray:
        return np.maximum(logit_diff, 0)

    leaps = np.array([5.0, 4.8, 4.5, 4.0, 3.5, 3.0, -5.0])
    dense = np.linspace(-5, 5, 7)
    there, back = way(leaps, bent(leaps)), way(dense, bent(dense))
    found = hysteresis(there, back, WEIGHTS)
    assert found.value == pytest.approx(0.0, abs=0.05)
    only_ends = Way(np.arange(2), there.logit_diff[[0, -1]], there.strength[[0, -1]])
    assert "leap over it" in (hysteresis(only_ends, back, WEIGHTS).why or "")


def test_ways_without_a_common_logit_difference_have_no_hysteresis_that_could_be_told():
    found = hysteresis(way(FALL, FALL), way(FALL - 20, FALL), WEIGHTS)
    assert found.value is None and "no logit difference in common" in found.why


@pytest.mark.parametrize("gap", [0.0, -0.7])
def test_the_interval_of_the_hysteresis_covers_the_truth(gap: float):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(TRIALS):
        there, back = way(FALL, on_a_line(FALL), rng), way(RISE, on_a_line(RISE) + gap, rng)
        found = hysteresis(there, back, bootstrap_weights(PROMPTS, int(rng.integers(1 << 30)), 400))
        covered += found.ci95[0] <= gap <= found.ci95[1]
    assert NOMINAL[0] <= covered / TRIALS <= NOMINAL[1]


def test_strength_that_rises_with_the_logit_difference_is_coupled_and_one_that_does_not_is_not():
    assert coupling([way(FALL, FALL**3)], WEIGHTS).value == pytest.approx(1.0)
    assert coupling([way(FALL, -FALL), way(RISE, -RISE)], WEIGHTS).value == pytest.approx(-1.0)
    constant = coupling([way(FALL, np.ones_like(FALL))], WEIGHTS)
    assert constant.value is None and "does not vary" in constant.why


def test_too_few_points_tell_of_no_coupling():
    short = Way(STEPS[:3], np.ones((3, PROMPTS)), np.ones((3, PROMPTS)))
    assert coupling([short], WEIGHTS).value is None


def test_coupling_beyond_that_of_random_sets_is_found_and_none_is_not():
    rng, beaten = np.random.default_rng(3), {True: 0, False: 0}
    for _ in range(TRIALS):
        logit_diff = noisy(FALL, rng)
        random = np.stack([noisy(rng.normal(size=len(FALL)), rng) for _ in range(39)])
        null = random_couplings(logit_diff, random)
        for coupled in beaten:
            means = FALL / 5 if coupled else rng.normal(size=len(FALL))
            found = coupling([Way(STEPS, logit_diff, noisy(means, rng))], WEIGHTS)
            beaten[coupled] += bool(matched_test(found.value, null).beaten)
    assert beaten[True] / TRIALS > 0.95
    assert beaten[False] / TRIALS < 0.1


def test_the_interval_of_the_coupling_covers_the_truth():
    # Steps whose order is never in doubt, but for two that change places in half of all samples of prompts.
    strength = np.array([6.0, 5.0, 4.0, 3.0, 2.0, 2.0, 0.0])
    truths = {1.0, 1 - 6 * 2 / (7 * 48)}
    rng, covered = np.random.default_rng(4), 0
    for _ in range(TRIALS):
        sample = Way(STEPS, noisy(FALL, rng), noisy(strength, rng))
        found = coupling([sample], bootstrap_weights(PROMPTS, int(rng.integers(1 << 30)), 400))
        covered += all(found.ci95[0] - 1e-9 <= truth <= found.ci95[1] + 1e-9 for truth in truths)
    assert covered / TRIALS >= NOMINAL[0]


def test_half_way_is_found_between_two_measured_steps():
    values = way(np.array([4.0, 3.0, 1.0, -3.0, -4.0, -4.0, -4.0]), FALL).logit_diff
    assert half_way_of_mean(STEPS, values, values[-1], WEIGHTS).value == pytest.approx(2.5)


def test_half_of_a_way_that_is_not_gone_or_is_within_the_noise_has_no_step():
    values = way(RISE, RISE).logit_diff
    found = half_way_of_mean(STEPS, values, np.full(PROMPTS, 30.0), WEIGHTS)
    assert found.value is None and "not gone by the last step" in found.why
    rng = np.random.default_rng(5)
    quiet = noisy(np.zeros(7), rng, of_step=1.0)
    assert "within the noise" in (half_way_of_mean(STEPS, quiet, quiet[-1], WEIGHTS).why or "")


def test_the_interval_of_the_half_way_step_covers_the_truth():
    truth = half_way_of_mean(STEPS, RISE[:, None], np.array([4.0]), bootstrap_weights(1, 0, 100)).value
    rng, covered = np.random.default_rng(6), 0
    for _ in range(TRIALS):
        values, goal = noisy(RISE, rng), noisy(np.array([4.0]), rng)[0]
        found = half_way_of_mean(STEPS, values, goal, bootstrap_weights(PROMPTS, int(rng.integers(1 << 30)), 400))
        covered += found.ci95[0] <= truth <= found.ci95[1]
    assert NOMINAL[0] <= covered / TRIALS <= NOMINAL[1]
