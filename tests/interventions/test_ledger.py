import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from architectures import SHAPE, random_model, random_weights
from checkpoints import changed, slices
from neuroplast.components import HEAD_KINDS, Component
from neuroplast.errors import InputError
from neuroplast.interventions.ledger import build_ledger
from neuroplast.models.between import Between
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet
from oracle import Prompt, prompts_of


def slow_ledger(family: str, start: Network, end: Network, prompt: Prompt, points: int = 32) -> dict[Component, float]:
    """Gradients of the weights themselves, of one prompt, at many points."""
    model = copy.deepcopy(start.module).requires_grad_(True)
    ends = [dict(each.module.named_parameters()) for each in (start, end)]
    found: dict[Component, float] = {}
    for way, weight in zip(*np.polynomial.legendre.leggauss(points), strict=True):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.lerp(ends[0][name], ends[1][name], (1 + way) / 2))
        model.zero_grad()
        logits = model(input_ids=prompt.clean[None], use_cache=False).logits[0, -1]
        (logits[prompt.answer] - logits[prompt.foil]).backward()
        for name, parameter in model.named_parameters():
            worth = parameter.grad * (ends[1][name] - ends[0][name]).detach()
            for component, part in slices(family, name, parameter):
                found[component] = found.get(component, 0.0) + weight / 2 * float(worth[part].sum())
    return found


def test_every_component_agrees_with_gradients_of_the_weights(family: str, token_prompts: PromptSet):
    start, end = build_network(random_model(family), None, family), changed(family)
    few = token_prompts[:2]
    ledger = build_ledger(start, end, few, tolerance=1e-4)
    assert ledger.error <= 1e-4
    grouped = start.n_heads // start.parts.n_kv_heads
    tied = start.module.config.tie_word_embeddings
    for column, prompt in enumerate(prompts_of(few)):
        shares: dict[Component, float] = {}
        for component, share in zip(ledger.components, ledger.shares[:, column].tolist(), strict=True):
            if component.kind in "kv":
                component = Component(component.kind, component.layer, component.head // grouped)
            if tied and component.kind == "unembedding":
                component = Component("embedding")
            shares[component] = shares.get(component, 0.0) + share
        slow = slow_ledger(family, start, end, prompt)
        assert set(slow) <= set(shares)
        for component, share in shares.items():
            assert share == pytest.approx(slow.get(component, 0.0), abs=2e-5), str(component)
        assert max(map(abs, slow.values())) > 1e-2, "an oracle that only sees zeros shows nothing"


def test_a_model_against_itself_is_exactly_nothing(network: Network, token_prompts: PromptSet):
    ledger = build_ledger(network, network, token_prompts)
    assert not ledger.shares.any() and not ledger.change.any()
    assert (ledger.points, ledger.error) == (0, 0.0)


O_PART = {
    "gpt2": ("transformer.h.1.attn.c_proj.weight", slice(16, 24)),
    "gpt_neox": ("gpt_neox.layers.1.attention.dense.weight", (slice(None), slice(16, 24))),
}


def test_a_change_of_one_output_map_is_stored_there_alone(family: str, network: Network, token_prompts: PromptSet):
    only = O_PART.get(family, ("model.layers.1.self_attn.o_proj.weight", (slice(None), slice(32, 48))))
    ledger = build_ledger(network, changed(family, only=only), token_prompts)
    row = ledger.components.index(Component("o", 1, 2))
    others = [other for other in range(len(ledger.components)) if other != row]
    assert not ledger.shares[others].any()
    assert ledger.error <= 0.01
    torch.testing.assert_close(ledger.shares[row], ledger.change, rtol=0.05, atol=1e-3)
    assert float(ledger.by_head("o")[1, 2].abs().max()) > 1e-2
    torch.testing.assert_close(ledger.by_head().sum(dim=(0, 1)), ledger.shares.sum(dim=0))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_shared_keys_are_split_by_the_heads_that_use_them(family: str, network: Network, token_prompts: PromptSet):
    # Head 2 shares its keys and values with head 3, and here gives nothing on.
    end = changed(family)
    for model in (network, end):
        with torch.no_grad():
            model.head_weights(1)[2] = 0
    ledger = build_ledger(network, end, token_prompts)
    for kind in HEAD_KINDS[:3]:
        grid = ledger.by_head(kind)
        assert not grid[1, 2].any() and grid[1, 3].abs().max() > 1e-4


def test_the_line_ends_at_the_checkpoints_to_the_bit(network: Network, family: str):
    end = changed(family)
    between = Between(network, end)
    for way, model in ((0.0, network), (1.0, end)):
        between.go(way)
        for (name, weight), other in zip(
            between.model.module.named_parameters(), model.module.parameters(), strict=True
        ):
            assert torch.equal(weight, other), name
    assert network.module.get_parameter(name).data_ptr() != weight.data_ptr()


def test_what_is_no_pair_of_checkpoints_is_refused(token_prompts: PromptSet):
    llama, gpt2 = (build_network(random_model(family), None, family) for family in ("llama", "gpt2"))
    with pytest.raises(InputError, match="LlamaForCausalLM and GPT2LMHeadModel"):
        build_ledger(llama, gpt2, token_prompts)
    other = random_weights(LlamaConfig(**SHAPE | {"num_attention_heads": 2}, num_key_value_heads=1, head_dim=32))
    with pytest.raises(InputError, match="4 heads of width 16 and 2 of width 32"):
        build_ledger(llama, build_network(other, None, "other"), token_prompts)
    broken = changed("llama")
    with torch.no_grad():
        broken.module.get_parameter("model.norm.weight")[3] = torch.nan
    with pytest.raises(InputError, match=r"model\.norm\.weight holds \d+ of \d+ numbers that are NaN"):
        build_ledger(llama, broken, token_prompts)
    ours, theirs = build_network(random_model("llama"), None, "ours"), changed("llama")
    ours.tokenizer, theirs.tokenizer = (SimpleNamespace(get_vocab=lambda word=word: {word: 0}) for word in "ab")
    with pytest.raises(InputError, match="their tokenizers have 1 and 1 tokens and differ at 'a'"):
        build_ledger(ours, theirs, token_prompts)
    with pytest.raises(InputError, match="tolerance"):
        build_ledger(llama, llama, token_prompts, tolerance=1.5)
