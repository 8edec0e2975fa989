import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from architectures import random_model
from neuroplast.errors import InputError
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.selection import SITE_WORDS
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, activation_effect, prompts_of
from places import sites

FEW = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def compare(fast, family, prompts, into="clean"):
    oracle = Oracle(random_model(family), family)
    for row, group in enumerate(fast.senders):
        slow = [activation_effect(oracle, prompt, group, into) for prompt in prompts_of(prompts)]
        torch.testing.assert_close(fast.effects[row], torch.stack(slow), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("word", SITE_WORDS)
def test_every_kind_of_place_at_every_named_position(
    network: Network, named_prompts: PromptSet, family: str, word: str
):
    fast = activation_patch(network, named_prompts, sites=f"{word}@each")
    some = torch.linspace(0, len(fast.senders) - 1, 6).long()
    few = activation_patch(network, named_prompts, sites=[fast.senders[row] for row in some])
    torch.testing.assert_close(few.effects, fast.effects[some], atol=1e-5, rtol=1e-5)
    compare(few, family, named_prompts)
    assert (fast.effects.abs().amax(dim=1) > 1e-4).any(), "an oracle that only sees zeros shows nothing"


@FEW
@given(groups=st.lists(sites, min_size=2, max_size=4, unique=True), into=st.sampled_from(["clean", "counterfactual"]))
def test_any_places_together_in_both_directions(network, named_prompts, family, groups, into):
    fast = activation_patch(network, named_prompts, sites=groups, into=into)
    compare(fast, family, named_prompts, into)


def test_the_whole_residual_stream_carries_the_whole_difference(network: Network, token_prompts: PromptSet):
    there = activation_patch(network, token_prompts, sites="residual")
    back = activation_patch(network, token_prompts, sites="residual", into="counterfactual")
    difference = (there.counterfactual - there.clean).expand_as(there.effects)
    torch.testing.assert_close(there.effects, difference, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back.effects, -difference, atol=1e-4, rtol=1e-4)


def test_an_unknown_direction_is_refused(network: Network, token_prompts: PromptSet):
    with pytest.raises(InputError, match="did you mean 'clean'"):
        activation_patch(network, token_prompts, into="cleen")
