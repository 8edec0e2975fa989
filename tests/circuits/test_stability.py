import numpy as np
import pytest

from neuroplast.circuits.circuit import Circuit, Shape
from neuroplast.circuits.path_discovery import LOGITS, Discovery, PathSettings, Step
from neuroplast.circuits.stability import agreement, known_stability, path_stability
from neuroplast.components import Edge, parse_node
from neuroplast.errors import InputError

MOVER, LATE, SENDER = (parse_node(name) for name in ("a2.h0@end", "a2.h1@end", "a1.h0@end"))
QUERY = parse_node("a2.h0<q>@end")


def discovery(late: np.ndarray) -> Discovery:
    """A mover that always passes, a head that passes as it is told, and a sender into the mover's query."""
    n = len(late)
    edges = {Edge(SENDER, QUERY): np.full(n, -1.0)}
    steps = (
        Step("logits", (LOGITS,), "end", (MOVER, LATE), np.stack([np.full(n, -2.0), late])),
        Step("1 helping @end", (QUERY,), "end", (SENDER,), np.full((1, n), -1.0), edges),
    )
    circuit = Circuit(Shape("m", 3, 2, 8), {MOVER: -2.0, SENDER: -1.0})
    return Discovery(circuit, steps, np.full(n, 4.0), (), PathSettings(threshold=0.05))


def test_agreement_is_the_mean_jaccard_of_the_pairs():
    members = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=bool)
    assert agreement(members).mean == pytest.approx((1 / 2 + 2 / 3 + 1 / 3) / 3)
    assert agreement(np.zeros((3, 2), dtype=bool)).mean is None


@pytest.mark.parametrize(
    "stability",
    [
        [1],
        "x",
        {"nodes_jaccard": {"mean": 1}},
        {"resamples": 2, "nodes_jaccard": {"mean": 1, "spread": [0]}, "edges_jaccard": None},
        {"resamples": "2", "nodes_jaccard": None, "edges_jaccard": None},
    ],
)
def test_what_a_file_calls_stability_is_not_taken_on_trust(stability):
    assert known_stability({"stability": stability}) is None


def test_what_we_write_as_stability_is_known_again():
    document = path_stability(discovery(np.zeros(20))).document()
    assert known_stability({"stability": document}) == document


def test_what_always_passes_is_always_there():
    found = path_stability(discovery(np.zeros(20)))
    assert found.nodes.mean == 1 and found.edges.mean == 1
    assert found.frequency == {SENDER: 1.0, MOVER: 1.0}


def test_a_head_at_the_threshold_comes_and_goes():
    late = np.where(np.arange(20) < 10, 0.4, 0.0) + np.linspace(0, 0.001, 20)
    found = path_stability(discovery(late), resamples=200)
    assert 0.2 < found.frequency[LATE] < 0.8
    assert 0.6 < found.nodes.mean < 0.95


def test_a_sender_counts_only_where_its_receiver_does():
    base = discovery(np.zeros(20))
    first = Step("logits", (LOGITS,), "end", (LATE,), np.full((1, 20), -2.0))
    found = path_stability(Discovery(base.circuit, (first, base.steps[1]), base.clean, (), base.settings))
    assert set(found.frequency) == {LATE}


def test_one_resample_cannot_agree():
    with pytest.raises(InputError, match="at least 2"):
        path_stability(discovery(np.zeros(20)), resamples=1)
