import copy

import pytest
import torch

from neuroplast.comparison.text import divergence, log_likelihood, sample_text
from neuroplast.errors import InputError
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model


@pytest.fixture(scope="module")
def tiny() -> Network:
    return load_model("tiny")


def test_text_of_a_model_is_a_function_of_its_seed_and_diverges_from_itself_by_nothing(tiny: Network):
    text = sample_text(tiny, 5, 12, seed=1)
    assert text.tokens.shape == (5, 12) and len(set(text.tokens[:, 0].tolist())) == 1
    assert torch.equal(text.tokens, sample_text(tiny, 5, 12, seed=1).tokens)
    assert not torch.equal(text.tokens, sample_text(tiny, 5, 12, seed=2).tokens)
    assert not divergence(tiny, text).any()


@torch.no_grad()
def test_divergence_and_likelihood_are_those_of_the_plain_model(tiny: Network):
    other = load_model("tiny")
    for weight in other.module.parameters():
        weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    text = sample_text(tiny, 40, 12, seed=1)
    said, other_said = (
        model.module(input_ids=text.tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        for model in (tiny, other)
    )
    slow = (said.exp() * (said - other_said)).sum(-1).mean(1)
    torch.testing.assert_close(divergence(other, text).double(), slow, rtol=1e-4, atol=1e-6)
    likely = other_said.gather(2, text.tokens[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(log_likelihood(other, text.tokens).double(), likely, rtol=1e-4, atol=1e-6)
    assert slow.min() > 1e-4


def test_samples_come_from_what_the_model_expects(tiny: Network):
    second = sample_text(tiny, 400, 2, seed=0).tokens[:, 1]
    expected = sample_text(tiny, 1, 2).log_probabilities[0, 0].exp()
    likely = expected.argmax()
    assert float((second == likely).float().mean()) == pytest.approx(float(expected[likely]), abs=0.1)


def test_a_tokenizer_without_a_beginning_is_refused(tiny: Network):
    odd = copy.copy(tiny)
    odd.tokenizer = copy.deepcopy(tiny.tokenizer)
    odd.tokenizer.bos_token = odd.tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a BOS nor an EOS token"):
        sample_text(odd)
