import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from handbuilt import MODELS
from neuroplast.circuits import edge_criteria
from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.edge_criteria import FRACTIONS, edge_curve, edge_faithfulness, random_edge_curve
from neuroplast.circuits.edge_discovery import build_edge_circuit, discover_edges, select_edges
from neuroplast.circuits.shape import shape_of
from neuroplast.components import parse_edge, parse_node
from neuroplast.errors import InputError
from neuroplast.interventions.edge_knockout import run_edge_circuits
from neuroplast.interventions.edges import build_edge_graph
from neuroplast.models.network import Network
from neuroplast.statistics import bootstrap_weights
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

built = cache(lambda name: MODELS[name]())
NEEDED = ["input->a0.h1<v>", "input->a2.h2<q>", "input->a2.h2<v>", "a0.h1->a2.h2<k>", "a2.h2->logits"]
"""All edges that do something in the induction model built by hand."""


@pytest.fixture
def apart(network: Network, named_prompts: PromptSet) -> PromptSet:
    """Three prompts with answer and foil such that the counterfactual lowers LD."""
    graph = build_edge_graph(network)
    none, whole = run_edge_circuits(network, named_prompts, [torch.zeros_like(graph.exists), graph.exists])
    answer = torch.where(none < whole, named_prompts.answer, named_prompts.foil)
    foil = torch.where(none < whole, named_prompts.foil, named_prompts.answer)
    return replace(named_prompts, answer=answer, foil=foil).pick(torch.tensor([1, 2, 3]))


def scored(network: Network, scores: torch.Tensor) -> Circuit:
    """A circuit of no edges, all of them scored."""
    graph = build_edge_graph(network)
    return build_edge_circuit(shape_of(network), graph, torch.zeros_like(graph.exists), scores, graph.exists, {})


def random_circuit(network: Network, seed: int = 1) -> Circuit:
    graph = build_edge_graph(network)
    generator = torch.Generator().manual_seed(seed)
    return scored(network, torch.randn(graph.exists.shape, generator=generator) * graph.exists)


def known_circuit(network: Network, first: bool) -> Circuit:
    """The edges that are needed, ranked first or last."""
    graph = build_edge_graph(network)
    needed = graph.mask(map(parse_edge, NEEDED))
    return scored(network, torch.where(needed == first, 2.0, 1.0) * graph.exists)


def test_the_chosen_edges_are_judged_whatever_their_scores(network: Network, apart: PromptSet):
    graph = build_edge_graph(network)
    chosen = graph.exists & (torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(3)) < 0.7)
    none, whole, inside = run_edge_circuits(network, apart, [torch.zeros_like(chosen), graph.exists, chosen])
    circuit = build_edge_circuit(shape_of(network), graph, chosen, torch.zeros(chosen.shape), graph.exists, {})
    found = edge_faithfulness(network, circuit, apart, resamples=100)
    assert found.value == pytest.approx(float((inside - none).mean() / (whole - none).mean()), abs=1e-4)
    assert edge_faithfulness(network, Circuit(circuit.shape, {}), apart).value is None


@pytest.mark.parametrize("select", ["top-n", "greedy"])
def test_f_is_a_ratio_of_means_and_areas_are_trapezoids(network: Network, apart: PromptSet, select: str):
    circuit, graph = random_circuit(network), build_edge_graph(network)
    fractions = (0.05, 0.4, 0.7, 0.9, 1.0)
    curve = edge_curve(network, circuit, apart, select=select, fractions=fractions)
    scores = torch.zeros(graph.exists.shape)
    scores[graph.places(circuit.outside)] = torch.tensor(list(circuit.outside.values()))
    total = int(graph.exists.sum())
    masks = [select_edges(graph, scores, graph.exists, select, n=int(each * total)) for each in fractions]
    none, *values, whole = run_edge_circuits(
        network, apart, [torch.zeros_like(graph.exists), *masks, graph.exists]
    ).mean(dim=1)
    expected = [float((value - none) / (whole - none)) for value in values]
    assert [point.value for point in curve.faithfulness] == pytest.approx(expected, abs=1e-4)
    assert curve.n_edges == tuple(int(each * total) for each in fractions) and curve.n_total == curve.n_scored == total
    assert curve.n_connected == tuple(int(graph.live(mask).sum()) for mask in masks)
    assert curve.cpr.value == pytest.approx(np.trapezoid(expected, fractions), abs=1e-4)
    assert curve.cmd.value == pytest.approx(np.trapezoid(np.abs(1 - np.array(expected)), fractions), abs=1e-4)
    assert curve.faithfulness[-1].value == pytest.approx(1, abs=1e-6)
    assert curve.model.value == pytest.approx(float(whole), abs=1e-5)
    assert curve.nothing.value == pytest.approx(float(none), abs=1e-5)
    low, high = curve.cpr.ci95
    assert low < curve.cpr.value < high


