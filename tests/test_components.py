import pytest

from neuroplast.components import Node, parse_node
from neuroplast.errors import InputError


@pytest.mark.parametrize("text", ["a23.h3", "23.3", "L23H3", "(23, 3)", "l23h3"])
def test_a_head_has_many_spellings(text: str):
    assert parse_node(text) == Node("head", 23, 3)


@pytest.mark.parametrize("text", ["input", "logits", "m11", "a0.h0", "a23.h3@end", "m2@s1+1"])
def test_a_name_comes_back_as_it_was(text: str):
    assert str(parse_node(text)) == text


@pytest.mark.parametrize("text", ["", "a23", "h3", "a-1.h2", "m", "head", "a1.h2.3", "(1 2)"])
def test_anything_else_is_refused(text: str):
    with pytest.raises(InputError, match="not the name of a node"):
        parse_node(text)


def test_a_node_cannot_contradict_itself():
    with pytest.raises(InputError):
        Node("mlp", 3, head=1)
    with pytest.raises(InputError):
        Node("logits", 3)
