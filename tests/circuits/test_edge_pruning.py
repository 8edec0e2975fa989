from dataclasses import replace
from pathlib import Path

import pytest
import torch

from handbuilt import MODELS
from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits import edge_discovery, edge_pruning
from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.edge_discovery import discover_edges
from neuroplast.circuits.edge_pruning import prune_edges
from neuroplast.components import Edge, parse_edge
from neuroplast.errors import InputError, NothingFoundError
from neuroplast.interventions.edge_knockout import run_edge_circuits
from neuroplast.interventions.edges import build_edge_graph
from neuroplast.models.network import Network
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet


def one_by_one(network: Network, prompts: PromptSet, circuit: Circuit, tau: float) -> tuple[set[Edge], float]:
    """ACDC, literally: an edge at a time, each circuit run anew; and how near a decision came to the threshold."""
    graph = build_edge_graph(network)
    kept = graph.live(graph.mask(circuit.edges))
    (clean,) = run_edge_circuits(network, prompts, [graph.exists]).mean(dim=1).tolist()
    least, nearest = tau * abs(clean), 1.0
    for column in reversed(range(len(graph.destinations))):
        into = [edge for edge in circuit.edges if edge.destination == graph.destinations[column]]
        for edge in sorted(into, key=lambda edge: abs(circuit.edges[edge])):
            if not kept[graph.places([edge])]:
                continue
            without = kept & ~graph.mask([edge])
            before, after = run_edge_circuits(network, prompts, [kept, without]).mean(dim=1).tolist()
            nearest = min(nearest, abs(abs(after - before) - least) / least)
            if abs(after - before) < least:
                kept = without
        kept = graph.live(kept)
    return set(graph.edges(kept)), nearest


@pytest.mark.parametrize("tau", [0.04, 0.15])
def test_pruning_decides_as_one_edge_at_a_time_does(network: Network, named_prompts: PromptSet, tau: float):
    prompts = named_prompts.pick(torch.tensor([3, 3, 3]))
    circuit = discover_edges(network, prompts, method="eap", n=40)
    expected, nearest = one_by_one(network, prompts, circuit, tau)
    assert nearest > 1e-3, "a decision is too close to call"
    assert 0 < len(expected) < len(circuit.edges)
    calls: list[tuple[str, int, int]] = []
    pruned = prune_edges(network, prompts, circuit, tau, progress=lambda *call: calls.append(call))
    assert set(pruned.edges) == expected
    assert all(pruned.edges[edge] == circuit.edges[edge] for edge in expected)
    gone = set(circuit.edges) - expected
    assert set(pruned.outside) == set(circuit.outside) | gone
    assert pruned.provenance["pruning"]["n_edges"] == {"before": len(circuit.edges), "after": len(expected)}
    rows = [row for row in pruned.provenance["steps"] if "fell with them" in row]
    assert sum(row["removed"] + row["fell with them"] for row in rows) == len(gone)
    assert {edge.source for edge in expected} <= set(pruned.nodes) <= set(circuit.nodes)
    assert calls[-1][1] == calls[-1][2] and calls == sorted(calls)


def test_pruning_all_edges_of_a_model_built_by_hand_leaves_its_circuit():
    model = MODELS["induction"]()
    prompts = model.prompts(12, 0)
    whole = discover_edges(model.network, prompts, method="eap", n=model.network.n_layers * 80)
    assert len(whole.edges) > 200
    pruned = prune_edges(model.network, prompts, whole, 0.1)
    names = ["input->a0.h1<v>", "input->a2.h2<q>", "input->a2.h2<v>", "a0.h1->a2.h2<k>", "a2.h2->logits"]
    assert set(pruned.edges) == set(map(parse_edge, names))
    alone = discover_edges(model.network, prompts, method="eap", n=240, prune=0.1)
    assert alone.edges == pruned.edges and alone.provenance == pruned.provenance


def test_a_circuit_that_cannot_be_pruned_is_refused(network: Network, named_prompts: PromptSet):
    prompts = named_prompts.pick(torch.tensor([0]))
    circuit = discover_edges(network, prompts, method="eap", n=20)
    for wrong, message in (
        (replace(circuit, shape=replace(circuit.shape, n_layers=4)), "does not fit .*: layers 4 and 3"),
        (replace(circuit, edges={}), "no edges to prune"),
        (replace(circuit, edges={parse_edge("a0.h1@end->a2.h0<q>@end"): 1.0}), "stands at a position"),
    ):
        with pytest.raises(InputError, match=message):
            prune_edges(network, prompts, wrong, 0.1)
    with pytest.raises(InputError, match=r"tau must be a positive number, .* got nan"):
        prune_edges(network, prompts, circuit, float("nan"))
    with pytest.raises(NothingFoundError, match=r"nothing is left: no edge changes LD by 1e\+03 of it"):
        prune_edges(network, prompts, circuit, 1000.0)


def test_an_interrupted_discovery_goes_on(network: Network, named_prompts, tmp_path: Path, monkeypatch):
    prompts = named_prompts.pick(torch.tensor([3, 3, 3]))
    settings = {"method": "eap", "n": 60, "prune": 0.1}
    whole = discover_edges(network, prompts, **settings)
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        discover_edges(network, prompts, **settings, parts=Parts(tmp_path), say=say)
    assert told[1].startswith("logits: ") and told[2].startswith("layer ")
    decided: list[int] = []
    real = edge_pruning._prune_destination

    def decide(run, column: int, *rest) -> int:
        decided.append(column)
        return real(run, column, *rest)

    monkeypatch.setattr(edge_discovery, "attribute_edges", None)
    monkeypatch.setattr(edge_pruning, "_prune_destination", decide)
    again = discover_edges(network, prompts, **settings, parts=Parts(tmp_path))
    assert again.edges == whole.edges and again.outside == whole.outside
    graph, done = build_edge_graph(network), int(told[2].split(":")[0].removeprefix("layer "))
    assert decided == list(range(graph.heads_read(done).start - 1, -1, -1))
    for one, other in zip(again.provenance["steps"], whole.provenance["steps"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_shares_of_nothing_are_refused(network: Network, named_prompts: PromptSet):
    # Each prompt a second time with answer and foil exchanged: LD is 0 on average.
    twice = named_prompts.pick(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    answer = torch.cat([named_prompts.answer, named_prompts.foil])
    foil = torch.cat([named_prompts.foil, named_prompts.answer])
    prompts = replace(twice, answer=answer, foil=foil)
    circuit = discover_edges(network, prompts, method="eap", n=100)
    with pytest.raises(NothingFoundError, match="not apart from 0: the model does not do the task"):
        prune_edges(network, prompts, circuit, 0.01)


def test_stability_stays_that_of_the_circuit_before(network: Network, named_prompts: PromptSet):
    right = measure_behaviour(network, named_prompts).logit_diff > 0
    answer = torch.where(right, named_prompts.answer, named_prompts.foil)
    foil = torch.where(right, named_prompts.foil, named_prompts.answer)
    prompts = replace(named_prompts, answer=answer, foil=foil).pick(torch.tensor([1, 2, 3]))
    circuit = discover_edges(network, prompts, method="eap", n=40)
    before = circuit.provenance["stability"]
    after = prune_edges(network, prompts, circuit, 0.04).provenance["stability"]
    assert before["edges_jaccard"]["mean"] < 1 and "of" not in before
    assert after == {**before, "of": "the circuit before pruning"}
    bare = replace(circuit, provenance={})
    assert "stability" not in prune_edges(network, prompts, bare, 0.04).provenance
