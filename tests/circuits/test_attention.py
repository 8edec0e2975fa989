"""Whole attention patterns are those that the library's own eager attention gives."""

import torch

from architectures import random_model
from neuroplast.circuits.attention import attention_patterns
from neuroplast.components import Node
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet


def test_patterns_are_those_of_the_eager_model_prompt_by_prompt(
    family: str, network: Network, token_prompts: PromptSet
) -> None:
    heads = [Node("head", 0, 3), Node("head", 2, 0)]
    found = attention_patterns(network, token_prompts, heads)
    plain = random_model(family)
    plain.set_attn_implementation("eager")
    for row, end in enumerate(token_prompts.positions["end"].tolist()):
        length = end + 1
        with torch.no_grad():
            seen = plain(token_prompts.clean[row : row + 1, :length], output_attentions=True).attentions
        for number, node in enumerate(heads):
            expected = seen[node.layer][0, node.head]
            torch.testing.assert_close(found[number, row, :length, :length], expected, atol=2e-6, rtol=1e-5)
            assert found[number, row, length:].eq(0).all() and found[number, row, :, length:].eq(0).all()
