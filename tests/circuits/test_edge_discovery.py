import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from handbuilt import MODELS, HandBuilt
from neuroplast.circuits import edge_discovery
from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.edge_discovery import discover_edges, edge_stability, prune_edges, select_edges
from neuroplast.components import Edge, Node, parse_edge
from neuroplast.errors import InputError, NothingFoundError
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.edge_knockout import EdgeGraph, build_edge_graph, run_edge_circuits
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.models.network import Network
from neuroplast.statistics import bootstrap_weights
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

built = cache(lambda name: MODELS[name]())


def edges(*names: str) -> set[Edge]:
    return {parse_edge(name) for name in names}


def known_edges(model: HandBuilt) -> set[Edge]:
    """Those between heads and to the logits, wherever they stand."""
    found = [parse_edge(name) for name in model.edges]
    return {Edge(edge.source.at(None), edge.destination.at(None)) for edge in found}


def random_scores(graph: EdgeGraph, seed: int) -> Tensor:
    return torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed)) * graph.exists


@pytest.fixture
def one_graph(network: Network, family: str) -> EdgeGraph:
    if family not in ("gpt2", "gpt_neox"):
        pytest.skip("the graph is that of another")
    return build_edge_graph(network)


# Choosing.


def test_top_n_takes_the_largest_whatever_their_sign_and_of_equal_ones_the_first(one_graph: EdgeGraph):
    scores = random_scores(one_graph, 1)
    for n in (1, 7, 50, int(one_graph.exists.sum())):
        found = select_edges(one_graph, scores, one_graph.exists, "top-n", n=n)
        assert int(found.sum()) == n and not (found & ~one_graph.exists).any()
        assert scores[found].abs().min() >= scores[one_graph.exists & ~found].abs().amax() if n < 50 else True
    equal = select_edges(one_graph, torch.zeros_like(scores), one_graph.exists, "top-n", n=2)
    assert equal.nonzero().tolist() == one_graph.exists.nonzero()[:2].tolist()


def test_threshold_takes_all_that_are_large_enough(one_graph: EdgeGraph):
    scores = random_scores(one_graph, 2)
    found = select_edges(one_graph, scores, one_graph.exists, "threshold", least=1.5)
    assert 5 < found.sum() < 80
    assert torch.equal(found, one_graph.exists & (scores.abs() >= 1.5))


@pytest.mark.parametrize("seed", range(3))
def test_greedy_always_takes_the_largest_edge_into_what_is_in(one_graph: EdgeGraph, seed: int):
    scores = random_scores(one_graph, seed)
    inside, taken = {Node("logits")}, set[Edge]()
    for n in range(1, 40):
        # Slow and obvious: of all edges that end inside, the largest.
        waiting = [edge for edge in one_graph.edges(one_graph.exists) if edge not in taken]
        waiting = [edge for edge in waiting if replace(edge.destination, channel=None) in inside]
        best = max(waiting, key=lambda edge: float(scores[one_graph.places([edge])].abs()))
        taken.add(best)
        inside.add(best.source)
        if n % 13 == 0:
            found = select_edges(one_graph, scores, one_graph.exists, "greedy", n=n)
            assert set(one_graph.edges(found)) == taken


def test_what_is_not_there_cannot_be_chosen(one_graph: EdgeGraph):
    scores, total = random_scores(one_graph, 1), int(one_graph.exists.sum())
    for select in ("top-n", "greedy"):
        with pytest.raises(InputError, match=f"n is {total + 1}, and only {total} edges are scored: give at most"):
            select_edges(one_graph, scores, one_graph.exists, select, n=total + 1)
    few = one_graph.mask(edges("m0->logits", "input->m0", "a0.h1->a1.h1<q>"))
    with pytest.raises(InputError, match="n is 3, and greedy selection reaches only 2 edges from the logits"):
        select_edges(one_graph, scores, few, "greedy", n=3)


# Discovering.


@pytest.mark.parametrize("select", ["top-n", "greedy"])
def test_a_circuit_has_the_chosen_edges_that_lead_somewhere(network: Network, named_prompts: PromptSet, select: str):
    graph = build_edge_graph(network)
    said: list[str] = []
    circuit = discover_edges(network, named_prompts, method="eap", select=select, n=30, say=said.append)
    scores = attribute_edges(network, named_prompts, method="eap")
    chosen = select_edges(graph, scores.scores, scores.exists, select, n=30)
    assert set(circuit.edges) == set(graph.edges(graph.live(chosen)))
    assert all(score == scores.score(edge) for edge, score in circuit.edges.items())
    assert not set(circuit.edges) & set(circuit.outside)
    assert len(circuit.edges) + len(circuit.outside) == circuit.shape.n_edges == int(graph.exists.sum())
    assert set(circuit.nodes) == {edge.source for edge in circuit.edges} | {
        replace(edge.destination, channel=None) for edge in circuit.edges
    }
    provenance = circuit.provenance
    counts = {"scored": int(graph.exists.sum()), "chosen": 30, "connected": len(circuit.edges)}
    assert provenance["n_edges"] == counts and provenance["select"] == select and provenance["n"] == 30
    assert [row["step"] for row in provenance["steps"]] == ["scores", select, "dangling parts removed"]
    assert provenance["steps"][2]["removed"] == 30 - len(circuit.edges)
    assert f"30 chosen by {select}" in said[0]


