"""The edges of a model: every sender, every receiver, and which pairs are joined; with scores for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.components import READ_CHANNELS, Edge, Node
from neuroplast.errors import InputError
from neuroplast.models.network import Network


def build_sources(model: Network) -> tuple[Node, ...]:
    """Every node that an edge can begin at, in the order of the forward pass: input, then by layer heads and MLP."""
    nodes = [Node("input")]
    for layer in range(model.n_layers):
        nodes += [Node("head", layer, head) for head in range(model.n_heads)]
        nodes.append(Node("mlp", layer))
    return tuple(nodes)


def build_destinations(model: Network) -> tuple[Node, ...]:
    """Every input that an edge can end at: by layer each head's q, each one's k, each one's v, the MLP; then logits."""
    nodes: list[Node] = []
    for layer in range(model.n_layers):
        nodes += [
            Node("head", layer, head, channel=channel) for channel in READ_CHANNELS for head in range(model.n_heads)
        ]
        nodes.append(Node("mlp", layer))
    return (*nodes, Node("logits"))


def joined(source: Node, destination: Node, parallel: bool) -> bool:
    """Whether a destination reads what a source writes.

    Args:
        source: input, a head or an MLP.
        destination: a head's q, k or v, an MLP, or logits.
        parallel: whether attention and MLP of a layer read the same residual stream.
    """
    if parallel and source.layer is not None and source.layer == destination.layer:
        return False
    return source.depth < destination.depth


@dataclass(frozen=True)
class EdgeScores:
    """A score for every edge of a model; on the CPU."""

    method: str
    """`eap`, `eap-ig` or `ceap`."""
    steps: int
    """Points on the way from clean to counterfactual input at which gradients were taken."""
    sources: tuple[Node, ...]
    """Rows."""
    destinations: tuple[Node, ...]
    """Columns."""
    exists: Bool[Tensor, "source destination"]
    """Whether there is such an edge; scores of others are 0."""
    scores: Float[Tensor, "source destination"]
    """Estimated LD(edge patched) - LD(clean), mean over prompts; negative: the edge helps."""
    standard_error: Float[Tensor, "source destination"] | None
    """Standard error of that mean, over prompts; None for a single prompt."""
    per_prompt: Float[Tensor, "source destination prompt"] | None
    """The scores prompt by prompt, where they were asked for."""
    clean: Float[Tensor, "prompt"]
    """Logit difference, answer minus foil, on the clean prompts."""
    counterfactual: Float[Tensor, "prompt"]
    """The same difference on the counterfactual prompts."""

    def top(self, n: int) -> list[tuple[Edge, float]]:
        """The n edges with the largest scores in absolute value."""
        found = self.scores.abs().masked_fill(~self.exists, -1.0).flatten().topk(min(n, int(self.exists.sum())))
        places = [divmod(int(index), len(self.destinations)) for index in found.indices]
        return [(Edge(self.sources[u], self.destinations[v]), float(self.scores[u, v])) for u, v in places]

    def score(self, edge: Edge) -> float:
        """The score of one edge.

        Raises:
            InputError: when the model has no such edge.
        """
        u, v = _place(edge.source, self.sources), _place(edge.destination, self.destinations)
        if not bool(self.exists[u, v]):
            raise InputError(f"the model has no edge {edge}")
        return float(self.scores[u, v])


def _place(node: Node, among: Sequence[Node]) -> int:
    if node not in among:
        raise InputError(f"the model has no edge at {node}")
    return among.index(node)
