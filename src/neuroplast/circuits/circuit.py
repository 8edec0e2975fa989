"""The circuit: which heads do a task, at which positions, and through which edges.

A node is a head at a position (`a23.h3@end`), or at all positions (`a23.h3`); MLPs, `input` and `logits` are nodes
of circuits that were found by edges. An edge ends where something is read: `a20.h0@s2->a23.h3<v>@s2` ends at the
value that head 23.3 reads at S2, wherever the head itself stands.

Scores are signed: LD(patched) - LD(clean), so a negative one says that the part helps the task.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from neuroplast.components import Edge, Node
from neuroplast.errors import InputError

Part = TypeVar("Part", Node, Edge)

SIGN = "LD(patched) - LD(clean), in logits; negative: it helps the task"

Level = Literal["heads", "nodes", "edges"]
"""What is counted: heads wherever they stand, nodes with their positions, or edges."""
LEVELS: tuple[Level, ...] = ("heads", "nodes", "edges")


@dataclass(frozen=True)
class Shape:
    """The model that a circuit belongs to."""

    name: str
    """What the user called it."""
    n_layers: int
    n_heads: int
    """Query heads a layer."""
    d_model: int
    parallel: bool = False
    """Whether attention and MLP of a layer read the same residual stream."""
    weights_sha256: str | None = None
    """Hash of the weights that it was found in; None where a file does not tell."""

    def __post_init__(self) -> None:
        if min(self.n_layers, self.n_heads, self.d_model) < 1:
            raise InputError(f"a model has {self.n_layers} layers, {self.n_heads} heads and width {self.d_model}")

    @property
    def n_edges(self) -> int:
        """All edges of such a model: input, heads and MLPs into q, k and v of heads, MLPs and logits."""
        before = 1
        total = 0
        for _ in range(self.n_layers):
            total += before * 3 * self.n_heads + before + (0 if self.parallel else self.n_heads)
            before += self.n_heads + 1
        return total + before

    def has(self, node: Node) -> bool:
        """Whether the model has such a part."""
        return (node.layer or 0) < self.n_layers and (node.head or 0) < self.n_heads

    def fits(self, other: "Shape") -> bool:
        """Whether two models have the same parts."""
        return self.same_parts == other.same_parts

    @property
    def same_parts(self) -> tuple[int, int, int, bool]:
        """What must agree for two models to have the same parts."""
        return self.n_layers, self.n_heads, self.d_model, self.parallel


@dataclass(frozen=True)
class Role:
    """What a node does, and the measurements that say so."""

    name: str
    """A role of `neuroplast.circuits.roles`, such as `name mover`, or `unclassified`."""
    why: str
    """The rule that gave it, or what was missing, in one line."""
    measures: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    """The numbers, by name; None where one could not be measured."""


@dataclass(frozen=True)
class Circuit:
    """Some nodes and edges of a model, with their scores."""

    shape: Shape
    """The model."""
    nodes: Mapping[Node, float | None]
    """The nodes that belong to it with their scores, in the order of the forward pass; None where there is no score."""
    edges: Mapping[Edge, float | None] = field(default_factory=dict[Edge, float | None])
    """Likewise the edges."""
    outside: Mapping[Edge, float] = field(default_factory=dict[Edge, float])
    """Scores of edges that were measured and do not belong to it."""
    roles: Mapping[Node, Role] = field(default_factory=dict[Node, Role])
    """What nodes do, where it was measured."""
    positions: tuple[str, ...] = ()
    """The named positions among which nodes were looked for; none where nodes stand at all positions."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How it was found, as JSON has it: method, thresholds, task, prompts, counterfactual, …"""
    outside_nodes: Mapping[Node, float] = field(default_factory=dict[Node, float])
    """Scores of nodes that do not belong to it, where a file has some."""

    def __post_init__(self) -> None:
        parts = [*self.nodes, *(node for edge in self.edges for node in (edge.source, edge.destination))]
        if wrong := next((node for node in parts if not self.shape.has(node)), None):
            raise InputError(
                f"{wrong} is no part of {self.shape.name}: it has {self.shape.n_layers} layers "
                f"of {self.shape.n_heads} heads"
            )
        if wrong := next((node for node in self.nodes if node.channel or node.kind in ("attention", "residual")), None):
            raise InputError(f"{wrong} cannot be a circuit's node; expected input, a head, an MLP or logits")
        both = [*(self.nodes.keys() & self.outside_nodes.keys()), *(self.edges.keys() & self.outside.keys())]
        if both:
            raise InputError(f"{min(map(str, both))} cannot both belong to a circuit and lie outside of it")
        object.__setattr__(self, "nodes", {node: self.nodes[node] for node in sorted(self.nodes, key=order_of)})

    @property
    def heads(self) -> tuple[Node, ...]:
        """The nodes that are heads, with their positions."""
        return tuple(node for node in self.nodes if node.kind == "head")

    @property
    def acting(self) -> tuple[Node, ...]:
        """Its heads that act on the logits."""
        sources = {edge.source for edge in self.edges if edge.destination.kind == "logits"}
        return tuple(node for node in self.heads if node in sources)

    def members(self, level: Level) -> frozenset[Node] | frozenset[Edge]:
        """What belongs to it: heads without positions, heads with them, or edges without positions."""
        if level == "nodes":
            return frozenset(self.heads)
        if level == "heads":
            return frozenset(node.at(None) for node in self.heads)
        return frozenset(edge.anywhere() for edge in self.edges)

    def universe(self, level: Level) -> int:
        """How many such things the whole model has: the denominator of sparsity.

        Nodes are counted at the named positions; where none are named, at those where the circuit's heads stand.
        """
        if level == "edges":
            return self.shape.n_edges
        heads = self.shape.n_layers * self.shape.n_heads
        places = self.positions or {node.position for node in self.heads}
        return heads * (max(1, len(places)) if level == "nodes" else 1)

    def sparsity(self, level: Level = "nodes") -> float:
        """Share of the model's heads, nodes or edges that belong to it."""
        return len(self.members(level)) / self.universe(level)

    def jaccard(self, other: "Circuit", level: Level = "nodes") -> float | None:
        """Size of the intersection ÷ size of the union; None where both are empty.

        Raises:
            InputError: when the two models have different parts.
        """
        self._require_same(other)
        return jaccard(self.members(level), other.members(level))

    def union(self, other: "Circuit") -> "Circuit":
        """What belongs to either; scores are this one's where both have one.

        Raises:
            InputError: when the two models have different parts.
        """
        self._require_same(other)
        nodes, edges = _joined(self.nodes, other.nodes), _joined(self.edges, other.edges)
        outside, outside_nodes = {**other.outside, **self.outside}, {**other.outside_nodes, **self.outside_nodes}
        return Circuit(
            self.shape,
            nodes,
            edges,
            {edge: score for edge, score in outside.items() if edge not in edges},
            {**other.roles, **self.roles},
            tuple(dict.fromkeys((*self.positions, *other.positions))),
            {"union of": [dict(self.provenance), dict(other.provenance)]},
            {node: score for node, score in outside_nodes.items() if node not in nodes},
        )

    def intersection(self, other: "Circuit") -> "Circuit":
        """What belongs to both, with this one's scores.

        Raises:
            InputError: when the two models have different parts.
        """
        self._require_same(other)
        kept = self.keep(node for node in self.nodes if node in other.nodes)
        edges = {edge: score for edge, score in kept.edges.items() if edge in other.edges}
        return replace(
            kept,
            edges=edges,
            outside={**kept.outside, **_scored(kept.edges, without=edges)},
            provenance={"intersection of": [dict(self.provenance), dict(other.provenance)]},
        )

    def keep(self, nodes: Iterable[Node]) -> "Circuit":
        """Only some of its nodes, and the edges that are left between them; the scores of the rest go outside."""
        chosen = set(nodes)
        kept = {node: score for node, score in self.nodes.items() if node in chosen}
        parts = {node.at(None) for node in kept}
        edges = {
            edge: score
            for edge, score in self.edges.items()
            if _is_left(edge.source, kept, parts) and _is_left(edge.destination, kept, parts)
        }
        return replace(
            self,
            nodes=kept,
            edges=edges,
            outside={**self.outside, **_scored(self.edges, without=edges)},
            roles={node: role for node, role in self.roles.items() if node in kept},
            outside_nodes={**self.outside_nodes, **_scored(self.nodes, without=kept)},
        )

    def with_role(self, name: str) -> tuple[Node, ...]:
        """The nodes of one role."""
        return tuple(node for node in self.nodes if node in self.roles and self.roles[node].name == name)

    def _require_same(self, other: "Circuit") -> None:
        if not self.shape.fits(other.shape):
            names = ("layers", "heads", "width", "parallel")
            pairs = zip(names, self.shape.same_parts, other.shape.same_parts, strict=True)
            name, mine, theirs = next(pair for pair in pairs if pair[1] != pair[2])
            raise InputError(
                f"circuits of different models cannot be compared: {name} {mine} ({self.shape.name}) "
                f"and {theirs} ({other.shape.name})"
            )


