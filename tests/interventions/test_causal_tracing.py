"""Causal tracing against full forward passes: noise on the embedding module's output, hooks on what is restored."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from architectures import random_model
from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.interventions import causal_tracing, chunks
from neuroplast.interventions.causal_tracing import KINDS, Noise, causal_trace, embedding_deviation, restore
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet
from oracle import Oracle, draw_noise, noised_run, prompts_of, tracing_effect

SEED = 4


def by_hand(layer: int, window: int) -> list[int]:
    """Rows of the paper's code: from window // 2 below the layer, as many as the window has, inside the model."""
    return [each for each in range(layer - window // 2, layer + -(-window // 2)) if 0 <= each < 3]


@pytest.mark.parametrize(("noised", "window"), [(("a", "b"), 2), (("b",), 3), (("b", "end"), 1)])
def test_every_restored_value_is_what_a_full_forward_pass_gives(
    network: Network, named_prompts: PromptSet, family: str, noised, window: int
):
    found = causal_trace(network, named_prompts, noised=noised, sigma=0.7, n_noise=2, window=window, seed=SEED)
    oracle, prompts = Oracle(random_model(family), family), prompts_of(named_prompts)
    noises = [
        [draw_noise(prompt, (SEED, draw, row), noised, 0.7, network.d_model) for draw in range(2)]
        for row, prompt in enumerate(prompts)
    ]
    for kind, name in enumerate(KINDS):
        for layer in range(3):
            layers = [layer] if name == "residual" else by_hand(layer, window)
            for place, position in enumerate(("a", "b", "end")):
                nodes = [Node(name, each, position=position) for each in layers]
                slow = [tracing_effect(oracle, *each, nodes) for each in zip(prompts, noises, strict=True)]
                fast = found.effects[kind, layer, place]
                torch.testing.assert_close(fast, torch.stack(slow), atol=1e-4, rtol=1e-4)
    clean = torch.stack([prompt.ld(oracle.run(prompt.clean)) for prompt in prompts])
    torch.testing.assert_close(found.clean, clean, atol=1e-4, rtol=1e-4)
    after = [
        torch.stack([prompt.ld(noised_run(oracle, prompt, noise, {})) for noise in drawn]).mean()
        for prompt, drawn in zip(prompts, noises, strict=True)
    ]
    torch.testing.assert_close(found.noised, torch.stack(after), atol=1e-4, rtol=1e-4)
    assert (found.effects.abs().amax(dim=-1) > 1e-4).any(dim=1).all(), "an oracle that only sees zeros shows nothing"


def test_the_embeddings_restored_at_all_noised_positions_bring_everything_back(
    network: Network, named_prompts: PromptSet
):
    group = (Node("residual", 0, position="a"), Node("residual", 0, position="b"))
    effects, clean, noised = restore(network, named_prompts, [group], Noise(("a", "b"), 0.7, 3, SEED))
    torch.testing.assert_close(effects[0] + noised, clean, atol=1e-4, rtol=1e-4)
    assert ((clean - noised).abs() > 1e-2).all()
    found = causal_trace(network, named_prompts, noised="b", sigma=0.7)
    torch.testing.assert_close(found.effects[0, 0, 1], found.clean - found.noised, atol=1e-4, rtol=1e-4)


def test_what_stands_before_the_noise_or_is_not_reached_by_it_brings_back_exactly_nothing(
    network: Network, token_prompts: PromptSet
):
    early = torch.full((len(token_prompts),), 2)
    prompts = replace(token_prompts, positions={"early": early, "late": early + 3, **token_prompts.positions})
    found = causal_trace(network, prompts, noised="late", sigma=0.7)
    assert not found.effects[:, :, 0].any() and found.effects[:, :, 1].any()
    assert not found.effects[0, 0, 2].any() and found.effects[0, 1, 2].any()


def test_noise_that_changes_no_digit_has_exactly_no_effects(network: Network, named_prompts: PromptSet):
    found = causal_trace(network, named_prompts, sigma=1e-30)
    assert not found.effects.any()
    torch.testing.assert_close(found.noised, found.clean, atol=1e-5, rtol=1e-5)
    shares = found.shares()
    assert shares.values is None and "undefined" in (shares.why or "")


def test_noise_is_three_deviations_of_what_the_embedding_gives(network: Network, named_prompts: PromptSet):
    tokens = torch.arange(network.module.config.vocab_size)
    whole = network.module.get_input_embeddings()(tokens).std().item()
    assert embedding_deviation(network) == pytest.approx(whole, rel=1e-5)
    found = causal_trace(network, named_prompts, n_noise=1)
    assert found.noise.sigma == pytest.approx(3 * whole, rel=1e-5)
    assert (found.noise.positions, found.noise.draws, found.window) == (("a", "b"), 1, 1)


def test_a_part_at_a_time_gives_the_same_deviation(network: Network, monkeypatch: pytest.MonkeyPatch):
    whole = embedding_deviation(network)
    monkeypatch.setattr(causal_tracing, "ROWS_A_PART", 7)
    assert embedding_deviation(network) == pytest.approx(whole, rel=1e-9)


def test_a_seed_repeats_and_another_does_not(network: Network, named_prompts: PromptSet):
    first, again, other = (causal_trace(network, named_prompts, sigma=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.effects, again.effects) and torch.equal(first.noised, again.noised)
    assert ((first.noised - other.noised).abs() > 1e-3).all()


def test_a_prompts_noise_does_not_depend_on_what_runs_beside_it(network: Network, named_prompts: PromptSet):
    whole = causal_trace(network, named_prompts, sigma=0.5, n_noise=2)
    few = causal_trace(network, named_prompts[:2], sigma=0.5, n_noise=2, kinds="mlp,residual")
    assert few.kinds == ("residual", "mlp")
    torch.testing.assert_close(few.effects, whole.effects[[0, 2]][..., :2], atol=2e-5, rtol=1e-4)


def test_the_random_state_and_how_draws_are_cut_into_chunks_change_nothing(
    network: Network, named_prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(1)
    whole = causal_trace(network, named_prompts, sigma=0.5, n_noise=3)
    monkeypatch.setitem(chunks.ROWS, "cpu", 40)
    few = causal_trace(network, named_prompts, sigma=0.5, n_noise=3)
    torch.testing.assert_close(few.effects, whole.effects, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(few.noised, whole.noised, atol=2e-5, rtol=1e-4)


def test_shares_are_of_what_the_noise_took(network: Network, named_prompts: PromptSet):
    found = causal_trace(network, named_prompts, noised="b", sigma=0.7)
    # The sign of what was taken does not matter, as long as it is sure.
    for sign in (1, -1):
        size = found.clean.abs() + 1
        lost = replace(found, effects=sign * size * found.effects.sign(), clean=sign * size, noised=0 * size)
        shares = lost.shares()
        expected = (lost.effects.mean(-1) / lost.clean.mean()).numpy()
        np.testing.assert_allclose(shares.values, expected, rtol=1e-5, atol=1e-7)
        assert shares.low is not None and shares.high is not None
        assert (shares.low <= shares.values + 1e-9).all() and (shares.values <= shares.high + 1e-9).all()
    unsure = replace(found, clean=torch.tensor([1.0, -1.0, 1.0, -1.0]), noised=torch.zeros(4)).shares()
    assert unsure.values is None and unsure.why == (
        "undefined: the noise changed the logit difference by 0 [-1, 1], within the noise"
    )


def test_by_default_the_tokens_that_have_a_name_of_their_own_are_noised(network: Network, named_prompts: PromptSet):
    index = named_prompts.positions["a"]
    names = {"a": index, "a+1": index + 1, "c+1": index, "end": named_prompts.positions["end"]}
    found = causal_trace(network, replace(named_prompts, positions=names), kinds=["residual"], n_noise=1)
    assert found.noise.positions == ("a", "c+1") and found.positions == tuple(names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "σ = 0.0: expected a number above 0"),
        ({"sigma": -1.0}, "expected a number above 0"),
        ({"sigma": float("nan")}, "expected a number above 0"),
        ({"sigma": float("inf")}, "expected a number above 0"),
        ({"noised": "a,ends"}, "unknown position 'ends': did you mean 'end'"),
        ({"noised": []}, "no tokens to noise"),
        ({"kinds": ["mpl"]}, "unknown kind of value to restore 'mpl': did you mean 'mlp'"),
        ({"kinds": []}, "nothing to restore"),
        ({"window": 0}, "window of 0 layers: expected at least 1"),
        ({"n_noise": 0}, "0 draws of the noise"),
        ({"seed": -1}, "seed -1 of the noise"),
    ],
)
def test_bad_input_is_one_clear_line(network: Network, named_prompts: PromptSet, settings: dict, message: str):
    with pytest.raises(InputError, match=message) as caught:
        causal_trace(network, named_prompts, **settings)
    assert "\n" not in str(caught.value)


def test_prompts_without_names_must_say_what_is_noised(network: Network, token_prompts: PromptSet):
    with pytest.raises(InputError, match="say which to noise"):
        causal_trace(network, token_prompts)
    assert causal_trace(network, token_prompts, noised="end", n_noise=1).effects.any()


def test_no_prompts_are_refused(network: Network, named_prompts: PromptSet):
    with pytest.raises(InputError, match="there are no prompts"):
        causal_trace(network, named_prompts[:0])
