"""What an intervention gives: the signed effect of everything that was patched, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.interventions.selection import Group


@dataclass(frozen=True)
class Effects:
    """The effect on the logit difference of each thing that was patched; on the CPU, in float32."""

    method: str
    """How it was measured, such as `path` or `activation`."""
    senders: tuple[Group, ...]
    """What was patched, one group of nodes a row."""
    receivers: Group
    """What was set to what it would read then; the logits, or nodes."""
    effects: Float[Tensor, "sender prompt"]
    """LD(patched) - LD(unpatched), in logits."""
    clean: Float[Tensor, "prompt"]
    """Logit difference, answer minus foil, on the clean prompts."""
    counterfactual: Float[Tensor, "prompt"]
    """The same difference on the counterfactual prompts."""
    into: str = "clean"
    """The run that was patched: `clean` with counterfactual values, or `counterfactual` with clean ones."""
    mlps: str = "live"
    """Whether the MLPs between recomputed (`live`) or kept their clean outputs (`frozen`)."""
    knocked_out: Group = ()
    """Heads that were knocked out underneath."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each row."""
        return tuple(map(group_name, self.senders))

    def by_head(self) -> Float[Tensor, "layer head prompt"]:
        """The effects of all heads as a grid.

        Raises:
            InputError: when the rows are not all heads of a model, in order, each alone.
        """
        heads = [group[0] for group in self.senders if len(group) == 1 and group[0].kind == "head"]
        n_layers = 1 + max((node.layer or 0 for node in heads), default=0)
        n_heads = 1 + max((node.head or 0 for node in heads), default=0)
        expected = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        if len(heads) != len(self.senders) or [(node.layer, node.head) for node in heads] != expected:
            raise InputError("these effects are no grid of heads: patch 'heads' to get one")
        return self.effects.view(n_layers, n_heads, -1)


def group_name(group: Sequence[Node]) -> str:
    """The name of nodes that are patched together: `a0.h1+a0.h2@end`."""
    return "+".join(map(str, group))
