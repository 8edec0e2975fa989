"""The edges of a model: every sender, every receiver, and which pairs are joined.

With what is made of them: the matrix of all edges and of the paths through some, a score for each, and the memory in
which they are computed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
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
class EdgeGraph:
    """The edges of a model as a matrix: a row for each source, a column for each destination."""

    sources: tuple[Node, ...]
    """Rows, in the order of the forward pass."""
    destinations: tuple[Node, ...]
    """Columns, likewise."""
    exists: Bool[Tensor, "source destination"]
    """Whether there is such an edge."""
    n_layers: int
    """Layers."""
    n_heads: int
    """Query heads a layer."""

    def heads_read(self, layer: int) -> slice:
        """The columns of a layer's heads: all q, then all k, then all v."""
        first = layer * (3 * self.n_heads + 1)
        return slice(first, first + 3 * self.n_heads)

    def mlp_reads(self, layer: int) -> int:
        """The column of a layer's MLP."""
        return (layer + 1) * (3 * self.n_heads + 1) - 1

    def heads_written(self, layer: int) -> slice:
        """The rows of a layer's heads."""
        first = 1 + layer * (self.n_heads + 1)
        return slice(first, first + self.n_heads)

    def mlp_written(self, layer: int) -> int:
        """The row of a layer's MLP."""
        return (layer + 1) * (self.n_heads + 1)

    def places(self, edges: Iterable[Edge]) -> tuple[list[int], list[int]]:
        """Rows and columns of edges.

        Raises:
            InputError: for an edge at a position, or one that the model does not have.
        """
        row_of = {node: row for row, node in enumerate(self.sources)}
        column_of = {node: column for column, node in enumerate(self.destinations)}
        rows: list[int] = []
        columns: list[int] = []
        for edge in edges:
            if edge.source.position or edge.destination.position:
                raise InputError(f"{edge} stands at a position; here edges carry all positions: leave out @")
            row, column = row_of.get(edge.source), column_of.get(edge.destination)
            if row is None or column is None or not bool(self.exists[row, column]):
                raise InputError(f"the model has no edge {edge}")
            rows.append(row)
            columns.append(column)
        return rows, columns

    def mask(self, edges: Iterable[Edge]) -> Bool[Tensor, "source destination"]:
        """Edges as a matrix.

        Raises:
            InputError: as `places`.
        """
        found = torch.zeros_like(self.exists)
        found[self.places(edges)] = True
        return found

    def edges(self, mask: Bool[Tensor, "source destination"]) -> list[Edge]:
        """The edges of a matrix, by destination and then by source, in the order of the forward pass."""
        return [Edge(self.sources[u], self.destinations[v]) for v, u in mask.T.nonzero().tolist()]

    def live(self, kept: Bool[Tensor, "source destination"]) -> Bool[Tensor, "source destination"]:
        """The edges on a path from the input to the logits; the others change nothing."""
        kept = kept & self.exists
        reached = torch.zeros(len(self.sources), dtype=torch.bool)
        leads = torch.zeros(len(self.destinations), dtype=torch.bool)
        reached[0] = leads[-1] = True
        for layer in range(self.n_layers):
            read = (kept[:, self.heads_read(layer)] & reached[:, None]).any(dim=0)
            reached[self.heads_written(layer)] = read.view(3, -1).any(dim=0)
            reached[self.mlp_written(layer)] = (kept[:, self.mlp_reads(layer)] & reached).any()
        for layer in reversed(range(self.n_layers)):
            leads[self.mlp_reads(layer)] = (kept[self.mlp_written(layer)] & leads).any()
            leads[self.heads_read(layer)] = (kept[self.heads_written(layer)] & leads).any(dim=1).repeat(3)
        return kept & reached[:, None] & leads

    def changes(
        self, kept: Bool[Tensor, "copy source destination"], former: Bool[Tensor, "source destination"]
    ) -> tuple[Bool[Tensor, "copy destination"], Bool[Tensor, "copy source"]]:
        """Which destinations read, and which sources write, otherwise than with the former edges."""
        read = (kept != former).any(dim=1)
        written = torch.zeros(kept.shape[:2], dtype=torch.bool)
        for layer in range(self.n_layers):
            heads, mlp = self.heads_read(layer), self.mlp_reads(layer)
            read[:, heads] |= (kept[:, :, heads] & written[..., None]).any(dim=1)
            written[:, self.heads_written(layer)] = read[:, heads].unflatten(1, (3, -1)).any(dim=1)
            read[:, mlp] |= (kept[:, :, mlp] & written).any(dim=1)
            written[:, self.mlp_written(layer)] = read[:, mlp]
        read[:, -1] |= (kept[:, :, -1] & written).any(dim=1)
        return read, written


def build_edge_graph(model: Network) -> EdgeGraph:
    """The edges of a model."""
    sources, destinations = build_sources(model), build_destinations(model)
    exists = torch.tensor([[joined(u, v, model.is_parallel) for v in destinations] for u in sources])
    return EdgeGraph(sources, destinations, exists, model.n_layers, model.n_heads)


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


class Workspace:
    """Memory that pieces of work use one after the other: fresh from the system, it costs as much as the work in it."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A buffer of a shape, with whatever was in it.

        Args:
            name: whose former buffer is used again where it is large enough.
            like: of the same device and type.
            shape: its shape.
        """
        size = math.prod(shape)
        if name in self._kept and self._kept[name].numel() < size:
            del self._kept[name]  # before its successor is made
        if name not in self._kept:
            self._kept[name] = like.new_empty(size)
        return self._kept[name][:size].view(*shape)
