"""A circuit is sets of nodes and edges: their algebra, their sizes, and what cannot be a circuit."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroplast.circuits.circuit import Circuit, Role, Shape, jaccard
from neuroplast.components import Edge, Node, parse_edge, parse_node
from neuroplast.errors import InputError

SHAPE = Shape("m", n_layers=4, n_heads=3, d_model=8)
NODES = [Node("head", layer, head, position) for layer in range(4) for head in range(2) for position in ("s2", "end")]
EDGES = [
    Edge(source, Node("head", reader.layer, reader.head, source.position, channel))
    for source in NODES
    for reader in NODES
    if source.depth < reader.depth and reader.position == "end"
    for channel in ("q", "v")
]


def build(nodes="", edges="", **other) -> Circuit:
    """A circuit of `name=score` or `name`, parted by spaces."""

    def read(text, parse):
        pairs = (each.partition("=") for each in text.split())
        return {parse(name): float(score) if score else None for name, _, score in pairs}

    return Circuit(SHAPE, read(nodes, parse_node), read(edges, parse_edge), **other)


def random_circuit(seed: int) -> Circuit:
    """Anything from nothing to everything, some of it without scores."""
    rng = Random(seed)
    share = rng.choice((0, 0.3, 0.7, 1))

    def some(parts):
        return {part: rng.choice((None, rng.gauss(0, 1))) for part in parts if rng.random() < share}

    return Circuit(SHAPE, some(NODES), some(EDGES), positions=("s2", "end"))


def two_circuits(test):
    return settings(deadline=None)(given(st.integers(0, 10**6), st.integers(0, 10**6))(test))


@two_circuits
def test_union_and_intersection_are_those_of_sets(first: int, second: int):
    one, other = random_circuit(first), random_circuit(second)
    either, both = one.union(other), one.intersection(other)
    assert set(either.nodes) == set(one.nodes) | set(other.nodes)
    assert set(either.edges) == set(one.edges) | set(other.edges)
    assert set(both.nodes) == set(one.nodes) & set(other.nodes)
    assert set(both.edges) <= set(one.edges) & set(other.edges)
    assert set(one.union(one).edges) == set(one.edges)


@two_circuits
def test_scores_are_this_ones_where_both_have_one(first: int, second: int):
    one, other = random_circuit(first), random_circuit(second)
    either = one.union(other)
    for mine, theirs, joined in ((one.nodes, other.nodes, either.nodes), (one.edges, other.edges, either.edges)):
        for part, score in joined.items():
            assert score == (mine[part] if mine.get(part) is not None else theirs.get(part))
    assert all(score == one.nodes[node] for node, score in one.intersection(other).nodes.items())


@two_circuits
def test_jaccard_counts_what_is_shared(first: int, second: int):
    one, other = random_circuit(first), random_circuit(second)
    for level in ("nodes", "heads", "edges"):
        mine, theirs = one.members(level), other.members(level)
        expected = len(mine & theirs) / len(mine | theirs) if mine | theirs else None
        assert one.jaccard(other, level) == other.jaccard(one, level) == expected


def test_jaccard_of_a_hand_made_pair():
    one, other = build("a0.h0@end a1.h1@end a2.h0@s2"), build("a0.h0@end a1.h1@s2 a3.h0@end")
    assert one.jaccard(other, "nodes") == 1 / 5
    assert one.jaccard(other, "heads") == 2 / 4
    assert one.jaccard(other, "edges") is None
    assert jaccard([], []) is None and jaccard([1], []) == 0


def test_edges_are_compared_wherever_they_stand():
    one, other = build(edges="a0.h0@s2->a1.h1<v>@s2 m0->logits"), build(edges="a0.h0->a1.h1<v> a0.h0->logits")
    assert one.jaccard(other, "edges") == 1 / 3


def test_mlps_are_no_heads():
    circuit = build("a0.h0@end m1@end input logits")
    assert circuit.heads == (parse_node("a0.h0@end"),)
    assert circuit.members("nodes") == {parse_node("a0.h0@end")}


@pytest.mark.parametrize(
    ("nodes", "positions", "expected"),
    [
        ("a0.h0 a1.h1", (), 2 / 12),
        ("a0.h0@s2 a0.h0@end a1.h1@end", ("s2", "end"), 3 / 24),
        ("a0.h0@end", ("io", "s1", "end"), 1 / 36),
        ("a0.h0@s2 a0.h0@end", (), 2 / 24),
        ("", (), 0.0),
    ],
)
def test_sparsity_of_nodes_counts_heads_times_positions(nodes: str, positions: tuple[str, ...], expected: float):
    circuit = build(nodes, positions=positions)
    assert circuit.sparsity("nodes") == expected
    assert circuit.universe("heads") == 12


def test_sparsity_of_heads_counts_each_once():
    assert build("a0.h0@s2 a0.h0@end a1.h1@end", positions=("s2", "end")).sparsity("heads") == 2 / 12


@pytest.mark.parametrize("parallel", [False, True])
def test_the_model_has_as_many_edges_as_can_be_written_down(parallel: bool):
    shape = Shape("m", 3, 2, 8, parallel)
    heads = [Node("head", layer, head) for layer in range(3) for head in range(2)]
    mlps = [Node("mlp", layer) for layer in range(3)]
    reads = [Node("head", head.layer, head.head, None, channel) for head in heads for channel in ("q", "k", "v")]
    count = 0
    for source in (Node("input"), *heads, *mlps):
        for destination in (*reads, *mlps, Node("logits")):
            beside = parallel and source.layer is not None and source.layer == destination.layer
            count += source.depth < destination.depth and not beside
    assert shape.n_edges == count
    assert Circuit(shape, {}, {Edge(Node("input"), Node("logits")): 1.0}).sparsity("edges") == 1 / count


def test_gpt2_small_has_32491_edges():
    assert Shape("gpt2", 12, 12, 768).n_edges == 32491


def test_keep_leaves_the_edges_between_what_is_kept():
    circuit = build(
        "a0.h0@s2=-1 a1.h1@end=-2 a2.h0@end m1@end=-0.5",
        "a0.h0@s2->a1.h1<v>@s2=-1 a1.h1@end->a2.h0<q>@end=-2 a2.h0@end->logits@end "
        "m1@end->logits@end=-3 input->m1@end=-4",
        roles={parse_node("a2.h0@end"): Role("name mover", "x"), parse_node("a0.h0@s2"): Role("induction", "x")},
    )
    kept = circuit.keep(map(parse_node, ("a0.h0@s2", "a1.h1@end", "a3.h0@end")))
    assert set(kept.nodes) == {parse_node("a0.h0@s2"), parse_node("a1.h1@end")}
    assert kept.edges == {parse_edge("a0.h0@s2->a1.h1<v>@s2"): -1}
    assert {role.name for role in kept.roles.values()} == {"induction"}
    assert circuit.keep(circuit.nodes) == circuit


def test_what_is_not_kept_lies_outside_with_its_score():
    circuit = build(
        "a0.h0=-1 a1.h1=-2 a2.h0", "a0.h0->a1.h1<q>=-1 a0.h0->a2.h0<q>", outside={parse_edge("m0->m1"): 5.0}
    )
    kept = circuit.keep([parse_node("a0.h0")])
    assert kept.outside == {parse_edge("m0->m1"): 5.0, parse_edge("a0.h0->a1.h1<q>"): -1.0}
    assert kept.outside_nodes == {parse_node("a1.h1"): -2.0}
    back = kept.union(circuit)
    assert (back.nodes, back.edges, back.outside) == (circuit.nodes, circuit.edges, circuit.outside)
    assert not back.outside_nodes


def test_an_edge_at_a_position_is_left_where_its_head_stands_everywhere():
    circuit = build("a0.h0 a1.h1@end", "a0.h0@s2->a1.h1<v>@s2 a0.h0->logits")
    assert circuit.keep(circuit.nodes).edges == circuit.edges


def test_an_edge_goes_when_its_head_is_kept_elsewhere_only():
    circuit = build("a0.h0@s2 a0.h0@end a1.h1@end", "a0.h0@s2->a1.h1<v>@s2=1 a0.h0@end->a1.h1<q>@end=1")
    kept = circuit.keep([parse_node("a0.h0@end"), parse_node("a1.h1@end")])
    assert set(map(str, kept.edges)) == {"a0.h0@end->a1.h1<q>@end"}


def test_nodes_come_in_the_order_of_the_forward_pass():
    circuit = build("logits m1 a1.h1@s2 a1.h1@end a1.h0 input m0")
    assert list(map(str, circuit.nodes)) == ["input", "m0", "a1.h0", "a1.h1@end", "a1.h1@s2", "m1", "logits"]


def test_nodes_of_one_role():
    mover = parse_node("a2.h0@end")
    circuit = build("a1.h0@end a2.h0@end", roles={mover: Role("name mover", "x")})
    assert circuit.with_role("name mover") == (mover,)
    assert circuit.with_role("induction") == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("a4.h0@end"), "a4.h0@end is no part of m: it has 4 layers of 3 heads"),
        (lambda: build("a0.h3"), "a0.h3 is no part of m"),
        (lambda: build(edges="m0->a1.h3<k>"), "a1.h3<k> is no part of m"),
        (lambda: build("a0.h0<q>"), "cannot be a circuit's node"),
        (lambda: build("a1"), "cannot be a circuit's node"),
        (lambda: build("r1"), "cannot be a circuit's node"),
        (lambda: build(edges="m0->m1", outside={parse_edge("m0->m1"): 1.0}), "m0->m1 cannot both belong"),
        (lambda: build("m0", outside_nodes={parse_node("m0"): 1.0}), "m0 cannot both belong"),
        (lambda: Shape("m", 0, 1, 1), "0 layers"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Shape("b", 5, 3, 8), r"layers 4 \(m\) and 5 \(b\)"),
        (Shape("b", 4, 3, 16), r"width 8 \(m\) and 16 \(b\)"),
        (Shape("b", 4, 3, 8, parallel=True), r"parallel False \(m\) and True \(b\)"),
    ],
)
def test_circuits_of_models_with_other_parts_cannot_be_compared(other: Shape, message: str):
    for ask in (Circuit.union, Circuit.intersection, Circuit.jaccard):
        with pytest.raises(InputError, match=message):
            ask(build("a0.h0"), Circuit(other, {}))


def test_the_name_and_the_weights_of_the_model_do_not_matter():
    other = Circuit(Shape("tuned", 4, 3, 8, weights_sha256="ab" * 32), {parse_node("a0.h0"): 1.0})
    assert build("a0.h0").jaccard(other, "heads") == 1
