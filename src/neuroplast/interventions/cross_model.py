"""Cross-model activation patching (Prakash et al. 2024, arXiv 2402.14811): where a change between two checkpoints of
one model is expressed.

The donor runs the prompts; the receiver runs the same prompts with the donor's values at some places, and everything
after them recomputes. Into the base it shows what suffices to bring the change about, into the other checkpoint what
suffices to undo it.

- A head's **output** (`a23.h3`): its value z from the donor, through the receiver's output projection, or through the
  donor's (fine-tuning moves it, too; the bias behind the heads stays the receiver's).
- Its **inputs**, with its output at other positions held: its query (`<q>`), and the keys (`<keys>`) and values
  (`<values>`) of all positions as the query at the node's position sees them. Several make a group, such as
  `a23.h3<keys>@end+a23.h3<values>@end`; all three are its output, and `<q>` with `<keys>` is its attention **pattern**
  (`<pattern>`).
- A key (`<k>`) or value (`<v>`) at the node's position, as all later queries see it: their outputs change, too.
- MLPs, attention blocks and the residual stream, at chosen positions, and groups of all these.

Steps as in activation patching: both runs are recorded once, and a copy of the prompts is the window from the patched
position to END, so at END a patch costs one token from the patched layer up.

Sign: effect = LD(receiver, patched) - LD(receiver), in logits. Where the donor's values are the receiver's own to the
bit, it is 0 and nothing is computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.components import Node
from neuroplast.errors import unknown_name
from neuroplast.interventions.activation_patching import (
    BASE_PLACES,
    patch_sites,
    recorded_of,
    values_differ,
    values_of,
)
from neuroplast.interventions.chunks import Chunk, Progress
from neuroplast.interventions.effects import group_name
from neuroplast.interventions.pairs import Pair, recorded_bytes
from neuroplast.interventions.selection import Group, Selection, position_mask, select_sites
from neuroplast.models.between import require_same_parts
from neuroplast.models.network import Network
from neuroplast.models.recording import Edit, Place, Window, at_positions
from neuroplast.tasks.prompts import PromptSet

PROJECTIONS = ("receiver", "donor")


@dataclass(frozen=True)
class CrossEffects:
    """The effect on the receiver's logit difference of each thing that was patched; on the CPU, in float32."""

    sites: tuple[Group, ...]
    """What was patched, one group of nodes a row."""
    effects: Float[Tensor, "site prompt"]
    """LD(receiver, patched) - LD(receiver), in logits."""
    receiver: Float[Tensor, "prompt"]
    """LD of the receiver."""
    donor: Float[Tensor, "prompt"]
    """LD of the donor."""
    projection: str
    """Whose output projection patched heads went through."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each row."""
        return tuple(map(group_name, self.sites))


def cross_patch(
    receiver: Network,
    donor: Network,
    prompts: PromptSet,
    *,
    sites: Selection = "heads@end",
    projection: str = "receiver",
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> CrossEffects:
    """Patches activations of one checkpoint into another, exactly.

    Args:
        receiver: the model that is patched.
        donor: the model whose values are patched in.
        prompts: the prompts that both run; their counterfactuals do not matter.
        sites: `heads` (z), `q`, `keys`, `values`, `pattern`, `k`, `v`, `attention`, `mlps`, `residual`, or nodes and
            groups, such as `a9.h1<q>@end, a0.h1+m0`; each is patched alone, at its position, at all, or at `each` in
            turn.
        projection: whose output projection patched heads go through, `receiver` or `donor`.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free. Results do not change.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: when the models are not checkpoints of one, for a name that is none, a part or a position that is
            not there, or a budget that is too small.
    """
    if projection not in PROJECTIONS:
        raise unknown_name("projection", projection, PROJECTIONS)
    require_same_parts(receiver, donor)
    groups = select_sites(sites, receiver, prompts)
    places: set[Place] = {recorded_of(node) for group in groups for node in group}
    kept: set[Place] = {*BASE_PLACES, *places}

    def build_pair(chunk: Chunk) -> Pair:
        # The two models can differ at every position.
        everywhere = replace(chunk, changed=position_mask(chunk.prompts, None))
        return Pair(receiver, everywhere, kept, places, donor=donor)

    through = donor if projection == "donor" else receiver
    effects, of_receiver, of_donor = patch_sites(
        receiver,
        prompts,
        groups,
        build_pair,
        recorded_bytes(receiver, prompts.width, (kept, places)),
        differs=partial(_differs, through),
        beside=partial(_written_more, through) if through is donor else None,
        memory=memory,
        progress=progress,
    )
    return CrossEffects(groups, effects, of_receiver, of_donor, projection)


def _is_head(node: Node) -> bool:
    return node.kind == "head" and node.channel is None


def _written_more(through: Network, pair: Pair, node: Node, window: Window) -> Sequence[Edit]:
    """What a patched head's value gives more through a model's projection than through the receiver's."""
    if not _is_head(node):
        return ()
    layer, head = node.layer or 0, node.head or 0
    z = at_positions(values_of(pair.model, pair.source, node), window.positions)
    more = z @ through.head_weights(layer)[head] - z @ pair.model.head_weights(layer)[head]
    return [Edit("attention", window.inside[:, None], more[:, None], adds=True)]


def _differs(
    through: Network, pair: Pair, group: Group, where: Mapping[str | None, Bool[Tensor, "prompt pos"]]
) -> Bool[Tensor, "prompt"]:
    """On which prompts something is patched that is not there already."""
    found = values_differ(pair, group, where)
    if through is not pair.model:
        for node in filter(_is_head, group):
            weights = [model.head_weights(node.layer or 0)[node.head or 0] for model in (pair.model, through)]
            if not torch.equal(*weights):
                found |= where[node.position].any(dim=1)
    return found
