"""The circuit of the embedded model."""

from neuroplast.circuits.path_discovery import discover_paths
from neuroplast.models.sources import load_model
from neuroplast.tasks import ioi


def test_the_circuit_of_tiny_is_the_same_for_two_seeds_of_prompts():
    model = load_model("tiny")
    first, second = (discover_paths(model, ioi.prompts(model, n=256, seed=seed)).circuit for seed in (0, 1))
    assert set(first.nodes) == set(second.nodes)
    at = {node.position for node in first.nodes}
    assert at == {"end", "other"}, "its movers read what stands behind the names"
    assert 10 < len(first.nodes) < 0.15 * first.universe("nodes")
