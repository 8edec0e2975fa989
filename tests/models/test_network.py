import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
)

from architectures import random_model, random_weights
from neuroplast.errors import InputError, UnsupportedModelError
from neuroplast.interventions.activation_patching import activation_patch
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.attention import AttentionCall, tapped
from neuroplast.models.build import build_network
from neuroplast.models.network import Network, logits_at
from neuroplast.models.recording import Edit, at_positions
from neuroplast.models.replay import record
from neuroplast.tasks.prompts import PromptSet

SMALL = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}


def test_logits_at_a_position_are_those_of_the_plain_model(network: Network, token_prompts: PromptSet):
    end = token_prompts.positions["end"]
    ours = network.logits(token_prompts.clean, end)
    network.module.set_attn_implementation("eager")
    for row in range(len(token_prompts)):
        alone = network.module(input_ids=token_prompts.clean[row : row + 1, : end[row] + 1]).logits[0, -1]
        torch.testing.assert_close(ours[row], alone, atol=1e-4, rtol=1e-4)


def test_a_recording_adds_up_to_the_attention_output(network: Network, token_prompts: PromptSet):
    recording = record(network, token_prompts.clean, ["z", "attention"])
    zeros = record(network, token_prompts.counterfactual, ["z", "attention"])
    for layer in range(network.n_layers):
        change = recording.z[layer] - zeros.z[layer]
        summed = torch.einsum("pthf,hfd->ptd", change, network.head_weights(layer))
        torch.testing.assert_close(summed, recording.attention[layer] - zeros.attention[layer], atol=1e-4, rtol=1e-4)


def test_replaying_every_layer_gives_the_models_own_logits(network: Network, token_prompts: PromptSet):
    recording = record(network, token_prompts.clean, ["residual", "attention"])
    end = token_prompts.positions["end"][:, None]
    residual = at_positions(recording.residual[0], end)
    for layer in range(network.n_layers):
        residual = network.run_layer(layer, residual, attention=at_positions(recording.attention[layer], end))
    choices = torch.stack([token_prompts.answer, token_prompts.foil], dim=1)
    logits = network.logits(token_prompts.clean, token_prompts.positions["end"])
    torch.testing.assert_close(
        network.readout(residual[:, 0], choices), logits.gather(1, choices), atol=1e-4, rtol=1e-4
    )


def test_keys_and_values_of_one_query_change_its_output_only(network: Network, token_prompts: PromptSet):
    mine, other = (
        record(network, tokens, ["query", "key", "value", "z"])
        for tokens in (token_prompts.clean, token_prompts.counterfactual)
    )
    layer, head, query = 1, 2, 5
    where = torch.zeros(len(token_prompts), 1, token_prompts.width, dtype=torch.bool)
    where[:, :, query] = True
    keys, values = (
        kept[layer][:, network.kv_head(head)].flatten(1)[:, None, None] for kept in (other.key, other.value)
    )
    edits = [
        Edit("query", where, other.query[layer][:, head, None], head),
        Edit("keys", where, keys, head),
        Edit("values", where, values, head),
    ]
    edited = record(network, token_prompts.clean, ["z"], edits={layer: edits}).z[layer]
    torch.testing.assert_close(edited[:, query, head], other.z[layer][:, query, head], atol=1e-5, rtol=1e-5)
    edited[:, query, head] = mine.z[layer][:, query, head]
    torch.testing.assert_close(edited, mine.z[layer], atol=1e-6, rtol=1e-6)


def test_nothing_is_left_behind_after_an_error(network: Network, token_prompts: PromptSet):
    end = token_prompts.positions["end"]
    before = network.logits(token_prompts.clean, end)

    def fails(call: AttentionCall) -> torch.Tensor:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), tapped(fails):
        network.logits(token_prompts.clean, end)
    rows = torch.zeros(2, network.d_model)
    with pytest.raises(RuntimeError, match="dtype"):
        network.run_layer(0, rows[None].double(), attention=rows[None].double())
    with pytest.raises(IndexError):
        network.readout(rows, torch.tensor([[10_000], [0]]))
    assert torch.equal(network.logits(token_prompts.clean, end), before)
    assert all("forward" not in vars(part) for part in network.module.modules())
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in network.module.modules())


def test_logits_at_places_can_be_trained_on(network: Network, token_prompts: PromptSet):
    places = logits_at(network.module, token_prompts.clean, torch.tensor([0, 0, 1]), torch.tensor([2, 5, 4]))
    everything = network.module(input_ids=token_prompts.clean, use_cache=False).logits
    torch.testing.assert_close(places, everything[[0, 0, 1], [2, 5, 4]], atol=1e-5, rtol=1e-5)
    places.sum().backward()
    assert all(parameter.grad is not None for parameter in network.module.parameters())


@pytest.mark.parametrize(
    "config",
    [
        PhiConfig(**WIDE),
        OPTConfig(**{**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 16}),
        Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=16, sliding_window=4),
        Phi3Config(**WIDE, num_key_value_heads=2, intermediate_size=48),
        GraniteConfig(**WIDE, num_key_value_heads=2, intermediate_size=48),
        CohereConfig(**WIDE, num_key_value_heads=2, intermediate_size=48),
        MixtralConfig(**WIDE, num_key_value_heads=2, intermediate_size=48, num_local_experts=2),
    ],
    ids=lambda config: config.model_type,
)
def test_further_families_pass_the_checks_at_load_and_are_patched_exactly(config, named_prompts: PromptSet):
    network = build_network(random_weights(config), None, "further")
    assert (network.n_layers, network.n_heads) == (2, 4)
    # Whatever is patched everywhere turns the clean run into the counterfactual one.
    everything = "+".join(["input", "m0", "m1", *(f"a{layer}.h{head}" for layer in (0, 1) for head in range(4))])
    for found in (
        path_patch(network, named_prompts, senders=everything),
        activation_patch(network, named_prompts, sites="r0, r1"),
    ):
        whole = (found.counterfactual - found.clean).expand_as(found.effects)
        assert whole.abs().max() > 0.01
        torch.testing.assert_close(found.effects, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        GPTJConfig(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4),
        BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4),
        MambaConfig(**SMALL, hidden_size=32, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_does_not_fit_is_refused_by_name(config):
    with pytest.raises(UnsupportedModelError, match=r"model 'odd' .*AttentionInterface"):
        build_network(AutoModelForCausalLM.from_config(config), None, "odd")


def test_prompts_that_do_not_fit_the_model_are_refused(network: Network):
    with pytest.raises(InputError, match=r"up to 33 tokens, the model's context only 32"):
        network.logits(torch.ones(1, 33, dtype=torch.long), torch.tensor([3]))
    with pytest.raises(InputError, match="gives token 60, the model knows 60"):
        network.logits(torch.full((1, 4), 60), torch.tensor([3]))


def test_a_model_whose_weights_are_not_numbers_is_refused(network: Network):
    with torch.no_grad():
        network.module.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="not finite numbers"):
        build_network(network.module, None, "broken")


@pytest.mark.parametrize("devices", [{"model.embed_tokens": 0, "model.layers": 1}, {"model": "cpu", "lm_head": "disk"}])
def test_a_model_spread_over_devices_is_refused(devices):
    module = random_model("llama")
    module.hf_device_map = devices
    with pytest.raises(
        UnsupportedModelError, match=r"model 'wide' is spread over .* expected all weights on one device"
    ):
        build_network(module, None, "wide")


def test_a_model_mapped_to_one_device_is_taken():
    module = random_model("llama")
    module.hf_device_map = {"": "cpu"}
    assert build_network(module, None, "whole").device.type == "cpu"
