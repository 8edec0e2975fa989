"""What heads copy: the copy score of Wang et al. 2022 (arXiv 2211.00593), section 3.1 and appendix.

The residual stream that leaves block 0, at a name, goes through the attention norm of the head's layer, the head's
value projection (its key-value head's, with its bias) and its part of the output projection, and then the model's own
ending. The share of names that are among the `TOP` tokens of the whole vocabulary; ties count against it. Negative
copying is the same with the sign of what the head writes flipped. A name is a token equal to the answer or the foil (of
several, the first), wherever it stands in the prompt: for IOI at IO, S1 and S2, as in the paper's code.

Deviations: each head reads through its own layer's norm, where the paper's code takes block 1's. Where a norm stands
between the heads and the residual stream (Gemma 3), a head's output goes through it alone.
"""

from collections.abc import Callable, Sequence
from math import ceil

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neuroplast.components import Node
from neuroplast.interventions.chunks import Chunk, Progress, Size, in_prompt_chunks
from neuroplast.interventions.selection import position_mask
from neuroplast.models.network import Network, unembedding_of
from neuroplast.models.replay import record
from neuroplast.tasks.prompts import PromptSet

TOP = 5
"""A name is copied when fewer tokens than that have a logit as large."""

_BLOCK = 2048
"""Tokens of the vocabulary that are looked at together."""


@torch.no_grad()
def copy_shares(
    model: Network,
    prompts: PromptSet,
    heads: Sequence[Node],
    *,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "sign head prompt"]:
    """The share of each prompt's names that heads copy, and that they copy negatively; NaN where a prompt has none.

    Args:
        model: the instrumented model.
        prompts: the clean prompts are run, through block 0.
        heads: which heads; where they stand does not matter.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: for a budget that is too small.
    """
    shares = torch.full((2, len(heads), len(prompts)), torch.nan, dtype=torch.double)
    names_a_prompt = int(name_mask(prompts).sum(dim=1).max())
    by_layer: dict[int, list[int]] = {}
    for row, node in enumerate(heads):
        by_layer.setdefault(node.layer or 0, []).append(row)

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        run = record(model, chunk.prompts.clean, (), until=1)
        rows, at = name_mask(chunk.prompts).nonzero(as_tuple=True)
        own = chunk.prompts.clean[rows, at]
        count = torch.bincount(rows, minlength=len(chunk.rows))
        for layer, members in by_layer.items():
            if len(rows):
                value = model.read_heads(layer, run.residual[1], run.start.calls[layer]).value[rows, :, at]
                copied = _are_copied(model, layer, [heads[row].head or 0 for row in members], value, own).double()
                sums = copied.new_zeros(2, len(members), len(count)).index_add_(2, rows, copied)
                # A prompt without names has no share: 0 / 0.
                shares[:, torch.tensor(members)[:, None], chunk.rows] = (sums / count).cpu()
            tick()

    itemsize = model.module.dtype.itemsize
    row = itemsize * model.d_model * 4 + 8 * _BLOCK
    most = max(map(len, by_layer.values()), default=0)
    size = 2 * most * names_a_prompt * row + itemsize * prompts.width * model.d_model * 8
    in_prompt_chunks(model, prompts, Size(size, 1, 1), work, len(by_layer), memory=memory, progress=progress)
    return shares


def name_mask(prompts: PromptSet) -> Bool[Tensor, "prompt pos"]:
    """Where the prompts say their answer or their foil, up to END."""
    tokens = prompts.clean
    said = (tokens == prompts.answer[:, None]) | (tokens == prompts.foil[:, None])
    return said & position_mask(prompts, None)


def _are_copied(
    model: Network,
    layer: int,
    heads: Sequence[int],
    value: Float[Tensor, "name kv_head d_head"],
    own: Int[Tensor, "name"],
) -> Bool[Tensor, "sign head name"]:
    """Whether some heads of a layer, and each with its sign flipped, copy names from their values."""
    value = value[:, [model.kv_head(head) for head in heads]]
    written = torch.einsum("nhf,hfd->hnd", value, model.head_weights(layer)[list(heads)])
    both = passed_on(model, layer, torch.stack([written, -written]).flatten(0, 2))
    return _is_on_top(model, both, own.repeat(2 * len(heads))).view(2, len(heads), -1)


def passed_on(model: Network, layer: int, output: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """What reaches the residual stream when a layer's attention gives that."""
    if model.adds_attention:
        return output
    rows = output[:, None]
    nothing = torch.zeros_like(rows)
    return model.run_layer(layer, nothing, attention=rows, mlp=nothing)[:, 0]


def _is_on_top(model: Network, residual: Float[Tensor, "row d_model"], own: Int[Tensor, "row"]) -> Bool[Tensor, "row"]:
    """Whether fewer than `TOP` other tokens have a logit as large as a row's own token.

    The vocabulary is looked at in blocks, and a row that is beaten often enough is not looked at again.
    """
    head = unembedding_of(model.module)
    whole_bias: Tensor | None = getattr(head, "bias", None)
    n_tokens = len(head.weight)
    least = model.readout(residual, own[:, None])
    beaten = torch.zeros_like(own)
    for first in range(blocks := ceil(n_tokens / _BLOCK)):
        if not len(left := (beaten < TOP).nonzero()[:, 0]):
            break
        # Neighbours in a vocabulary are alike, so every block takes its tokens from everywhere.
        tokens = torch.arange(first, n_tokens, blocks, device=own.device)
        weight = head.weight[tokens].float()
        bias = None if whole_bias is None else whole_bias[tokens].float()
        logits = model.run_ending(
            residual[left], lambda x, w=weight, b=bias: torch.nn.functional.linear(x.float(), w, b)
        )
        beats = (logits.float() >= least[left]) & (tokens != own[left, None])
        beaten[left] += beats.sum(dim=1)
    return beaten < TOP
