import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from architectures import random_model
from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, path_effect, prompts_of

FEW = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
positions = st.sampled_from([None, "a", "end"])
heads = st.builds(Node, st.just("head"), st.sampled_from(range(3)), st.sampled_from(range(4)), positions)
receivers = st.sampled_from(
    [(Node("logits"),), (Node("head", 2, 1, "end", "q"),), (Node("head", 1, 3, "a", "v"), Node("mlp", 2))]
)


def knocked_values(oracle: Oracle, prompts: PromptSet, heads: list[Node]):
    """For each prompt, what the heads are replaced by: their mean over counterfactuals of the same length."""
    texts = prompts_of(prompts)
    runs = [oracle.run(text.counterfactual) for text in texts]
    found = []
    for text in texts:
        alike = [run for run, other in zip(runs, texts, strict=True) if len(other.clean) == len(text.clean)]
        replace = {}
        for node in heads:
            key = ("z", node.layer, node.head)
            where = text.where(node.position)
            if key in replace:
                where = where | replace[key][0]
            replace[key] = (where, torch.stack([run.seen[key] for run in alike]).mean(0))
        found.append(replace)
    return found


@FEW
@given(
    sender=heads, knocked=st.lists(heads, min_size=1, max_size=2, unique=True), targets=receivers,
    mlps=st.sampled_from(["live", "frozen"]),
)  # fmt: skip
def test_paths_in_a_model_without_some_heads(network, named_prompts, family, sender, knocked, targets, mlps):
    fast = path_patch(
        network, named_prompts, senders=[sender], receivers=targets, mlps=mlps, knocked_out=knocked
    )  # fmt: skip
    oracle = Oracle(random_model(family), family)
    values = knocked_values(oracle, named_prompts, knocked)
    slow = [
        path_effect(oracle, prompt, [sender], targets, mlps, replace)
        for prompt, replace in zip(prompts_of(named_prompts), values, strict=True)
    ]
    torch.testing.assert_close(fast.effects[0], torch.stack(slow), atol=1e-4, rtol=1e-4)


def test_a_knocked_out_head_carries_nothing(network: Network, token_prompts: PromptSet):
    gone = path_patch(network, token_prompts, senders="a1.h2", knocked_out="a1.h2")
    here = path_patch(network, token_prompts, senders="a1.h2")
    assert gone.effects.abs().max() < 1e-5 < here.effects.abs().max()


def test_only_heads_can_be_knocked_out(network: Network, token_prompts: PromptSet):
    with pytest.raises(InputError, match="m1 cannot be knocked out"):
        path_patch(network, token_prompts, knocked_out="a1.h2, m1")
