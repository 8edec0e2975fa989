import pytest
import torch

from neuroplast.components import Node, parse_node
from neuroplast.errors import InputError
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.path_patching import path_patch
from neuroplast.interventions.selection import (
    position_mask,
    select_destinations,
    select_receivers,
    select_senders,
    select_sites,
)
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet


@pytest.fixture
def family() -> str:
    """What can be selected depends on the numbers of layers and heads only."""
    return "llama"


def names(groups) -> list[str]:
    return ["+".join(map(str, group)) for group in groups]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("input, m2", ["input", "m2"]),
        ("mlps", ["m0", "m1", "m2"]),
        ("input@a+m0", ["input@a+m0"]),
        ([("a0.h1", "m0@b")], ["a0.h1+m0@b"]),
        ("a0.h1+m0@a, a2.h3", ["a0.h1+m0@a", "a2.h3"]),
        ("(2, 3), 0.1, L1H2@end", ["a2.h3", "a0.h1", "a1.h2@end"]),
        ("(2, 3)+m0", ["a2.h3+m0"]),
        ("a0.h1@each", ["a0.h1@a", "a0.h1@b", "a0.h1@end"]),
        ("m1@3", ["m1@3"]),
        (Node("mlp", 1, position="b"), ["m1@b"]),
        ([Node("mlp", 1), (Node("input"), Node("head", 0, 2)), "a1.h1"], ["m1", "input+a0.h2", "a1.h1"]),
    ],
)
def test_names_become_groups(network: Network, named_prompts: PromptSet, selection, expected):
    assert names(select_senders(selection, network, named_prompts)) == expected


def test_words_name_everything_of_a_kind(network: Network, named_prompts: PromptSet):
    heads = [f"a{layer}.h{head}" for layer in range(3) for head in range(4)]
    assert names(select_senders("heads@b", network, named_prompts)) == [f"{name}@b" for name in heads]
    assert names(select_senders("all", network, named_prompts)) == ["input", *heads, "m0", "m1", "m2"]
    assert names(select_sites("v, residual", network, named_prompts)) == [*(f"{h}<v>" for h in heads), "r0", "r1", "r2"]
    assert names(select_sites("attention@each", network, named_prompts))[:4] == ["a0@a", "a0@b", "a0@end", "a1@a"]
    everything = list(map(str, select_destinations("all", network, named_prompts)))
    assert everything == [*(f"{h}<{c}>" for c in "qkv" for h in heads), "m0", "m1", "m2", "logits"]


def test_receivers_are_set_together(network: Network, named_prompts: PromptSet):
    receivers = select_receivers("a2.h1<q>@end, m1, a0.h0<K>", network, named_prompts)
    assert receivers == (parse_node("a2.h1<q>@end"), Node("mlp", 1), parse_node("a0.h0<k>"))
    assert select_receivers("logits", network, named_prompts) == (Node("logits", position="end"),)


def test_a_position_may_hold_a_plus(network: Network, named_prompts: PromptSet):
    named_prompts.positions["b+1"] = named_prompts.positions["b"]
    assert names(select_senders("a0.h1@b+1, m0@b+1+a1.h1@b", network, named_prompts)) == [
        "a0.h1@b+1",
        "m0@b+1+a1.h1@b",
    ]


def test_a_named_position_comes_before_a_token_index(network: Network, named_prompts: PromptSet):
    named_prompts.positions["1"] = named_prompts.positions["b"]
    assert torch.equal(position_mask(named_prompts, "1"), position_mask(named_prompts, "b"))
    assert position_mask(named_prompts, "2").nonzero().tolist() == [[row, 2] for row in range(4)]


@pytest.mark.parametrize(
    ("select", "selection", "message"),
    [
        (select_senders, "haeds", "unknown selection 'haeds'.*heads"),
        (select_senders, "", "nothing is selected by ''; expected heads, mlps, input, all, names such as a3.h1"),
        (select_senders, "heads@", "'heads@': a position must stand behind @"),
        (select_senders, "heads@ned", "unknown position 'ned'.*end"),
        (select_senders, "a0.h1@99", "position 99: the shortest prompt has tokens 0 to 5 only"),
        (select_senders, "a0.h1@6", "position 6: the shortest prompt has tokens 0 to 5 only"),
        (select_senders, "a3.h0", "a3.h0: llama has layers 0 to 2"),
        (select_senders, "a0.h4", "a0.h4: llama has heads 0 to 3 in a layer"),
        (select_senders, "a0.h1<q>", "a0.h1<q> cannot send"),
        (select_senders, "r1", "r1 cannot send"),
        (select_senders, ["m0", ()], "a group of nodes is empty"),
        (select_receivers, "heads", "unknown selection 'heads': valid are logits, names such as a3.h1"),
        (select_receivers, "a1.h1@end", "a1.h1@end cannot receive.*did you mean a1.h1<q>@end"),
        (select_receivers, "logits, m1", "logits cannot be set together"),
        (select_receivers, "logits@a", "logits@a: the logits are read at the end only"),
        (select_destinations, "m1, logits@a", "logits@a: the logits are read at the end only"),
        (select_destinations, "r1", "r1 cannot receive"),
        (select_sites, "logits", "logits cannot be patched"),
    ],
)
def test_what_cannot_be_selected_is_one_clear_line(
    network: Network, named_prompts: PromptSet, select, selection, message: str
):
    with pytest.raises(InputError, match=message) as raised:
        select(selection, network, named_prompts)
    assert "\n" not in str(raised.value)


def test_without_prompts_nothing_is_measured(network: Network, named_prompts: PromptSet):
    for measure in (path_patch, activation_patch, attribute_edges, patch_edges):
        with pytest.raises(InputError, match="there are no prompts"):
            measure(network, named_prompts[0:0])
