import numpy as np
import pytest

from neuroplast.components import Node
from neuroplast.localisation import is_localised
from neuroplast.plasticity.amplification import growth_share, growth_test
from neuroplast.statistics import bootstrap_weights

LAYERS, HEADS, PROMPTS = 6, 8, 32
CIRCUIT = (Node("head", 2, 1, "end"), Node("head", 4, 0, "end"), Node("head", 4, 7, "end"))
WEIGHTS = bootstrap_weights(PROMPTS, 0, 300)
MEANS = {(2, 1): -1.0, (4, 0): -0.8, (4, 7): 0.5}


def effects(means: dict[tuple[int, int], float], noise: float = 0.01, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).normal(0, noise, size=(LAYERS, HEADS, PROMPTS))
    for place, mean in means.items():
        found[place] += mean
    return found


def judged(after: np.ndarray, before: np.ndarray | None = None):
    before = effects(MEANS) if before is None else before
    share = growth_share(before, after, CIRCUIT, WEIGHTS)
    return share, growth_test(before, after, CIRCUIT, share, 400, 0)


def test_a_circuit_whose_heads_all_do_more_of_what_they_did_is_amplified():
    share, test = judged(effects({place: 3 * mean for place, mean in MEANS.items()}, seed=1))
    assert share.value == pytest.approx(1.0, abs=0.1) and is_localised(share, test) is True


def test_heads_that_come_anew_take_from_the_share():
    new = {(1, 1): -2.0, (3, 3): -1.5, (5, 5): -1.1}
    share, test = judged(effects({**MEANS, **new}, seed=1))
    assert share.value < 0.1 and is_localised(share, test) is False


def test_heads_that_turn_round_count_against_it():
    share, _ = judged(effects({place: -mean for place, mean in MEANS.items()}, seed=1))
    assert share.value == pytest.approx(-1.0, abs=0.1)


def test_half_old_and_half_new_is_a_half_with_an_interval_around_it():
    after = effects({**MEANS, (2, 1): -2.0, (0, 0): -1.0}, noise=0.001, seed=1)
    share, _ = judged(after, effects(MEANS, noise=0.001))
    assert share.value == pytest.approx(0.5, abs=0.02) and share.ci95[0] < share.value < share.ci95[1]


def test_noise_alone_is_no_amplification():
    found = [
        judged(effects(MEANS, noise=0.3, seed=seed), effects(MEANS, noise=0.3, seed=99 + seed)) for seed in range(50)
    ]
    assert not any(is_localised(*each) for each in found)


def test_without_heads_there_is_no_share():
    share = growth_share(effects(MEANS), effects(MEANS), (), WEIGHTS)
    assert share.value is None and "acts on the logits" in share.why
