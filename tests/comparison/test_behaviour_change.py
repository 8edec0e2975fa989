from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoints import changed
from neuroplast.comparison.behaviour_change import behaviour_change, run_drift
from neuroplast.comparison.mechanism import build_mechanism, distance_between
from neuroplast.comparison.verdict import judge, status_of
from neuroplast.components import Node
from neuroplast.interventions.effects import Effects
from neuroplast.models.between import Between
from neuroplast.models.network import Network
from neuroplast.statistics import bootstrap_weights
from neuroplast.storage import Parts

N = 40


def effects(pattern: list[float], difference: float, seed: int = 0) -> Effects:
    """Head effects around a pattern, the same noise for the same seed."""
    noise = torch.randn(len(pattern), N, generator=torch.Generator().manual_seed(seed))
    heads = tuple((Node("head", 0, head),) for head in range(len(pattern)))
    ld = torch.full((N,), difference)
    return Effects("path", heads, (), torch.tensor(pattern)[:, None] + 0.05 * noise, ld, ld)


def verdict(before, after, change: float, drift=(0.0,) * 19, distances=(0.001,) * 19):
    start = 3 + torch.randn(N, generator=torch.Generator().manual_seed(1))
    found = behaviour_change(start, start + change, float(start.mean()) + np.array(drift))
    mechanism = build_mechanism(effects(before, 3.0), effects(after, 3.0 + change), bootstrap_weights(N, 0))
    distance = distance_between(effects(before, 3.0), effects(after, 3.0 + change))
    mechanism = replace(mechanism, distance=distance, drift=np.array(distances))
    return judge(found, mechanism).label, found, mechanism


PATTERN = [-2.0, -1.0, 1.5, 0.0, 0.3]


@pytest.mark.parametrize(
    ("after", "change", "label"),
    [
        ([2.0, 1.0, -1.5, 0.0, 0.3], -6.0, "corrupted"),
        ([-1.0, -0.5, 0.75, 0.0, 0.15], -1.0, "weakened"),
        ([-4.0, -2.0, 3.0, 0.0, 0.6], 2.0, "amplified"),
        ([-0.5, 0.2, 0.5, 3.0, 1.3], 2.0, "rewired"),
        (PATTERN, 0.0, "drift"),
        (PATTERN, -0.1, "minor"),
        ([-value for value in PATTERN], -0.1, "minor"),
        ([-4.0, -2.0, 3.0, 0.0, 0.6], 0.1, "minor"),
    ],
)
def test_each_kind_of_change_is_called_by_its_name(after: list[float], change: float, label: str):
    assert verdict(PATTERN, after, change)[0] == label


def test_a_change_that_drift_explains_is_drift():
    wide = np.linspace(-8, 8, 19)
    label, found, _ = verdict(PATTERN, [-value for value in PATTERN], -6.0, drift=wide)
    assert label == "drift" and found.p_fall > 0.05
    assert verdict(PATTERN, [-value for value in PATTERN], -6.0, drift=wide / 2)[0] == "corrupted"


def test_with_too_few_twins_nothing_is_told():
    label, found, _ = verdict(PATTERN, [-value for value in PATTERN], -6.0, drift=())
    assert label == "undecided" and found.p_fall is None and not found.is_beyond_drift(-1)
    label, found, _ = verdict(PATTERN, [-value for value in PATTERN], -6.0, drift=(0.0,) * 18)
    assert label == "undecided" and found.p_fall == pytest.approx(1 / 19)


def test_flips_and_gain_are_those_that_were_made():
    _, found, mechanism = verdict(PATTERN, [2.0, -1.0, 1.5, 0.0, -0.3], -4.0)
    assert [flip.name for flip in mechanism.flips] == ["a0.h0", "a0.h4"]
    flip = mechanism.flips[0]
    assert flip.start.value == pytest.approx(-2, abs=0.1) and flip.end.value == pytest.approx(2, abs=0.1)
    doubled = verdict(PATTERN, [2 * value for value in PATTERN], 3.0)[2]
    assert doubled.gain.value == pytest.approx(2, abs=0.1) and doubled.similarity.value > 0.99
    assert found.start_accuracy.value > found.end_accuracy.value


