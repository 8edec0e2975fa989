"""The published circuit is what the paper says it is; its figures 20 and 22 are copied out here."""

from pathlib import Path

import pytest

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.criteria import classes_of
from neuroplast.circuits.files import load_circuit, save_circuit
from neuroplast.circuits.published import greedy_sets, minimality_sets, published_circuit, published_classes
from neuroplast.circuits.roles import AGAINST, FOR, MOVERS, ROLES, UNCLASSIFIED
from neuroplast.components import Node, parse_edge, parse_node
from neuroplast.errors import InputError

FIGURE_20: dict[str, tuple[str, float, float]] = {
    "9.9": ("9.9", 2.26, 2.62),
    "10.0": ("9.9 10.0", 1.91, 2.26),
    "9.6": ("9.9 10.0 9.6", 2.11, 1.91),
    "10.7": ("11.10 10.7", 4.07, 3.13),
    "11.10": ("11.10 10.7", 4.07, 3.27),
    "8.10": ("7.9 8.10 8.6 7.3", 0.24, 1.01),
    "7.9": ("7.9 8.10 8.6 7.3", 0.24, 0.92),
    "8.6": ("7.9 8.10 8.6 7.3", 0.24, 0.86),
    "7.3": ("7.9 8.10 8.6 7.3", 0.24, 0.43),
    "5.5": ("5.9 5.5 6.9 5.8", 0.97, 2.12),
    "5.9": ("11.10 10.7 5.9", 3.33, 4.07),
    "6.9": ("5.9 5.5 6.9 5.8", 0.97, 1.46),
    "5.8": ("11.10 10.7 5.8", 3.83, 4.07),
    "0.1": ("0.1 0.10 3.0", 0.6, 1.9),
    "0.10": ("0.1 0.10 3.0", 0.6, 1.66),
    "3.0": ("0.1 0.10 3.0", 0.6, 1.05),
    "4.11": ("4.11 2.2", 1.31, 2.28),
    "2.2": ("4.11 2.2", 1.31, 1.75),
    "11.2": ("previous", 0.95, 1.37),
    "10.6": ("previous", 1.65, 1.88),
    "10.10": ("previous", 1.88, 2.11),
    "10.2": ("previous", 1.49, 1.65),
    "9.7": ("previous", 0.81, 0.95),
    "10.1": ("previous", 1.37, 1.49),
    "11.9": ("all", 0.41, 0.45),
    "9.0": ("all", 0.41, 0.45),
}
"""By v: K ∪ {v}, F(C∖(K∪{v})), F(C∖K)."""


@pytest.fixture
def circuit() -> Circuit:
    return published_circuit("ioi-gpt2")


def heads(nodes) -> set[str]:
    return {f"{node.layer}.{node.head}" for node in nodes}


def test_it_has_26_heads_each_at_its_position(circuit: Circuit):
    assert len(circuit.nodes) == len(circuit.members("heads")) == 26
    at = {position: heads(n for n in circuit.nodes if n.position == position) for position in circuit.positions}
    assert at["s1+1"] == {"2.2", "4.11"}
    assert at["s2"] == {"0.1", "0.10", "3.0", "5.5", "5.8", "5.9", "6.9"}
    assert len(at["end"]) == 17
    assert heads(circuit.with_role("name mover")) == {"9.9", "10.0", "9.6"}
    assert heads(circuit.with_role("negative name mover")) == {"10.7", "11.10"}
    assert len(circuit.with_role("backup name mover")) == 8
    assert circuit.sparsity("heads") == 26 / 144


def test_its_edges_are_the_paths_between_classes(circuit: Circuit):
    # 2 previous x 4 induction x (k, v); (3 + 4) x 4 S-inhibition x (k, v); 4 x 13 queries; 13 into the logits.
    assert len(circuit.edges) == 16 + 56 + 52 + 13
    for name in (
        "a4.h11@s1+1->a5.h5<k>@s1+1",
        "a5.h5@s2->a7.h3<v>@s2",
        "a0.h1@s2->a8.h6<k>@s2",
        "a8.h6@end->a11.h10<q>@end",
        "a10.h7@end->logits@end",
    ):
        assert parse_edge(name) in circuit.edges
    sources = {edge.source for edge in circuit.edges}
    assert sources == set(circuit.nodes), "every head writes to something that is in the circuit"


def test_there_are_no_scores_and_the_source_is_named(circuit: Circuit):
    assert set(circuit.nodes.values()) == set(circuit.edges.values()) == {None}
    assert "2211.00593" in circuit.provenance["source"]


def test_its_classes_are_the_roles_that_are_known(circuit: Circuit):
    classes = published_classes("ioi-gpt2")
    assert {name: set(nodes) for name, nodes in classes.items()} == {
        name: set(nodes) for name, nodes in classes_of(circuit).items()
    }
    assert set(classes) == set(ROLES) - {UNCLASSIFIED, FOR, AGAINST}


def test_each_k_is_the_one_of_figure_20(circuit: Circuit):
    found = minimality_sets("ioi-gpt2")
    assert set(found) == set(circuit.nodes)
    for v, given in found.items():
        assert v not in given and set(given) < set(circuit.nodes)
        printed = FIGURE_20[f"{v.layer}.{v.head}"][0]
        if printed == "all":
            assert set(given) | {v} == {node for role in MOVERS for node in circuit.with_role(role)}
        elif printed != "previous":
            assert heads({*given, v}) == set(printed.split())


def test_the_order_of_the_backups_is_the_one_that_the_printed_values_tell():
    found = minimality_sets("ioi-gpt2")
    in_order = sorted((v for v in FIGURE_20 if FIGURE_20[v][0] == "previous"), key=lambda v: len(found[node(v)]))
    before = "9.6"
    for v in in_order:
        without_before, given = FIGURE_20[before][1], FIGURE_20[v][2]
        assert given == without_before
        assert [u for u, row in FIGURE_20.items() if row[0] == "previous" and row[2] == without_before] == [v]
        assert set(found[node(v)]) == {*found[node(before)], node(before)}
        before = v


def node(head: str) -> Node:
    return parse_node(head).at("end")


def test_greedy_sets_are_those_of_figure_22(circuit: Circuit):
    found = greedy_sets("ioi-gpt2")
    assert [len(each) for each in found] == [5, 6, 4, 7]
    assert all(set(each) <= set(circuit.nodes) for each in found)
    assert heads(found[2]) == {"10.7", "5.5", "2.2", "4.11"}


def test_it_comes_back_from_a_file(circuit: Circuit, tmp_path: Path):
    save_circuit(tmp_path / "circuit.json", circuit)
    assert load_circuit(tmp_path / "circuit.json") == circuit


@pytest.mark.parametrize("ask", [published_circuit, published_classes, minimality_sets, greedy_sets])
def test_another_name_is_refused(ask):
    with pytest.raises(InputError, match="unknown published circuit 'ioi-gpt': did you mean 'ioi-gpt2'"):
        ask("ioi-gpt")
