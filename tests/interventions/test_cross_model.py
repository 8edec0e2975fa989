import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from architectures import random_model
from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.interventions.cross_model import cross_patch
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, Prompt, key_of, prompts_of
from places import sites

FEW = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORDS = ["heads", "q", "k", "v", "keys", "pattern", "values", "attention", "mlps", "residual"]


def tuned_model(family: str):
    """The random model with noise on all weights."""
    model = random_model(family)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def tuned(family: str) -> Network:
    return build_network(tuned_model(family), None, "tuned")


def slow_effect(receiver: Oracle, donor: Oracle, prompt: Prompt, group, projection: str = "receiver"):
    """Both models in full; the donor's values replaced, or what heads write added, by hooks."""
    base, other = receiver.run(prompt.clean), donor.run(prompt.clean)
    replace: dict = {}
    for node in group:
        key, where = key_of(node), prompt.where(node.position)
        replace[key] = (where | replace[key][0] if key in replace else where, other.seen[key])
    if projection == "donor":
        (node,) = group
        where, z = replace.pop(key_of(node))

        def written(oracle: Oracle, value: torch.Tensor) -> torch.Tensor:
            weight = oracle.part("projection", node.layer).weight
            weight = weight if oracle.model.config.model_type == "gpt2" else weight.T
            width = value.shape[-1]
            return value @ weight[node.head * width : (node.head + 1) * width]

        with torch.no_grad():
            change = written(donor, z) - written(receiver, base.seen[key_of(node)])
        key = ("attention", node.layer, 0)
        replace[key] = (where, base.seen[key] + change)
    return prompt.ld(receiver.run(prompt.clean, replace)) - prompt.ld(base)


def compare(found, family: str, prompts: PromptSet, back: bool = False):
    oracles = [Oracle(model, family) for model in (random_model(family), tuned_model(family))]
    receiver, donor = reversed(oracles) if back else oracles
    for row, group in enumerate(found.sites):
        slow = [slow_effect(receiver, donor, prompt, group, found.projection) for prompt in prompts_of(prompts)]
        torch.testing.assert_close(found.effects[row], torch.stack(slow), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("word", WORDS)
def test_every_kind_of_place_at_every_named_position(
    network: Network, tuned: Network, named_prompts: PromptSet, family: str, word: str
):
    found = cross_patch(network, tuned, named_prompts, sites=f"{word}@each")
    some = torch.linspace(0, len(found.sites) - 1, 6).long()
    few = cross_patch(network, tuned, named_prompts, sites=[found.sites[row] for row in some])
    torch.testing.assert_close(few.effects, found.effects[some], atol=1e-5, rtol=1e-5)
    compare(few, family, named_prompts)
    assert (found.effects.abs().amax(dim=1) > 1e-4).any(), "an oracle that only sees zeros shows nothing"


def test_all_inputs_of_a_head_together_are_its_output_and_two_of_them_its_pattern(
    network: Network, tuned: Network, named_prompts: PromptSet
):
    def groups(*channels: str | None):
        return [
            [Node("head", layer, layer + 1, position, channel) for channel in channels]
            for layer in range(3)
            for position in ("end", "a", None)
        ]

    found = [
        cross_patch(network, tuned, named_prompts, sites=groups(*channels)).effects
        for channels in (("q", "keys", "values"), (None,), ("q", "keys"), ("pattern",), ("keys", "values"))
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], found[3], atol=1e-5, rtol=1e-5)
    assert min((found[4] - other).abs().max() for other in found[:4]) > 1e-3


@pytest.mark.parametrize(("held", "live"), [("keys", "k"), ("values", "v")])
def test_what_one_query_sees_changes_no_other_positions_output(
    network: Network, tuned: Network, named_prompts: PromptSet, held: str, live: str
):
    # Behind the last layer only END is read.
    effects = [
        cross_patch(network, tuned, named_prompts, sites=f"a2.h1<{channel}>@b").effects[0] for channel in (held, live)
    ]
    elsewhere = named_prompts.positions["b"] != named_prompts.positions["end"]
    assert effects[0][elsewhere].abs().max() < 1e-5
    assert effects[1][elsewhere].abs().max() > 1e-3


@FEW
@given(groups=st.lists(sites, min_size=2, max_size=4, unique=True), back=st.booleans())
def test_any_places_together_in_both_directions(network, tuned, named_prompts, family, groups, back):
    pair = (tuned, network) if back else (network, tuned)
    compare(cross_patch(*pair, named_prompts, sites=groups), family, named_prompts, back)


@pytest.mark.parametrize("position", ["end", "a", "all"])
def test_a_head_through_the_donors_projection(
    network: Network, tuned: Network, named_prompts: PromptSet, family: str, position: str
):
    nodes = [Node("head", layer, 1, None if position == "all" else position) for layer in range(3)]
    found = cross_patch(network, tuned, named_prompts, sites=nodes, projection="donor")
    compare(found, family, named_prompts)
    other = cross_patch(network, tuned, named_prompts, sites=nodes)
    assert (found.effects - other.effects).abs().max() > 1e-3


@pytest.mark.parametrize("projection", ["receiver", "donor"])
def test_a_model_patched_into_itself_is_exactly_unchanged(network: Network, named_prompts: PromptSet, projection: str):
    found = cross_patch(network, network, named_prompts, sites=WORDS, projection=projection)
    assert len(found.sites) > 60 and not found.effects.any()
    assert torch.equal(found.receiver, found.donor)


def test_all_of_the_residual_stream_carries_the_whole_change(
    network: Network, tuned: Network, token_prompts: PromptSet
):
    # The last layer and the ending are the receiver's; with these the same, nothing is left.
    with torch.no_grad():
        mine, theirs = (dict(model.module.named_parameters()) for model in (network, tuned))
        for name, weight in theirs.items():
            inner = ".layers.0." in name or ".h.0." in name or ".layers.1." in name or ".h.1." in name
            if not inner:
                weight.copy_(mine[name])
    found = cross_patch(network, tuned, token_prompts, sites="r2")
    torch.testing.assert_close(found.effects[0], found.donor - found.receiver, atol=1e-4, rtol=1e-4)


def test_bad_input_is_refused(network: Network, tuned: Network, token_prompts: PromptSet, family: str):
    with pytest.raises(InputError, match="did you mean 'donor'"):
        cross_patch(network, tuned, token_prompts, projection="doner")
    other = build_network(random_model("llama" if family == "gpt2" else "gpt2"), None, "other")
    with pytest.raises(InputError, match="cannot be compared"):
        cross_patch(network, other, token_prompts)