def test_what_is_left_of_a_task_says_whether_it_was_spared():
    start = torch.randn(N, generator=torch.Generator().manual_seed(2))

    def status(before: torch.Tensor, after: torch.Tensor) -> str:
        return status_of(behaviour_change(before, after, np.zeros(0)).kept)

    assert status(start, start - 5) == "undefined", "the start does not do it"
    assert status(start + 4, start + 1) == "damaged"
    assert status(start + 4, start + 3.9) == "spared"
    assert status(start + 4, start + 9) == "improved"
    noisy = 4 + 3 * torch.randn(N, generator=torch.Generator().manual_seed(3))
    assert status(start + 4, noisy - 0.4) == "uncertain"


def test_a_start_that_cannot_do_the_task_is_undecided():
    start = torch.randn(N, generator=torch.Generator().manual_seed(2))
    found = behaviour_change(start, start - 5, np.zeros(19))
    mechanism = build_mechanism(effects(PATTERN, 3.0), effects(PATTERN, 3.0), bootstrap_weights(N, 0))
    assert judge(found, mechanism).label == "undecided"


def test_a_wreck_that_random_weights_would_be_too_is_drift_and_its_task_damaged():
    wide = np.linspace(-8, 0, 19)
    label, found, _ = verdict(PATTERN, [-value for value in PATTERN], -2.0, drift=wide)
    assert label == "drift" and status_of(found.kept) == "damaged"


def test_effects_that_are_the_same_for_all_heads_have_no_distance():
    nothing = Effects(**vars(effects(PATTERN, 3.0)) | {"effects": torch.zeros(len(PATTERN), N)})
    assert np.isnan(distance_between(effects(PATTERN, 3.0), nothing))
    mechanism = build_mechanism(effects(PATTERN, 3.0), nothing, bootstrap_weights(N, 0))
    mechanism = replace(mechanism, distance=None, drift=np.zeros(19))
    assert mechanism.p is None and mechanism.is_beyond_drift is None


def test_twins_go_as_far_in_every_weight_and_each_another_way(network: Network, family: str):
    between = Between(network, changed(family))
    before = {name: weight.detach() for name, weight in network.module.named_parameters()}
    after = dict(changed(family).module.named_parameters())
    twins = []
    for twin in (3, 4, 3):
        between.drift(0, twin)
        moved = {name: weight.detach() - before[name] for name, weight in between.model.module.named_parameters()}
        for name, each in moved.items():
            torch.testing.assert_close(each.norm(), (after[name] - before[name]).detach().norm(), rtol=1e-4, atol=1e-6)
        twins.append(torch.cat([each.flatten() for each in moved.values()]))
    assert torch.equal(twins[0], twins[2])
    cosine = torch.cosine_similarity(twins[0], twins[1], dim=0)
    assert abs(float(cosine)) < 0.05


def test_weights_that_did_not_change_do_not_drift(network: Network, family: str):
    between = Between(network, network)
    between.drift(0, 0)
    for mine, theirs in zip(between.model.module.parameters(), network.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_interrupted_null_goes_on_where_it_stopped(network: Network, family: str, tmp_path):
    between, seen = Between(network, changed(family)), []

    def measure(model: Network) -> float:
        if len(seen) == 2:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(model)
        return float(next(model.module.parameters()).sum())

    with pytest.raises(KeyboardInterrupt):
        run_drift(between, {"sum": measure}, 4, 0, parts=Parts(tmp_path))
    found = run_drift(between, {"sum": measure}, 4, 0, parts=Parts(tmp_path))
    assert len(seen) == 5, "two twins were kept"
    whole = run_drift(between, {"sum": measure}, 4, 0, parts=Parts())
    np.testing.assert_array_equal(found["sum"], whole["sum"])
