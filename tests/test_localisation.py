from collections import Counter

import numpy as np
import pytest

from neuroplast.components import Node
from neuroplast.localisation import area_under, draw_matched, effective_number, gini, is_localised, matched_test
from neuroplast.statistics import Estimate


def heads(*places: tuple[int, int], at: str | None = "end") -> list[Node]:
    return [Node("head", layer, head, at) for layer, head in places]


def test_concentration_of_known_values():
    assert gini([3, 3, 3, 3]) == pytest.approx(0)
    assert gini([0, 0, 0, -5]) == pytest.approx(3 / 4)
    assert gini([1, 2, 3]) == pytest.approx(2 / 9)
    assert effective_number([3, -3, 3, 3]) == pytest.approx(4)
    assert effective_number([0, 0, 7]) == pytest.approx(1)
    assert gini([0, 0]) is None and effective_number([0.0]) is None and gini([]) is None


def test_random_sets_match_layers_and_positions_and_may_hold_the_circuit():
    circuit = [*heads((0, 1), (0, 2), (3, 5)), *heads((3, 5), at="s2")]
    draws = draw_matched(circuit, 9, 500, seed=0)
    wanted = Counter((node.layer, node.position) for node in circuit)
    assert all(Counter((node.layer, node.position) for node in draw) == wanted for draw in draws)
    assert all(len(set(draw)) == len(draw) for draw in draws)
    assert sum(circuit[0] in draw for draw in draws) == pytest.approx(500 * 2 / 9, rel=0.3)
    assert draw_matched(circuit, 9, 500, seed=0) == draws != draw_matched(circuit, 9, 500, seed=1)


def test_a_circuit_that_fills_its_layers_has_no_random_sets():
    full = heads(*((0, head) for head in range(4)))
    assert draw_matched(full, 4, 100, seed=0) == [] == draw_matched([], 4, 100, seed=0)
    test = matched_test(0.5, np.empty(0))
    assert test.p is None and test.beaten is None and "too few others" in test.why
    few = matched_test(0.5, np.zeros(18))
    assert few.p is not None and few.beaten is None and "it takes 19" in few.why


def test_chance_alone_beats_the_null_in_one_of_twenty():
    rng = np.random.default_rng(0)
    worth = rng.exponential(size=(6, 8))
    beaten = 0
    for trial in range(400):
        circuit = draw_matched(heads((0, 0), (2, 0), (2, 1), (5, 0)), 8, 1, seed=1000 + trial)[0]
        draws = draw_matched(circuit, 8, 199, seed=trial)
        shares = [sum(worth[node.layer, node.head] for node in draw) for draw in [circuit, *draws]]
        beaten += bool(matched_test(shares[0], np.array(shares[1:])).beaten)
    assert 0.02 <= beaten / 400 <= 0.08


def test_what_is_really_localised_beats_it_and_counts_itself():
    worth = np.full((4, 8), 0.01)
    worth[2, :3] = 1.0
    circuit = heads((2, 0), (2, 1), (2, 2))
    shares = [float(sum(worth[node.layer, node.head] for node in draw)) for draw in draw_matched(circuit, 8, 999, 0)]
    test = matched_test(3.0, np.array(shares))
    # One of the 56 possible sets is the circuit itself.
    assert test.beaten and test.p == pytest.approx(1 / 56, rel=0.5)
    # Hypergeometric: (3 - 9/8) / sqrt(3 * 3/8 * 5/8 * 5/7), but for the small worth of the others.
    assert test.effect_size == pytest.approx(2.65, abs=0.15)


def test_the_area_under_a_curve_is_its_mean_height():
    assert area_under([1, 2, 4], [1.0, 1.0, 1.0]) == pytest.approx(3.5 / 4)
    assert area_under([2, 4], [0.5, 1.0]) == pytest.approx(0.5)


def test_localised_is_most_of_it_and_more_than_chance():
    beaten, not_beaten = matched_test(0.6, np.zeros(99)), matched_test(0.6, np.ones(99))
    assert is_localised(Estimate(0.6, (0.55, 0.65)), beaten) is True
    assert is_localised(Estimate(0.06, (0.05, 0.07)), beaten) is False
    assert is_localised(Estimate(0.6, (0.55, 0.65)), not_beaten) is False
    assert is_localised(Estimate(0.6, (0.45, 0.75)), beaten) is None
    assert is_localised(Estimate(None, None, "undefined"), beaten) is None
    assert is_localised(Estimate(0.6, (0.55, 0.65)), matched_test(0.6, np.empty(0))) is None
