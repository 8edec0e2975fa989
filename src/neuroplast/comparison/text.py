"""How far a checkpoint's language moved: KL divergence and perplexity on text that the start itself wrote.

The start's own samples are text on which it is at home, whatever it was trained on, so no corpus is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuroplast.errors import InputError
from neuroplast.models.network import Network, logits_at

SAMPLES, LENGTH = 16, 48
ROWS = 256
"""Positions whose logits are held at once."""


@dataclass(frozen=True)
class Text:
    """Text sampled from a model, with what the model says of it."""

    tokens: Int[Tensor, "sample pos"]
    """Token ids, the first of them given."""
    log_probabilities: Float[Tensor, "sample next vocab"]
    """What the model expects after each token but the last."""


@torch.no_grad()
def sample_text(model: Network, n: int = SAMPLES, length: int = LENGTH, seed: int = 0) -> Text:
    """Samples text at temperature 1, and keeps what the model says of it.

    Args:
        model: the model that writes.
        n: how many samples.
        length: tokens of each, the first included.
        seed: seed of the draws.

    Raises:
        InputError: when the tokenizer has no token to begin with.
    """
    first = model.tokenizer.bos_token_id
    first = model.tokenizer.eos_token_id if first is None else first
    if first is None:
        raise InputError(f"the tokenizer of {model.name!r} has neither a BOS nor an EOS token to begin text with")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((n, 1), first)
    while tokens.shape[1] < length:
        logits = model.logits(tokens, torch.full((n,), tokens.shape[1] - 1)).float().cpu()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)], dim=1)
    said = torch.cat([log_probabilities for _, log_probabilities in _expectations(model, tokens)])
    return Text(tokens, said.view(n, length - 1, -1))


@torch.no_grad()
def divergence(model: Network, text: Text) -> Float[Tensor, "sample"]:
    """KL divergence of a model's expectations from the writer's, in nats, the mean over each sample's tokens."""
    written = text.log_probabilities.flatten(0, 1)
    found = [
        (written[rows].exp() * (written[rows] - log_probabilities)).sum(dim=-1)
        for rows, log_probabilities in _expectations(model, text.tokens)
    ]
    return torch.cat(found).view(len(text.tokens), -1).mean(dim=1)


@torch.no_grad()
def log_likelihood(model: Network, tokens: Int[Tensor, "sample pos"]) -> Float[Tensor, "sample"]:
    """The mean log probability of each sample's tokens, in nats; perplexity is exp of minus its mean."""
    following = tokens[:, 1:].flatten()
    found = [
        log_probabilities.gather(1, following[rows, None])[:, 0]
        for rows, log_probabilities in _expectations(model, tokens)
    ]
    return torch.cat(found).view(len(tokens), -1).mean(dim=1)


def _expectations(
    model: Network, tokens: Int[Tensor, "sample pos"]
) -> Iterator[tuple[slice, Float[Tensor, "row vocab"]]]:
    """The log probabilities of what follows every token but the last, a few samples at a time; on the CPU."""
    n, length = tokens.shape
    at_once = max(1, ROWS // length)
    positions = torch.arange(length - 1)
    for first in range(0, n, at_once):
        part = tokens[first : first + at_once].to(model.device)
        samples = torch.arange(len(part)).repeat_interleave(length - 1).to(model.device)
        logits = logits_at(model.module, part, samples, positions.repeat(len(part)).to(model.device))
        start = first * (length - 1)
        yield slice(start, start + len(logits)), logits.float().log_softmax(dim=-1).cpu()