def _joined(mine: Mapping[Part, float | None], theirs: Mapping[Part, float | None]) -> dict[Part, float | None]:
    """Both, with my score where I have one."""
    return {**theirs, **{part: theirs.get(part) if score is None else score for part, score in mine.items()}}


def _scored(scores: Mapping[Part, float | None], without: Mapping[Part, Any]) -> dict[Part, float]:
    """Those that have a score and are not in `without`."""
    return {part: score for part, score in scores.items() if score is not None and part not in without}


def _is_left(end: Node, kept: Mapping[Node, Any], parts: set[Node]) -> bool:
    """Whether one end of an edge is still there; `input` and `logits` always are."""
    if end.kind in ("input", "logits"):
        return True
    # What a head reads may stand elsewhere than the head, so its position says nothing of the head.
    if end.channel is not None or end.position is None:
        return replace(end, channel=None, position=None) in parts
    return end in kept or end.at(None) in kept


def jaccard(first: Iterable[Any], second: Iterable[Any]) -> float | None:
    """Size of the intersection ÷ size of the union of two sets; None where both are empty."""
    one, other = frozenset(first), frozenset(second)
    return len(one & other) / len(one | other) if one | other else None


def order_of(node: Node) -> tuple[float, int, str]:
    """A key that sorts nodes in the order of the forward pass."""
    return node.depth, node.head or 0, node.position or ""


def nodes_of(edges: Iterable[Edge]) -> Iterator[Node]:
    """The nodes at the ends of some edges."""
    for edge in edges:
        yield edge.source
        yield replace(edge.destination, channel=None)
