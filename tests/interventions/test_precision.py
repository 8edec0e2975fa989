"""In bfloat16 the model computes in bfloat16, and everything that is measured stays in float32."""

import pytest
import torch

from architectures import random_model
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

RUNS = {
    "heads": lambda model, prompts: path_patch(model, prompts).effects,
    "heads to q and v": lambda model, prompts: (
        path_patch(model, prompts, receivers="a2.h1<q>@end, a2.h1<v>, a1.h0<v>").effects
    ),
    "direct": lambda model, prompts: path_patch(model, prompts, senders="all", mlps="frozen").effects,
    "residual": lambda model, prompts: activation_patch(model, prompts).effects,
    "patterns": lambda model, prompts: activation_patch(model, prompts, sites="pattern, k@a").effects,
    "attribution": lambda model, prompts: attribute_edges(model, prompts, per_prompt=True).per_prompt,
    "edges": lambda model, prompts: patch_edges(model, prompts, receivers="a1.h0<k>, m2").effects,
}


@pytest.fixture
def rough(family: str) -> Network:
    return build_network(random_model(family).bfloat16(), None, family)


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_bfloat16_gives_what_float32_gives_with_the_same_weights(rough: Network, named_prompts: PromptSet, run):
    found = run(rough, named_prompts)
    rounded = random_model(rough.name).bfloat16().float()
    exact = run(build_network(rounded, None, rough.name), named_prompts)
    assert found.dtype == torch.float32 and exact.abs().max() > 0.05
    # Three decimal digits a number, and effects are differences of logits.
    size = exact.abs().flatten(0, -2).amax(dim=0).clamp(min=1.0)
    assert ((found - exact).abs() / size).quantile(0.9) < 0.1
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.97


def test_logit_differences_are_not_rounded_to_bfloat16(rough: Network, named_prompts: PromptSet):
    clean = path_patch(rough, named_prompts).clean
    assert clean.dtype == torch.float32
    assert not torch.equal(clean, clean.bfloat16().float())