def test_a_ranking_that_has_the_circuit_first_explains_all_at_once():
    model = built("induction")
    prompts = model.prompts(12, 0)
    # 5 of 262 edges are needed: 2 % of them are 5.
    best = edge_curve(model.network, known_circuit(model.network, True), prompts)
    assert best.fractions == FRACTIONS and best.n_edges[:5] == (0, 0, 1, 2, 5)
    values = [point.value for point in best.faithfulness]
    assert values[:3] == pytest.approx([0] * 3, abs=1e-5) and values[4:] == pytest.approx([1] * 6, abs=1e-3)
    assert best.cpr.value > 0.98 and best.cmd.value < 0.02
    worst = edge_curve(model.network, known_circuit(model.network, False), prompts)
    assert worst.cmd.value == pytest.approx(0.75, abs=0.01) and worst.cpr.value == pytest.approx(0.25, abs=0.01)


def test_random_rankings_are_the_mean_of_their_curves(network: Network, apart: PromptSet):
    fractions = (0.5, 0.9, 1.0)
    three = random_edge_curve(network, apart, rankings=3, fractions=fractions, seed=4)
    again = random_edge_curve(network, apart, rankings=3, fractions=fractions, seed=4)
    other = random_edge_curve(network, apart, rankings=3, fractions=fractions, seed=5)
    one = random_edge_curve(network, apart, rankings=1, fractions=fractions, seed=4)
    assert three == again and three.cmd != other.cmd and (three.rankings, three.rank) == (3, "random")
    assert three.faithfulness[-1].value == pytest.approx(1, abs=1e-6)
    # The first ranking is among the three.
    graph = build_edge_graph(network)
    generator = torch.Generator().manual_seed(4)
    alone = []
    for _ in range(3):
        drawn = torch.rand(graph.exists.shape, generator=generator)
        curve = edge_curve(network, scored(network, drawn), apart, fractions=fractions)
        alone.append((curve.faithfulness[0].value, curve.cpr.value, curve.cmd.value))
    means = np.mean(alone, axis=0)
    assert (three.faithfulness[0].value, three.cpr.value, three.cmd.value) == pytest.approx(means, abs=1e-5)
    assert (one.faithfulness[0].value, one.cpr.value, one.cmd.value) == pytest.approx(alone[0], abs=1e-5)


def test_random_rankings_of_the_known_model_explain_nothing_until_nearly_all_edges_are_in():
    model = built("induction")
    found = random_edge_curve(model.network, model.prompts(12, 0), rankings=4)
    assert all(abs(point.value) < 0.05 for point in found.faithfulness[:7])
    assert 0.5 < found.cmd.value < 0.8


def test_ranked_by_what_helps_the_most_negative_score_comes_first(network: Network, apart: PromptSet):
    graph = build_edge_graph(network)
    circuit = random_circuit(network)
    curve = edge_curve(network, circuit, apart, rank="helping", fractions=(0.3, 0.8))
    order = sorted(circuit.outside, key=lambda edge: circuit.outside[edge])
    masks = [graph.mask(order[:n]) for n in curve.n_edges]
    none, *values, whole = run_edge_circuits(
        network, apart, [torch.zeros_like(graph.exists), *masks, graph.exists]
    ).mean(dim=1)
    expected = [float((value - none) / (whole - none)) for value in values]
    assert [point.value for point in curve.faithfulness] == pytest.approx(expected, abs=1e-4)
    assert curve.rank == "helping"


def test_a_ranking_of_some_edges_ends_where_they_do(network: Network, apart: PromptSet):
    full = random_circuit(network)
    part = replace(full, outside=dict(list(full.outside.items())[:70]))
    curve = edge_curve(network, part, apart, fractions=(0.1, 0.2, 0.5, 1.0))
    assert curve.n_scored == 70
    values = [point.value for point in curve.faithfulness]
    assert None not in values[:2] and values[2:] == [None, None]
    assert curve.faithfulness[2].why == f"it has {curve.n_edges[2]} edges, and only 70 are ranked"
    assert curve.cpr.value is None and curve.cmd.value is None and curve.model.value is not None
    assert curve.why == curve.cpr.why and curve.why.startswith(f"only 70 of {curve.n_total} edges are ranked")
    assert curve.n_connected[2:] == (None, None)


