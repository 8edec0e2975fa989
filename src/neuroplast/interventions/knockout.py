"""Knocking heads out: their value z replaced by a mean that says nothing of the clean prompt's names.

The value is the mean over the counterfactuals of the measured prompts of the same template, group and length,
position by position (Wang et al. 2022, arXiv 2211.00593, section 2.2, with ABC counterfactuals). A knocked-out head
keeps it whatever happens below. Deviation from the paper: the mean is over the prompts at hand, not over a large set
of its own. With few prompts a template it is a mean of few; with one, that prompt's own counterfactual.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.interventions.chunks import Chunk, Size, in_prompt_chunks
from neuroplast.interventions.selection import Selection, position_mask, select_senders
from neuroplast.models.network import Network
from neuroplast.models.replay import Edit, record
from neuroplast.tasks.prompts import PromptSet


@dataclass(frozen=True)
class Knockout:
    """Heads that are knocked out, with the values that they keep."""

    heads: tuple[Node, ...]
    """The heads, each at a position or at all."""
    means: dict[Node, Float[Tensor, "group pos d_head"]]
    """The value of each head at each position, by group of prompts."""
    groups: Int[Tensor, "prompt"]
    """The group of each prompt: its template, its split (such as the order of names) and its length."""

    def edits(self, chunk: Chunk) -> dict[int, list[Edit]]:
        """The replacements on a chunk of those prompts, by layer, at every position."""
        found: dict[int, list[Edit]] = {}
        width = chunk.prompts.clean.shape[1]
        for node in self.heads:
            where = position_mask(chunk.prompts, node.position)
            values = self.means[node][self.groups[chunk.rows].to(where.device), :width]
            found.setdefault(node.layer or 0, []).append(Edit("z", where[:, None], values[:, None], node.head))
        return found


def build_knockout(
    model: Network, prompts: PromptSet, heads: Selection, *, memory: str | int | None = None
) -> Knockout:
    """Computes the values that knocked-out heads keep.

    Args:
        model: the model.
        prompts: prompts with counterfactuals, over which the means are taken.
        heads: which heads, such as `a9.h9@end`; none where empty.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Raises:
        InputError: for a name that is none, a part that is no head, or a budget that is too small.
    """
    nodes = select_heads(heads, model, prompts)
    keys = _group_keys(prompts)
    names = sorted(set(keys))
    groups = torch.tensor([names.index(key) for key in keys])
    if not nodes:
        return Knockout((), {}, groups)
    width = prompts.width
    sums = {node: torch.zeros(len(names), width, model.d_head, device=model.device) for node in nodes}
    until = 1 + max(node.layer or 0 for node in nodes)

    def work(chunk: Chunk, _: int, tick: Callable[[], None]) -> None:
        z = record(model, chunk.prompts.counterfactual, ("z",), until=until).z
        here = groups[chunk.rows].to(model.device)
        kept = {node: z[node.layer or 0][:, :, node.head].float() for node in nodes}
        # Nothing is added before everything is at hand: what runs out of memory is done again.
        for node, values in kept.items():
            sums[node][:, : values.shape[1]].index_add_(0, here, values)

    row = model.module.dtype.itemsize * model.n_heads * model.d_head
    in_prompt_chunks(model, prompts, Size(2 * width * until * row, 1, 1), work, 0, memory=memory)
    counts = torch.bincount(groups, minlength=len(names)).to(model.device)[:, None, None]
    return Knockout(nodes, {node: (total / counts).to(model.module.dtype) for node, total in sums.items()}, groups)


def select_heads(heads: Selection, model: Network, prompts: PromptSet) -> tuple[Node, ...]:
    """The heads to knock out; none where the selection is empty.

    Raises:
        InputError: for a name that is none, or a part that is no head.
    """
    if not isinstance(heads, str | Node):
        heads = list(heads)
    if not heads:
        return ()
    nodes = tuple(node for group in select_senders(heads, model, prompts) for node in group)
    if wrong := [node for node in nodes if node.kind != "head"]:
        raise InputError(f"{wrong[0]} cannot be knocked out: only heads can")
    return nodes


def _group_keys(prompts: PromptSet) -> Sequence[tuple[str, str, int]]:
    ends = prompts.positions["end"].tolist()
    if not prompts.records:
        return [("", "", end) for end in ends]
    return [(record.template, record.group, end) for record, end in zip(prompts.records, ends, strict=True)]
