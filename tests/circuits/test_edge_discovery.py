import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from handbuilt import MODELS, HandBuilt
from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits import edge_discovery
from neuroplast.circuits.edge_discovery import discover_edges, select_edges
from neuroplast.components import Edge, Node, parse_edge
from neuroplast.errors import InputError, NothingFoundError
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.edges import EdgeGraph, EdgeScores, build_edge_graph
from neuroplast.models.network import Network
from neuroplast.report.evaluation import criteria_rows
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
    with pytest.raises(NothingFoundError, match="not apart from 0: the model does not do the task"):
        discover_edges(network, prompts, method="eap", select="threshold", threshold=0.1)


# Stability.


def solved(network: Network, prompts: PromptSet) -> PromptSet:
    """The prompts with answer and foil such that the model does the task on each."""
    right = measure_behaviour(network, prompts).logit_diff > 0
    answer, foil = torch.where(right, prompts.answer, prompts.foil), torch.where(right, prompts.foil, prompts.answer)
    return replace(prompts, answer=answer, foil=foil)


def resampled(scores: EdgeScores, graph: EdgeGraph, n_prompts: int, **settings) -> list[set[Edge]]:
    """The circuit of each resample, from the scores of every prompt."""
    circuits = []
    for row in torch.from_numpy(bootstrap_weights(n_prompts, 0, 100)).float():
        means = (scores.per_prompt @ row).masked_fill(~scores.exists, 0)
        least = settings.get("threshold", 0) * abs(float(scores.clean @ row))
        chosen = select_edges(graph, means, scores.exists, settings["select"], n=settings.get("n"), least=least)
        circuits.append(set(graph.edges(graph.live(chosen))))
    return circuits


def jaccards(sets: list[set]) -> Tensor:
    pairs = [(one, other) for one, other in itertools.combinations(sets, 2) if one | other]
    return torch.tensor([len(one & other) / len(one | other) for one, other in pairs])


@pytest.mark.parametrize(
    "settings",
    [{"select": "top-n", "n": 25}, {"select": "greedy", "n": 25}, {"select": "threshold", "threshold": 0.1}],
    ids=lambda settings: settings["select"],
)
def test_stability_is_the_mean_jaccard_of_the_circuits_of_resamples(
    network: Network, named_prompts: PromptSet, monkeypatch, settings: dict
):
    prompts = solved(network, named_prompts)
    scores = attribute_edges(network, prompts, method="eap", per_prompt=True)
    circuits = resampled(scores, build_edge_graph(network), 4, **settings)
    heads = [{edge.source for edge in each if edge.source.kind == "head"} for each in circuits]
    for numbers in (edge_discovery.NUMBERS_AT_ONCE, 1000):
        monkeypatch.setattr(edge_discovery, "NUMBERS_AT_ONCE", numbers)
        found = discover_edges(network, prompts, method="eap", **settings).provenance["stability"]
        assert found["resamples"] == 100 and "why" not in found
        for level, sets in (("nodes", heads), ("edges", circuits)):
            pairs = jaccards(sets)
            assert found[f"{level}_jaccard"]["mean"] == pytest.approx(float(pairs.mean()), abs=1e-6)
            spread = pairs.quantile(torch.tensor([0.025, 0.975])).tolist()
            assert found[f"{level}_jaccard"]["spread"] == pytest.approx(spread, abs=1e-6)
        for head in set().union(*heads):
            assert found["frequency"][str(head)] == pytest.approx(sum(head in each for each in heads) / 100)
        assert set(found["frequency"]) == set(map(str, set().union(*heads)))
    assert 0.1 < found["edges_jaccard"]["mean"] < 0.95


def test_exact_scores_have_a_stability_too(network: Network, named_prompts: PromptSet):
    names = ["input->m0", "m0->logits", "m0->a1.h2<k>", "a1.h2->logits", "input->a1.h2<k>", "input->logits"]
    circuit = discover_edges(network, named_prompts, method="exact", candidates=names, n=4)
    graph, patched = build_edge_graph(network), patch_edges(network, named_prompts, names)
    circuits = []
    for row in torch.from_numpy(bootstrap_weights(4, 0, 100)).float():
        order = (patched.effects @ row).abs().argsort(descending=True)[:4].tolist()
        circuits.append(set(graph.edges(graph.live(graph.mask(patched.edges[place] for place in order)))))
    found = circuit.provenance["stability"]["edges_jaccard"]
    assert found["mean"] == pytest.approx(float(jaccards(circuits).mean()), abs=1e-6)


