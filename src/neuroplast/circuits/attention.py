"""Where heads attend: which positions a head reads its keys and values at, and whole patterns to look at."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.components import Node
from neuroplast.interventions.chunks import Chunk, Size, in_prompt_chunks
from neuroplast.interventions.pairs import recorded_bytes
from neuroplast.interventions.selection import position_mask
from neuroplast.models.network import Network
from neuroplast.models.replay import record
from neuroplast.tasks.prompts import PromptSet


def attention_to(
    model: Network,
    prompts: PromptSet,
    heads: Sequence[Node],
    positions: Sequence[str],
    memory: str | int | None = None,
) -> Float[Tensor, "head position"]:
    """How much heads attend from where they stand to positions where the prompts can differ from the counterfactuals.

    The mean over the clean prompts and, of a head at several positions, over those. Tokens before the first that
    differs get none: nothing can be patched there. A prompt without the head's position counts as no attention.

    Args:
        model: the model.
        prompts: the prompts.
        heads: heads at positions.
        positions: names of positions that are attended to.
        memory: bound on the process's memory.
    """
    total = torch.zeros(len(heads), len(positions))
    until = 1 + max(node.layer or 0 for node in heads)

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        patterns = record(model, chunk.prompts.clean, ("pattern",), until=until).pattern
        masks = [chunk.where(name) for name in positions]
        seen = torch.zeros_like(total)
        for number, node in enumerate(heads):
            here = position_mask(chunk.prompts, node.position).float()
            mine = patterns[node.layer or 0][:, node.head].float()
            mine = torch.einsum("pq,pqk->pk", here / here.sum(dim=1, keepdim=True).clamp(min=1), mine)
            seen[number] = torch.stack([(mine * mask).sum() for mask in masks])
        total.add_(seen)

    size = Size(recorded_bytes(model, prompts.width, [("pattern", "residual")]), 1, 1)
    in_prompt_chunks(model, prompts, size, work, 0, memory=memory)
    return total / len(prompts)


@torch.no_grad()
def attention_patterns(
    model: Network, prompts: PromptSet, heads: Sequence[Node], memory: str | int | None = None
) -> Float[Tensor, "head prompt query key"]:
    """The attention of heads on the clean prompts, from every token to every token; 0 behind a prompt's end.

    Args:
        model: the model.
        prompts: the prompts.
        heads: which heads; where they stand does not matter.
        memory: bound on the process's memory.
    """
    found = torch.zeros(len(heads), len(prompts), prompts.width, prompts.width)
    until = 1 + max(node.layer or 0 for node in heads)

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        patterns = record(model, chunk.prompts.clean, ("pattern",), until=until).pattern
        inside = position_mask(chunk.prompts, None)
        inside = (inside[:, :, None] & inside[:, None, :]).float()
        width = inside.shape[1]
        for number, node in enumerate(heads):
            seen = patterns[node.layer or 0][:, node.head].float() * inside
            found[number, chunk.rows, :width, :width] = seen.cpu()

    size = Size(recorded_bytes(model, prompts.width, [("pattern", "residual")]), 1, 1)
    in_prompt_chunks(model, prompts, size, work, 0, memory=memory)
    return found
