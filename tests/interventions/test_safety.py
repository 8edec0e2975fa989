"""Whatever goes wrong inside an intervention, the model is afterwards as it was."""

import sys

import pytest
import torch

from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.causal_tracing import causal_trace
from neuroplast.interventions.edge_attribution import attribute_edges
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

INTERVENTIONS = {
    "path": lambda model, prompts: path_patch(model, prompts, senders="all"),
    "path to heads": lambda model, prompts: path_patch(model, prompts, receivers="a2.h1<q>@end, a1.h0<v>@a, m2"),
    "direct paths": lambda model, prompts: path_patch(model, prompts, mlps="frozen", receivers="m1"),
    "path without heads": lambda model, prompts: path_patch(model, prompts, knocked_out="a1.h1"),
    "activation": lambda model, prompts: activation_patch(
        model, prompts, sites="heads@a, q@end, k, pattern, m1, r2@b, a0"
    ),
    "tracing": lambda model, prompts: causal_trace(model, prompts, window=2, n_noise=1),
    "attribution": lambda model, prompts: attribute_edges(model, prompts, method="ceap", steps=2),
    "edges": lambda model, prompts: patch_edges(model, prompts, receivers="a1.h0<k>, m2, logits"),
}


class Calls:
    """A function that fails after some calls."""

    def __init__(self, real) -> None:
        self.real, self.made, self.left = real, 0, None

    def __call__(self, *args, **kwargs):
        if self.made == self.left:
            raise FloatingPointError("in the middle")
        self.made += 1
        return self.real(*args, **kwargs)


def state_of(network: Network, prompts: PromptSet):
    hooks = [
        (len(part._forward_hooks), len(part._forward_pre_hooks), "forward" in vars(part))
        for part in network.module.modules()
    ]
    logits = network.logits(prompts.clean, prompts.positions["end"])
    gradients = [parameter.grad for parameter in network.module.parameters()]
    return hooks, logits, gradients, torch.random.get_rng_state()


@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.usefixtures("unchecked")
def test_after_an_error_anywhere_the_model_is_bit_for_bit_as_before(
    network: Network, named_prompts: PromptSet, monkeypatch: pytest.MonkeyPatch, name: str
):
    run = INTERVENTIONS[name]
    run(network, named_prompts)  # the first run calls more: it derives what the model keeps
    before = state_of(network, named_prompts)
    attention = sys.modules[type(network.attentions[0]).__module__]
    # Deep in the model, and between its parts.
    places = [(attention, "eager_attention_forward"), (torch, "bmm"), (torch, "einsum"), (torch, "stack")]
    calls = [Calls(getattr(*place)) for place in places]
    for place, counted in zip(places, calls, strict=True):
        monkeypatch.setattr(*place, counted)
    run(network, named_prompts)
    monkeypatch.undo()
    assert calls[0].made
    for place, counted in zip(places, calls, strict=True):
        for share in (0.0, 0.3, 0.7, 0.99) if counted.made else ():
            failing = Calls(counted.real)
            failing.left = int(share * counted.made)
            monkeypatch.setattr(*place, failing)
            with pytest.raises(FloatingPointError, match="in the middle"):
                run(network, named_prompts)
            monkeypatch.undo()
            after = state_of(network, named_prompts)
            assert after[0] == before[0] and all(gradient is None for gradient in after[2])
            assert torch.equal(after[1], before[1]) and torch.equal(after[3], before[3])
