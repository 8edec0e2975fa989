"""Discovery by path patching finds exactly the circuits that were built by hand: these nodes and edges, no others."""

from collections.abc import Iterable
from functools import cache

import pytest

from handbuilt import MODELS, HandBuilt
from neuroplast.circuits.path_discovery import PathSettings, discover_paths
from neuroplast.components import parse_edge

built = cache(lambda name: MODELS[name]())


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> HandBuilt:
    return built(request.param)


def names(parts: Iterable[object]) -> set[str]:
    return set(map(str, parts))


def backups_of(model: HandBuilt) -> set[str]:
    return {str(parse_edge(edge).source) for edge in model.backups}


# 64 prompts are screened on 32 first, 24 are not.
@pytest.mark.parametrize(("seed", "n"), [(0, 24), (1, 64)])
def test_discovery_finds_exactly_the_circuit(model: HandBuilt, seed: int, n: int):
    found = discover_paths(model.network, model.prompts(n, seed), threshold=0.02)
    assert names(found.circuit.nodes) == set(model.nodes) | backups_of(model)
    assert names(found.circuit.edges) == set(model.edges) | set(model.backups)
    assert names(found.backups) == backups_of(model)


def test_its_scores_are_the_effects_that_follow_from_the_weights(model: HandBuilt):
    found = discover_paths(model.network, model.prompts(32, 2))
    ld = found.clean.mean()
    for node, score in found.circuit.nodes.items():
        if str(node) in model.nodes:
            assert score / ld == pytest.approx(model.nodes[str(node)], abs=0.06), str(node)
    for edge, score in found.circuit.edges.items():
        assert score / ld == pytest.approx({**model.edges, **model.backups}[str(edge)], abs=0.06), str(edge)


def test_backups_are_looked_for_only_where_asked(model: HandBuilt):
    found = discover_paths(model.network, model.prompts(16, 3), settings=PathSettings(backups=False))
    assert names(found.circuit.nodes) == set(model.nodes)
    assert names(found.circuit.edges) == set(model.edges)
    assert not found.backups


def test_a_higher_threshold_leaves_out_the_weaker_movers_and_what_only_they_read():
    model = built("copier")
    found = discover_paths(model.network, model.prompts(16, 4), threshold=0.75)
    assert names(found.circuit.nodes) == {"a0.h2@s2", "a1.h1@end", "a2.h0@end"}
    assert names(found.circuit.edges) == {
        "a0.h2@s2->a1.h1<v>@s2", "a1.h1@end->a2.h0<q>@end", "a2.h0@end->logits@end",
    }  # fmt: skip


def test_positions_that_are_not_looked_at_hide_what_stands_there():
    model = built("copier")
    found = discover_paths(model.network, model.prompts(16, 5), settings=PathSettings(positions=("io", "s1", "end")))
    assert names(found.circuit.nodes) == {node for node in model.nodes if node.endswith("@end")}
    assert names(found.circuit.edges) == {edge for edge in model.edges if "@s2" not in edge}