@pytest.mark.parametrize("method", ["eap", "eap-ig", "ceap"])
def test_where_all_prompts_agree_the_edges_are_stable(network: Network, named_prompts: PromptSet, method: str):
    prompts = named_prompts.pick(torch.tensor([2, 2, 2]))
    circuit = discover_edges(network, prompts, method=method, steps=2, n=40)
    found = circuit.provenance["stability"]
    assert found["edges_jaccard"] == {"mean": 1.0, "spread": [1.0, 1.0]}
    assert set(found["frequency"].values()) == {1.0}
    assert set(found["frequency"]) == {str(node) for node in circuit.heads}


def test_where_no_resample_has_a_circuit_its_agreement_is_null():
    document = edge_discovery._stability_document(
        EdgeGraph((Node("input"),), (Node("logits"),), torch.ones(1, 1, dtype=torch.bool), 0, 1),
        3,
        {name: edge_discovery._numbers(torch.zeros(100, 5, dtype=torch.bool)) for name in ("nodes", "edges")}
        | {"frequency": torch.zeros(1)},
    )
    nothing = {"mean": None, "spread": None}
    assert document == {"resamples": 100, "nodes_jaccard": nothing, "edges_jaccard": nothing, "frequency": {}}


def test_what_cannot_be_resampled_has_a_reason_instead(network: Network, named_prompts: PromptSet, monkeypatch):
    whole = discover_edges(network, named_prompts, method="eap", n=25)
    monkeypatch.setattr(edge_discovery, "MOST_BYTES", 4 * build_edge_graph(network).exists.numel() * 4 - 1)
    large = discover_edges(network, named_prompts, method="eap", n=25)
    one = discover_edges(network, named_prompts.pick(torch.tensor([0])), method="eap", n=25)
    assert whole.edges == large.edges and whole.provenance["stability"]["resamples"] == 100
    for circuit, why in ((large, "too much to keep: give fewer prompts"), (one, "a single prompt cannot be resampled")):
        found = circuit.provenance["stability"]
        assert why in found["why"]
        assert (found["resamples"], found["nodes_jaccard"], found["edges_jaccard"]) == (0, None, None)


def test_a_budget_leaves_most_of_it_to_the_work(network: Network, named_prompts: PromptSet, monkeypatch):
    size = 4 * build_edge_graph(network).exists.numel() * 4
    for free, kept in ((4 * size + 4, True), (4 * size - 4, False)):
        monkeypatch.setattr(edge_discovery, "working_memory", lambda *_, free=free: free)
        circuit = discover_edges(network, named_prompts, method="eap", n=25, memory="64GiB")
        assert ("why" not in circuit.provenance["stability"]) == kept


def test_stability_is_not_measured_twice(network: Network, named_prompts, tmp_path: Path, monkeypatch):
    found = discover_edges(network, named_prompts, method="eap", n=25, parts=Parts(tmp_path))
    monkeypatch.setattr(edge_discovery, "attribute_edges", None)
    again = discover_edges(network, named_prompts, method="eap", n=25, parts=Parts(tmp_path))
    assert again == found and again.provenance["stability"]["resamples"] == 100
    # What is kept does not grow with the prompts.
    (part,) = tmp_path.iterdir()
    assert part.stat().st_size < 7 * build_edge_graph(network).exists.numel() + 2000


def test_stability_is_json_that_the_evaluation_prints(network: Network, named_prompts: PromptSet):
    known = discover_edges(network, named_prompts, method="eap", n=25).provenance["stability"]
    missing = {"resamples": 0, "nodes_jaccard": None, "edges_jaccard": None, "why": "too large"}
    null = {"resamples": 100, "nodes_jaccard": None, "edges_jaccard": {"mean": None, "spread": None}}
    estimate = {"value": 1.0, "ci95": None}
    judged = {
        "F": dict.fromkeys(("model", "circuit", "nothing"), estimate),
        **dict.fromkeys(("faithfulness", "foil_faithfulness", "normalised", "mean_of_ratios"), estimate),
        "by_group": {},
        "by_ablation": {},
        "random": {"n": 0},
        "completeness": {"gap": estimate},
        "minimality": {"min": estimate},
    }
    printed = {}
    for name, stability in (("known", known), ("missing", missing), ("null", null)):
        rows = criteria_rows(judged | {"stability": json.loads(json.dumps(stability, allow_nan=False))})
        printed[name] = {row[0]: row[1] for row in rows if row[0].startswith("stability")}
    assert printed["known"] == {f"stability, {name}": known[f"{name}_jaccard"]["mean"] for name in ("nodes", "edges")}
    assert printed["missing"] == {} and printed["null"] == {"stability, edges": None}
