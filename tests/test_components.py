import pytest

from neuroplast.components import Edge, Node, parse_edge, parse_node
from neuroplast.errors import InputError


@pytest.mark.parametrize("text", ["a23.h3", "23.3", "L23H3", "(23, 3)", "l23h3"])
def test_a_head_has_many_spellings(text: str):
    assert parse_node(text) == Node("head", 23, 3)


NAMES = "input logits m11 a5 r0 a0.h0 a23.h3@end m2@s1+1 a1.h2<q>@s2 a1.h2<pattern> a1.h2<keys>@s2 a1.h2<values>"
NO_NAMES = "a23. h3 a-1.h2 m head a1.h2.3 (1 2) a1.h2<z> m3<q> logits@"


@pytest.mark.parametrize("text", NAMES.split())
def test_a_name_comes_back_as_it_was(text: str):
    assert str(parse_node(text)) == text


@pytest.mark.parametrize("text", ["", *NO_NAMES.split(), "a" + "9" * 5000])
def test_anything_else_is_refused(text: str):
    with pytest.raises(InputError, match="not the name of a node"):
        parse_node(text)


def test_a_node_cannot_contradict_itself():
    with pytest.raises(InputError):
        Node("mlp", 3, head=1)
    with pytest.raises(InputError):
        Node("logits", 3)


def test_an_edge_comes_back_as_it_was():
    assert str(parse_edge("a20.h0->a23.h3<q>")) == "a20.h0->a23.h3<q>"
    assert parse_edge("20.0->m20") == Edge(Node("head", 20, 0), Node("mlp", 20))
    assert parse_edge("input->logits").source == Node("input")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a1.h1", "expected SOURCE->DESTINATION"),
        ("a1.h1->a1.h2<q>", "is computed before"),
        ("m3->a3.h0<k>", "is computed before"),
        ("a1.h1->a2.h2", "ends at a head's <q>, <k> or <v>"),
        ("a1.h1<q>->logits", "begins at input, a head or an MLP"),
        ("r1->logits", "begins at input, a head or an MLP"),
    ],
)
def test_no_edge_is_refused_with_its_reason(text: str, reason: str):
    with pytest.raises(InputError, match=reason):
        parse_edge(text)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Node("head", 0, -1),
        lambda: Node("mlp", -1),
        lambda: Node("head", 0.0, 1),
        lambda: Node("head", True, 1),
        lambda: Node("mlp", 1, position=3),
        lambda: Node("mlp", 1, position=""),
    ],
)
def test_indices_count_from_0_and_positions_are_names(build):
    with pytest.raises(InputError, match=r"indices count from 0|expected a name"):
        build()