def test_without_a_number_a_share_of_the_edges_is_chosen(network: Network, named_prompts: PromptSet, monkeypatch):
    assert edge_discovery.SHARE == 0.01
    monkeypatch.setattr(edge_discovery, "SHARE", 0.2)
    total = int(build_edge_graph(network).exists.sum())
    circuit = discover_edges(network, named_prompts, steps=2)
    assert circuit.provenance["n"] == circuit.provenance["n_edges"]["chosen"] == round(total / 5)
    assert circuit.provenance["gradients"] == 2 and circuit.provenance["method"] == "eap-ig"


def test_exact_scores_are_those_of_patched_edges(network: Network, named_prompts: PromptSet):
    names = ["input->m0", "m0->logits", "m0->a1.h2<k>", "a1.h2->logits", "m1->a2.h0<q>"]
    circuit = discover_edges(
        network, named_prompts, method="exact", candidates=[names[0], *map(parse_edge, names[1:])], n=5
    )
    patched = patch_edges(network, named_prompts, names)
    expected = dict(zip(patched.edges, patched.effects.mean(dim=1).tolist(), strict=True))
    # What leads nowhere is scored, and not in it.
    assert set(circuit.edges) == edges(*names[:4]) and set(circuit.outside) == edges(names[4])
    for edge, score in (*circuit.edges.items(), *circuit.outside.items()):
        assert score == pytest.approx(expected[edge], abs=2e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_exact_scores_find_the_known_edges_of_models_built_by_hand(name: str):
    model = built(name)
    prompts = model.prompts(16, 0)
    circuit = discover_edges(model.network, prompts, method="exact", select="threshold", threshold=0.1)
    between_heads = {edge for edge in circuit.edges if edge.source.kind == "head"}
    backups = {edge for edge in between_heads if str(edge.destination).startswith("a3.h2")}
    assert between_heads - backups == known_edges(model)
    assert not any(node.kind == "mlp" for node in circuit.nodes)
    clean = circuit.provenance["logit_diff"]
    for edge, share in model.edges.items():
        found = parse_edge(edge)
        score = circuit.edges[Edge(found.source.at(None), found.destination.at(None))]
        assert score / clean == pytest.approx(share, abs=0.06)


def test_settings_that_cannot_be_are_refused_before_anything_is_measured(network: Network, named_prompts, monkeypatch):
    monkeypatch.setattr(network, "start", None)
    for settings, message in (
        ({"method": "eapig"}, "unknown method 'eapig': did you mean 'eap-ig'"),
        ({"select": "top"}, "unknown selection 'top'"),
        ({"n": 0}, "n must be a whole number, at least 1, got 0"),
        ({"select": "threshold"}, "needs a threshold, a share"),
        ({"select": "threshold", "threshold": 0.1, "n": 3}, "takes a threshold, not n"),
        ({"threshold": 0.1}, "select='top-n' takes n, not a threshold"),
        ({"select": "threshold", "threshold": -1.0}, "threshold must be a positive number"),
        ({"prune": 0.0}, "tau must be a positive number"),
        ({"candidates": ["m0->m1"]}, "candidates are for method 'exact'"),
        ({"method": "exact", "candidates": ["m0@end->m1"]}, "m0@end->m1 stands at a position"),
    ):
        with pytest.raises(InputError, match=message):
            discover_edges(network, named_prompts, **settings)


def test_what_leaves_nothing_is_one_clear_line(network: Network, named_prompts: PromptSet):
    alike = replace(named_prompts, answer=named_prompts.answer[:1].expand(4), foil=named_prompts.foil[:1].expand(4))
    for prompts in (named_prompts.pick(torch.tensor([0])), alike.pick(torch.zeros(3, dtype=torch.long))):
        with pytest.raises(NothingFoundError, match=r"no edge passes: the threshold 1e\+05 of LD is .* the largest"):
            discover_edges(network, prompts, method="eap", select="threshold", threshold=1e5)
    candidates = ["m0->m1", "a0.h1->a2.h1<q>"]
    with pytest.raises(NothingFoundError, match="none of the 2 chosen edges lies on a path from the input to the logi"):
        discover_edges(network, named_prompts, method="exact", candidates=candidates, n=2)


def test_shares_of_nothing_are_refused(network: Network, named_prompts: PromptSet):
    # Each prompt a second time with answer and foil exchanged: LD is 0 on average.
    twice = named_prompts.pick(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    answer = torch.cat([named_prompts.answer, named_prompts.foil])
    foil = torch.cat([named_prompts.foil, named_prompts.answer])
    prompts = replace(twice, answer=answer, foil=foil)
    circuit = discover_edges(network, prompts, method="eap", n=100)
    for run in (
        lambda: discover_edges(network, prompts, method="eap", select="threshold", threshold=0.1),
        lambda: prune_edges(network, prompts, circuit, 0.01),
    ):
        with pytest.raises(NothingFoundError, match="not apart from 0: the model does not do the task"):
            run()


# Pruning.


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
    model = built("induction")
    prompts = model.prompts(12, 0)
    whole = discover_edges(model.network, prompts, method="eap", n=model.network.n_layers * 80)
    assert len(whole.edges) > 200
    pruned = prune_edges(model.network, prompts, whole, 0.1)
    reads = edges("input->a0.h1<v>", "input->a2.h2<q>", "input->a2.h2<v>")
    assert set(pruned.edges) == known_edges(model) | reads
    alone = discover_edges(model.network, prompts, method="eap", n=240, prune=0.1)
    assert alone.edges == pruned.edges and alone.provenance == pruned.provenance


def test_a_circuit_that_cannot_be_pruned_is_refused(network: Network, named_prompts: PromptSet, one_graph: EdgeGraph):
    prompts = named_prompts.pick(torch.tensor([0]))
    circuit = discover_edges(network, prompts, method="eap", n=20)
    for wrong, message in (
        (replace(circuit, shape=replace(circuit.shape, n_layers=4)), "which has other parts than"),
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
    real = edge_discovery._prune_destination

    def decide(run, column: int, *rest) -> int:
        decided.append(column)
        return real(run, column, *rest)

    monkeypatch.setattr(edge_discovery, "attribute_edges", None)
    monkeypatch.setattr(edge_discovery, "_prune_destination", decide)
    again = discover_edges(network, prompts, **settings, parts=Parts(tmp_path))
    assert again.edges == whole.edges and again.outside == whole.outside
    graph, done = build_edge_graph(network), int(told[2].split(":")[0].removeprefix("layer "))
    assert decided == list(range(graph.heads_read(done).start - 1, -1, -1))
    for one, other in zip(again.provenance["steps"], whole.provenance["steps"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


# Stability.


def test_stability_is_the_mean_jaccard_of_pairs_of_resamples(network: Network, named_prompts: PromptSet, monkeypatch):
    scores = attribute_edges(network, named_prompts, method="eap", per_prompt=True)
    weights = torch.from_numpy(bootstrap_weights(4, 3, 12)).float()
    sets = []
    for row in weights:
        means = (scores.per_prompt @ row).masked_fill(~scores.exists, 0)
        sets.append(set(means.abs().flatten().topk(25).indices.tolist()))
    pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    for numbers in (edge_discovery.NUMBERS_AT_ONCE, 1000):
        monkeypatch.setattr(edge_discovery, "NUMBERS_AT_ONCE", numbers)
        found = edge_stability(scores, 25, resamples=12, seed=3)
        assert found.jaccard == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
        low, high = torch.tensor(pairs).quantile(torch.tensor([0.025, 0.975])).tolist()
        assert found.spread == pytest.approx((low, high), abs=1e-6)
    assert 0.1 < found.jaccard < 0.95 and (found.n, found.n_prompts, found.resamples) == (25, 4, 12)


def test_where_all_prompts_agree_the_edges_are_stable(network: Network, named_prompts: PromptSet):
    prompts = named_prompts.pick(torch.tensor([2, 2, 2]))
    scores = attribute_edges(network, prompts, method="eap", per_prompt=True)
    found = edge_stability(scores, 25)
    assert found.jaccard == 1.0 and found.spread == (1.0, 1.0)


def test_stability_says_what_it_lacks(network: Network, named_prompts: PromptSet):
    scores = attribute_edges(network, named_prompts, method="eap", per_prompt=True)
    total = int(scores.exists.sum())
    one = attribute_edges(network, named_prompts.pick(torch.tensor([0])), method="eap", per_prompt=True)
    for run, message in (
        (lambda: edge_stability(replace(scores, per_prompt=None), 3), "attribute the edges with per_prompt=True"),
        (lambda: edge_stability(one, 3), "needs at least 2 prompts"),
        (lambda: edge_stability(scores, 3, resamples=1), "1 resamples: agreement needs at least 2"),
        (lambda: edge_stability(scores, 0), f"n is 0; expected 1 to {total}"),
        (lambda: edge_stability(scores, total + 1), f"expected 1 to {total}"),
    ):
        with pytest.raises(InputError, match=message):
            run()
