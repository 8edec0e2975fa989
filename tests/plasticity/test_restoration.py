import numpy as np
import pytest

from neuroplast.plasticity.restoration import Sample, restoration, similarity, swapped_distance
from neuroplast.statistics import bootstrap_weights

PROMPTS, NODES = 40, 25
WEIGHTS = bootstrap_weights(PROMPTS, 0, 500)


def sample(logit_diff: float, pattern: np.ndarray, noise: float = 0.05, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample(
        rng.normal(logit_diff, 0.2, size=PROMPTS),
        pattern[:, None] + rng.normal(0, noise, size=(NODES, PROMPTS)),
    )


PATTERN = np.random.default_rng(1).normal(size=NODES)
OTHER = np.random.default_rng(2).normal(size=NODES)
BASE = sample(3.0, PATTERN, seed=1)
POISONED = sample(-9.0, -PATTERN, seed=2)


def test_a_model_that_came_back_entirely_is_restored_to_one():
    found = restoration(BASE, POISONED, BASE, WEIGHTS, 0)
    assert found.behaviour.value == pytest.approx(1.0)
    assert found.mechanism.value == pytest.approx(1.0)
    assert found.damage_undone.value == pytest.approx(1.0)


def test_a_model_that_stayed_poisoned_is_restored_to_zero():
    found = restoration(BASE, POISONED, POISONED, WEIGHTS, 0)
    assert found.behaviour.value == pytest.approx(0.0)
    assert found.damage_undone.value == pytest.approx(0.0)
    assert found.mechanism.value == pytest.approx(-1.0, abs=0.05)


def test_half_the_logit_difference_back_is_one_half_with_an_interval_around_it():
    found = restoration(BASE, POISONED, sample(-3.0, PATTERN, seed=3), WEIGHTS, 0)
    assert found.behaviour.value == pytest.approx(0.5, abs=0.02)
    assert found.behaviour.ci95[0] < found.behaviour.value < found.behaviour.ci95[1]


def test_without_damage_beyond_the_noise_the_ratios_are_undefined():
    unharmed = sample(3.0, PATTERN, seed=1)
    found = restoration(BASE, unharmed, sample(3.1, PATTERN, seed=4), WEIGHTS, 0)
    assert found.behaviour.value is None and "within the noise" in found.behaviour.why
    assert found.damage_undone.value is None and "noise of the prompts" in found.damage_undone.why
    assert found.mechanism.value is not None


def test_an_unrelated_mechanism_is_not_called_similar():
    found = similarity(sample(3.0, OTHER, seed=5), BASE, WEIGHTS)
    assert abs(found.value) < 0.6
    assert similarity(BASE, BASE, WEIGHTS).ci95 == pytest.approx((1.0, 1.0))


def test_the_noise_floor_grows_with_the_noise_between_prompts():
    def floor(noise: float) -> float:
        return swapped_distance(sample(3.0, PATTERN, noise, seed=1), sample(3.0, PATTERN, noise, seed=2), 400, 0)

    assert floor(0.05) < floor(3.0)


def test_a_change_that_all_prompts_share_is_damage_however_much_prompts_differ():
    rng = np.random.default_rng(8)
    of_prompt = rng.normal(0, 3, size=(NODES, PROMPTS))
    base = Sample(rng.normal(3, 0.2, size=PROMPTS), PATTERN[:, None] + of_prompt)
    poisoned = Sample(rng.normal(1, 0.2, size=PROMPTS), 0.5 * PATTERN[:, None] + 0.3 * OTHER[:, None] + of_prompt)
    found = restoration(base, poisoned, base, WEIGHTS, 0)
    assert found.damage_undone.value == pytest.approx(1.0)


def test_two_models_with_one_mechanism_are_told_apart_no_more_often_than_chance():
    undefined = 0
    for seed in range(100):
        first, second = (sample(3.0 - both, PATTERN, 0.5, seed=2 * seed + both) for both in (0, 1))
        undefined += restoration(first, second, first, WEIGHTS, seed).damage_undone.value is None
    assert undefined >= 93
