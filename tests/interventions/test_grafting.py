import copy

import pytest
import torch

from checkpoints import changed, slices
from neuroplast.components import HEAD_KINDS, Component
from neuroplast.errors import InputError
from neuroplast.interventions.grafting import graft
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.models.weights import WeightMap, choose_pieces, grafted
from neuroplast.tasks.prompts import PromptSet
from oracle import prompts_of


def slowly_grafted(family: str, receiver: Network, donor: Network, components) -> Network:
    """A copy of the receiver with slices of the donor's weights, as the family's own code cuts them."""
    module = copy.deepcopy(receiver.module)
    theirs = dict(donor.module.named_parameters())
    group = receiver.n_heads // receiver.parts.n_kv_heads
    wanted = {
        Component(each.kind, each.layer, each.head // group) if each.kind in ("k", "v") else each for each in components
    }
    with torch.no_grad():
        for name, weight in module.named_parameters():
            for component, part in slices(family, name, weight):
                if component in wanted:
                    weight[part] = theirs[name][part]
    return build_network(module, None, family)


def slow_difference(model: Network, prompts: PromptSet) -> torch.Tensor:
    found = []
    for prompt in prompts_of(prompts):
        logits = model.module(input_ids=prompt.clean[None], use_cache=False).logits[0, -1]
        found.append(logits[prompt.answer] - logits[prompt.foil])
    return torch.stack(found)


GRAFTS = (
    *((Component(kind, 1, 2),) for kind in HEAD_KINDS),
    tuple(Component(kind, 0, 3) for kind in HEAD_KINDS),
    (Component("mlp", 2),),
    (Component("norm", 0), Component("norm", 2)),
    (Component("norm"),),
    (Component("embedding"),),
    (Component("unembedding"), Component("o", 2, 0)),
)


@torch.no_grad()
def test_grafts_agree_with_models_made_of_slices(family: str, network: Network, token_prompts: PromptSet):
    donor = changed(family)
    tied = network.module.config.tie_word_embeddings
    before = {name: weight.clone() for name, weight in network.module.named_parameters()}
    grafts = GRAFTS[:-1] if tied else GRAFTS
    found = graft(network, donor, token_prompts, grafts)
    unchanged = slow_difference(network, token_prompts)
    torch.testing.assert_close(found.receiver, unchanged, rtol=0, atol=1e-4)
    for row, components in enumerate(grafts):
        slow = slow_difference(slowly_grafted(family, network, donor, components), token_prompts) - unchanged
        torch.testing.assert_close(found.effects[row], slow, rtol=0, atol=1e-4)
        assert slow.abs().max() > 1e-4, f"an oracle that only sees zeros shows nothing: {components}"
    for name, weight in network.module.named_parameters():
        assert torch.equal(weight, before[name]), f"{name} was not put back"


def test_all_weights_make_the_donor_and_its_own_change_nothing(family: str, network: Network, token_prompts: PromptSet):
    donor, everything = changed(family), [*WeightMap(network).pieces()]
    found = graft(network, donor, token_prompts, [everything])
    torch.testing.assert_close(found.receiver + found.effects[0], found.donor, rtol=0, atol=1e-5)
    assert not graft(network, network, token_prompts, [[each] for each in everything]).effects.any()


def test_the_receiver_is_itself_again_after_an_error(network: Network, family: str):
    donor = changed(family)
    pieces = choose_pieces(WeightMap(network).pieces(), [Component("mlp", 1)])
    before = {name: weight.clone() for name, weight in network.module.named_parameters()}
    with pytest.raises(RuntimeError, match="on the way"), grafted(network, donor, pieces):
        name = pieces[0].name
        assert torch.equal(network.module.get_parameter(name), donor.module.get_parameter(name))
        raise RuntimeError("on the way")
    assert all(torch.equal(weight, before[name]) for name, weight in network.module.named_parameters())


def test_what_no_weights_have_is_refused(network: Network, token_prompts: PromptSet, family: str):
    with pytest.raises(InputError, match="unknown part of the weights 'm9': did you mean"):
        graft(network, changed(family), token_prompts, [[Component("mlp", 9)]])
    with pytest.raises(InputError, match="0 grafts"):
        graft(network, changed(family), token_prompts, [])
