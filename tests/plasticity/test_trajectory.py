"""What is measured along a training is what each measurement gives by itself; the steps are where they should be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neuroplast as npl
from neuroplast.circuits.circuit import Circuit, Role
from neuroplast.circuits.copying import copy_shares
from neuroplast.circuits.head_measures import measure_on_task
from neuroplast.circuits.roles import INHIBITION, MOVER, NEGATIVE, UNCLASSIFIED
from neuroplast.circuits.shape import shape_of
from neuroplast.components import Node
from neuroplast.errors import StorageError
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.plasticity.trajectory import TrajectoryFolder, build_schedule, classes_of, measure_point

MOVERS = (Node("head", 3, 1, "end"), Node("head", 3, 2, "end"))
AGAINST = (Node("head", 2, 0, "end"),)
INHIBITORS = (Node("head", 1, 3, "end"),)
ROLES = {**dict.fromkeys(MOVERS, MOVER), **dict.fromkeys(AGAINST, NEGATIVE), **dict.fromkeys(INHIBITORS, INHIBITION)}
NO_ROLE = Node("head", 0, 0, "s2")


@pytest.fixture(scope="module")
def model() -> Network:
    return npl.load_model("tiny")


@pytest.fixture(scope="module")
def prompts(model: Network):
    return npl.tasks.ioi.prompts(model, n=6, seed=3)


@pytest.fixture(scope="module")
def circuit(model: Network, prompts) -> Circuit:
    roles = {node: Role(name, "", {}) for node, name in ROLES.items()} | {NO_ROLE: Role(UNCLASSIFIED, "", {})}
    nodes = dict.fromkeys((*ROLES, NO_ROLE))
    return Circuit(shape_of(model), nodes, {}, {}, roles, tuple(prompts.positions))


@pytest.fixture(scope="module")
def point(model: Network, prompts, circuit: Circuit):
    return measure_point(model, prompts, circuit)


def test_what_has_a_role_is_followed_and_what_has_none_is_not(circuit: Circuit):
    assert classes_of(circuit) == {MOVER: MOVERS, NEGATIVE: AGAINST, INHIBITION: INHIBITORS}


def test_effects_and_the_circuit_alone_are_those_of_the_interventions(model, prompts, circuit, point):
    assert torch.equal(point["effects"], path_patch(model, prompts).by_head())
    ablation = build_ablation(model, prompts, "counterfactual")
    (alone,) = run_knockouts(model, prompts, [circuit.heads], ablation, keep=True)
    assert torch.equal(point["circuit"], alone)


def test_total_is_what_is_lost_when_all_heads_of_a_role_are_patched_at_once(model, prompts, point):
    found = activation_patch(model, prompts, sites=[list(MOVERS)])
    assert torch.allclose(point[f"total/{MOVER}"], -found.effects[0], atol=1e-5)
    alone = activation_patch(model, prompts, sites=list(MOVERS)).effects.sum(dim=0)
    assert not torch.allclose(found.effects[0], alone, atol=1e-3)  # else the claim above would say nothing


def test_attention_is_that_to_what_the_role_is_defined_by(model, prompts, point):
    measured = measure_on_task(model, prompts, [*MOVERS, *INHIBITORS]).shares
    to_name = np.mean([measured[node]["attention to io"] for node in MOVERS], axis=0)
    np.testing.assert_allclose(point[f"attention/{MOVER}"].numpy(), to_name, atol=1e-6)
    (inhibitor,) = INHIBITORS
    np.testing.assert_allclose(
        point[f"attention/{INHIBITION}"].numpy(), measured[inhibitor]["attention to s2"], atol=1e-6
    )


def test_heads_that_hinder_are_asked_how_they_copy_negatively(model, prompts, point):
    copied = copy_shares(model, prompts, [*MOVERS, *AGAINST])
    assert torch.allclose(point[f"copying/{MOVER}"], copied[0, :2].mean(dim=0).float())
    assert torch.allclose(point[f"copying/{NEGATIVE}"], copied[1, 2].float())
    assert f"copying/{INHIBITION}" not in point


def test_without_a_circuit_there_are_behaviour_and_effects_alone(model, prompts):
    assert set(measure_point(model, prompts, None)) == {"effects", "logit_diff"}


def test_a_trajectory_read_back_has_every_step_and_sums_the_direct_effects(model, prompts, circuit, point, tmp_path):
    folder = TrajectoryFolder(tmp_path / "trajectory")
    for step in (0, 3):
        folder.visit(step, lambda: point)
    folder.visit(3, lambda: pytest.fail("what was measured is not measured again"))
    found = folder.load((0, 3))
    assert found.steps.tolist() == [0, 3]
    heads = found.effects[:, [node.layer for node in MOVERS], [node.head for node in MOVERS]]
    np.testing.assert_allclose(found.direct(MOVERS), -heads.sum(axis=1))
    assert set(found.by_role) == {
        *(("total", name) for name in (MOVER, NEGATIVE, INHIBITION)),
        *(("attention", name) for name in (MOVER, NEGATIVE, INHIBITION)),
        *(("copying", name) for name in (MOVER, NEGATIVE)),
    }
    with pytest.raises(StorageError, match="is missing"):
        folder.load((0, 3, 4))


@given(st.integers(1, 5000), st.integers(2, 40))
def test_a_schedule_rises_from_0_to_the_last_step_dense_early(steps: int, points: int):
    found = build_schedule(steps, points)
    assert found[0] == 0 and found[-1] == steps
    gaps = np.diff(found)
    assert (gaps > 0).all() and len(found) == min(points, steps + 1)
    assert (np.diff(gaps[:-1]) >= -1).all()  # gaps grow, but for the rounding
