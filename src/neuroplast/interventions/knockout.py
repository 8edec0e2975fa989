"""Knocking heads out: their value z replaced by one that carries nothing about the prompt at hand.

The value is the mean over the counterfactual prompts of the same template and length, position by position
(Wang et al. 2022, arXiv 2211.00593, section 2.2). A knocked-out head keeps it whatever happens below.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.interventions.chunks import Chunk
from neuroplast.interventions.selection import Selection, position_mask, select_senders
from neuroplast.models.network import Network
from neuroplast.models.replay import Edit, record
from neuroplast.tasks.prompts import PromptSet

BATCH = 32
"""Prompts recorded at once."""


@dataclass(frozen=True)
class Knockout:
    """Heads that are knocked out, with the values that they keep."""

    heads: tuple[Node, ...]
    """The heads, each at a position or at all."""
    means: dict[Node, Float[Tensor, "group pos d_head"]]
    """The value of each head at each position, by group of prompts."""
    groups: Int[Tensor, "prompt"]
    """The group of each prompt: its template and length."""

    def edits(self, chunk: Chunk) -> dict[int, list[Edit]]:
        """The replacements on a chunk of those prompts, by layer, at every position."""
        found: dict[int, list[Edit]] = {}
        width = chunk.prompts.clean.shape[1]
        for node in self.heads:
            where = position_mask(chunk.prompts, node.position)
            values = self.means[node][self.groups[chunk.rows].to(where.device), :width]
            found.setdefault(node.layer or 0, []).append(Edit("z", where[:, None], values[:, None], node.head))
        return found


def build_knockout(model: Network, prompts: PromptSet, heads: Selection) -> Knockout:
    """Computes the values that knocked-out heads keep.

    Args:
        model: the model.
        prompts: prompts with counterfactuals, over which the means are taken.
        heads: which heads, such as `a9.h9@end`; none where empty.

    Raises:
        InputError: for a name that is none, or a part that is no head.
    """
    nodes = select_heads(heads, model, prompts)
    keys = _group_keys(prompts)
    names = sorted(set(keys))
    groups = torch.tensor([names.index(key) for key in keys])
    if not nodes:
        return Knockout((), {}, groups)
    width = int(prompts.positions["end"].max()) + 1
    sums = {node: torch.zeros(len(names), width, model.d_head, device=model.device) for node in nodes}
    until = 1 + max(node.layer or 0 for node in nodes)
    for first in range(0, len(prompts), BATCH):
        rows = slice(first, first + BATCH)
        z = record(model, prompts.counterfactual[rows, :width], ("z",), until=until).z
        for node, total in sums.items():
            total.index_add_(0, groups[rows].to(total.device), z[node.layer or 0][:, :, node.head].float())
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
