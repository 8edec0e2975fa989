from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from architectures import random_model
from neuroplast.components import Node
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, path_effect, prompts_of

LAYERS, HEADS = range(3), range(4)
POSITIONS = st.sampled_from([None, "a", "b", "end", "4"])
FEW = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

heads = st.builds(Node, st.just("head"), st.sampled_from(LAYERS), st.sampled_from(HEADS), POSITIONS)
mlps = st.builds(lambda layer, at: Node("mlp", layer, position=at), st.sampled_from(LAYERS), POSITIONS)
inputs = st.builds(lambda at: Node("input", position=at), POSITIONS)
senders = st.one_of(heads, mlps, inputs)
groups = st.lists(senders, min_size=1, max_size=3).map(tuple)
reads = st.builds(
    lambda head, channel: Node("head", head.layer, head.head, head.position, channel), heads, st.sampled_from("qkv")
)
receivers = st.lists(st.one_of(reads, reads, mlps), min_size=1, max_size=3, unique=True)


def compare(fast, family, prompts, targets, mlps="live"):
    oracle = Oracle(random_model(family), family)
    for row, group in enumerate(fast.senders):
        slow = [path_effect(oracle, prompt, group, targets, mlps) for prompt in prompts_of(prompts)]
        torch.testing.assert_close(fast.effects[row], torch.stack(slow), atol=1e-4, rtol=1e-4)


def test_every_head_into_the_logits_agrees_with_a_full_forward_pass(
    network: Network, token_prompts: PromptSet, family: str
):
    fast = path_patch(network, token_prompts)
    compare(fast, family, token_prompts, [Node("logits")])
    assert fast.by_head().abs().mean(dim=2).min() > 1e-3, "an oracle that only sees zeros shows nothing"


@FEW
@given(groups=st.lists(groups, min_size=2, max_size=4, unique=True), mlps=st.sampled_from(["live", "frozen"]))
def test_any_senders_into_the_logits(network, named_prompts, family, groups, mlps):
    fast = path_patch(network, named_prompts, senders=groups, mlps=mlps)
    compare(fast, family, named_prompts, [Node("logits")], mlps)


@FEW
@given(
    groups=st.lists(groups, min_size=2, max_size=4, unique=True),
    targets=receivers,
    mlps=st.sampled_from(["live", "live", "frozen"]),
)
def test_any_senders_into_any_receivers(network, named_prompts, family, groups, targets, mlps):
    fast = path_patch(network, named_prompts, senders=groups, receivers=targets, mlps=mlps)
    compare(fast, family, named_prompts, targets, mlps)


@pytest.mark.parametrize("mlps", ["live", "frozen"])
@pytest.mark.parametrize("receivers", ["logits", "a2.h1<q>@end, a1.h0<v>@a"])
def test_a_prompt_that_is_its_own_counterfactual_has_no_effects(network, named_prompts, mlps: str, receivers: str):
    same = named_prompts.counterfactual.clone()
    same[1] = named_prompts.clean[1]
    mixed = replace(named_prompts, counterfactual=same)
    found = path_patch(network, mixed, senders="all", receivers=receivers, mlps=mlps).effects
    assert found[:, 1].abs().max() < 1e-5 and found[:, 0].abs().max() > 0.01
    others = path_patch(network, named_prompts, senders="all", receivers=receivers, mlps=mlps).effects
    torch.testing.assert_close(found[:, [0, 2, 3]], others[:, [0, 2, 3]], atol=2e-5, rtol=1e-4)
