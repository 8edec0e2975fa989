import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from architectures import random_model
from neuroplast.components import Edge, parse_edge
from neuroplast.errors import InputError
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.edges import build_destinations, build_sources, joined
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, attribution, path_effect, prompts_of

FEW = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def edges_of(network: Network) -> list[Edge]:
    return [
        Edge(source, destination)
        for source in build_sources(network)
        for destination in build_destinations(network)
        if joined(source, destination, network.is_parallel)
    ]


@FEW
@given(data=st.data())
def test_exact_edges_agree_with_a_full_forward_pass(network, named_prompts, family, data):
    edges = data.draw(st.lists(st.sampled_from(edges_of(network)), min_size=2, max_size=4, unique=True))
    fast = patch_edges(network, named_prompts, edges)
    oracle = Oracle(random_model(family), family)
    for row, edge in enumerate(edges):
        slow = [
            path_effect(oracle, prompt, [edge.source], [edge.destination], "frozen")
            for prompt in prompts_of(named_prompts)
        ]
        torch.testing.assert_close(fast.effects[row], torch.stack(slow), atol=1e-4, rtol=1e-4)


def test_an_edge_that_the_model_does_not_have_is_refused(network: Network, named_prompts: PromptSet):
    if not network.is_parallel:
        assert patch_edges(network, named_prompts, ["a1.h0->m1"]).effects.abs().max() > 0
        return
    with pytest.raises(InputError, match=r"has no edge a1\.h0->m1: both read the same residual stream"):
        patch_edges(network, named_prompts, ["a1.h0->m1"])


def test_edges_are_named_and_scores_looked_up(network: Network, named_prompts: PromptSet):
    found = attribute_edges(network, named_prompts, method="eap")
    (edge, score), *_ = found.top(3)
    assert found.score(edge) == score and abs(score) == float(found.scores.abs().max()) > 0
    assert not found.scores[~found.exists].any()
    for edges, message in (
        ([], "no edges are given"),
        (["m0->m2@each"], "an edge stands at one position"),
    ):
        with pytest.raises(InputError, match=message):
            patch_edges(network, named_prompts, edges)
    assert patch_edges(network, named_prompts, "m0->m2").edges == (parse_edge("m0->m2"),)
    with pytest.raises(InputError, match="the model has no edge"):
        found.score(parse_edge("a0.h0@end->m2"))


@pytest.mark.parametrize(("method", "steps"), [("eap", 1), ("eap-ig", 3), ("ceap", 3)])
@FEW
@given(data=st.data())
def test_attribution_agrees_with_central_differences(network, named_prompts, family, method, steps, data):
    fast = attribute_edges(network, named_prompts, method=method, steps=steps, per_prompt=True)
    oracle = Oracle(random_model(family).double(), family)
    for edge in data.draw(st.lists(st.sampled_from(edges_of(network)), min_size=2, max_size=3, unique=True)):
        slow = [
            attribution(oracle, prompt, edge.source, edge.destination, steps, method)
            for prompt in prompts_of(named_prompts)
        ]
        found = fast.per_prompt[fast.sources.index(edge.source), fast.destinations.index(edge.destination)]
        torch.testing.assert_close(found.double(), torch.stack(slow), atol=1e-4, rtol=1e-3)