def test_a_circuit_without_scored_edges_is_not_even_run(network: Network, named_prompts: PromptSet, monkeypatch):
    monkeypatch.setattr(edge_criteria, "run_edge_circuits", None)
    monkeypatch.setattr(edge_criteria, "build_edge_graph", None)
    nodes = {parse_node("a1.h1@end"): -1.0}
    at_positions = {parse_edge("a0.h1@a->a1.h1<q>@a"): -1.0, parse_edge("m0->m1"): None}
    curve = edge_curve(network, Circuit(shape_of(network), nodes, at_positions), named_prompts)
    assert curve.n_scored == 0 and "only 0 of" in curve.why
    assert {curve.cpr.value, curve.model.value, *(point.value for point in curve.faithfulness)} == {None}
    assert curve.n_total == shape_of(network).n_edges and set(curve.n_connected) == {None}
    document = json.loads(json.dumps(curve.document(), allow_nan=False))
    assert document["cmd"] == {"value": None, "ci95": None, "why": curve.why}


def test_a_few_ranked_edges_below_the_smallest_circuit_are_not_run_either(network: Network, apart, monkeypatch):
    monkeypatch.setattr(edge_criteria, "build_edge_graph", None)
    few = {parse_edge("m0->logits"): -1.0, parse_edge("a0.h1->m1"): 0.5}
    curve = edge_curve(network, Circuit(shape_of(network), {}, few), apart, fractions=(0.0, 0.05, 1.0))
    assert curve.n_edges[1] > curve.n_scored == 2 and curve.why.startswith("only 2 of")


def test_where_the_counterfactual_takes_nothing_away_it_is_undefined(network: Network, named_prompts: PromptSet):
    same = replace(named_prompts, counterfactual=named_prompts.clean)
    curve = edge_curve(network, random_circuit(network), same, fractions=(0.1, 1.0))
    assert "not apart from 0: the counterfactuals take nothing away" in curve.why
    assert {curve.cpr.value, curve.cmd.value, *(point.value for point in curve.faithfulness)} == {None}
    assert curve.model.value == pytest.approx(curve.nothing.value, abs=1e-5)
    json.dumps(curve.document(), allow_nan=False)


def test_a_resample_of_prompts_that_nothing_changes_leaves_the_curve_json(network: Network, apart: PromptSet):
    # One prompt in two has itself as its counterfactual: some resamples have none but these.
    some = apart.pick(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    changed = torch.arange(8)[:, None] < 4
    prompts = replace(some, counterfactual=torch.where(changed, some.counterfactual, some.clean))
    weights = bootstrap_weights(8, 0)
    assert (weights[:, :4].sum(axis=1) == 0).any()
    curve = edge_curve(network, random_circuit(network), prompts, fractions=(0.5, 0.9, 1.0))
    assert curve.cpr.value is not None and all(np.isfinite(curve.cpr.ci95))
    json.dumps(curve.document(), allow_nan=False)


def test_a_curve_is_json_and_is_not_measured_twice(network: Network, apart, tmp_path: Path, monkeypatch):
    circuit = discover_edges(network, apart, method="eap", n=60)
    calls: list[tuple[int, int]] = []
    curve = edge_curve(network, circuit, apart, parts=Parts(tmp_path), progress=lambda *call: calls.append(call))
    assert curve.name == "eap" and calls[-1][0] == calls[-1][1]
    document = json.loads(json.dumps(curve.document(), allow_nan=False))
    assert document["cpr"]["value"] == curve.cpr.value and document["faithfulness"][3]["ci95"][0] <= 1
    monkeypatch.setattr(edge_criteria, "run_edge_circuits", None)
    assert edge_curve(network, circuit, apart, parts=Parts(tmp_path)) == curve


def test_what_cannot_be_measured_is_refused(network: Network, named_prompts: PromptSet):
    circuit = random_circuit(network)
    other = replace(circuit, shape=replace(circuit.shape, n_layers=5))
    for run, message in (
        (lambda: edge_curve(network, other, named_prompts), "does not fit"),
        (lambda: edge_curve(network, circuit, named_prompts, select="threshold"), "unknown selection 'threshold'"),
        (lambda: edge_curve(network, circuit, named_prompts, rank="up"), "unknown rank 'up'"),
        (lambda: edge_curve(network, circuit, named_prompts, fractions=(0.5, 0.1)), "at least two ascending shares"),
        (lambda: edge_curve(network, circuit, named_prompts, fractions=(0.5, 1.1)), "at least two ascending shares"),
        (lambda: random_edge_curve(network, named_prompts, rankings=0), "rankings must be a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            run()
