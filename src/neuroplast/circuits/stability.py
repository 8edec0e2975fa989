"""Would other prompts have given the same circuit? Mean pairwise Jaccard over bootstrap resamples of the prompts
(arXiv 2510.00845).

Every resample decides anew, from what was measured prompt by prompt, which senders and edges pass; a node counts where
it leads to the logits through nodes that count. Deviation: nothing is measured anew, so a step's receivers stay those
that were patched together, what screening cut stays out, the edges of a sender that only a resample finds are not
known, and within a resample "the interval excludes 0" is the mean against 1.96 of its standard errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from neuroplast.circuits.path_discovery import Discovery
from neuroplast.components import Edge, Node
from neuroplast.errors import InputError
from neuroplast.statistics import NORMAL_95, bootstrap_weights, interval

RESAMPLES = 100


@dataclass(frozen=True)
class Agreement:
    """How much the circuits of resamples agree."""

    mean: float | None
    """Mean pairwise Jaccard; None where every circuit is empty."""
    spread: tuple[float, float] | None
    """The 2.5 % and 97.5 % points of the pairs."""


@dataclass(frozen=True)
class Stability:
    """Agreement of the circuits of resamples."""

    resamples: int
    """How many resamples."""
    nodes: Agreement
    """By nodes with their positions."""
    edges: Agreement
    """By edges."""
    frequency: Mapping[Node, float]
    """Share of the resamples that have each node."""
    drawn_nodes: tuple[frozenset[Node], ...]
    """The nodes of each resample's circuit."""
    drawn_edges: tuple[frozenset[Edge], ...]
    """Its edges, without positions."""

    def document(self) -> dict[str, Any]:
        """Everything as JSON has it; each set is a list of places in a list of names."""
        return {
            "resamples": self.resamples,
            "nodes_jaccard": {"mean": self.nodes.mean, "spread": _listed(self.nodes.spread)},
            "edges_jaccard": {"mean": self.edges.mean, "spread": _listed(self.edges.spread)},
            "frequency": {str(node): share for node, share in self.frequency.items()},
            "drawn_nodes": _sets_document(self.drawn_nodes),
            "drawn_edges": _sets_document(self.drawn_edges),
        }


def path_stability(discovery: Discovery, resamples: int = RESAMPLES, seed: int = 0) -> Stability:
    """Decides a discovery again on bootstrap resamples of its prompts.

    Args:
        discovery: from `discover_paths`.
        resamples: how many, at least 2.
        seed: seed of the draw.

    Raises:
        InputError: for fewer than two resamples.
    """
    if resamples < 2:
        raise InputError(f"{resamples} resamples: agreement needs at least 2, better 100")
    weights = bootstrap_weights(len(discovery.clean), seed, resamples)
    drawn = [_decide(discovery, row) for row in weights]
    nodes, edges = [each for each, _ in drawn], [each for _, each in drawn]
    seen = sorted({node for each in nodes for node in each}, key=str)
    return Stability(
        resamples,
        agreement(_table(nodes)),
        agreement(_table(edges)),
        {node: sum(node in each for each in nodes) / resamples for node in seen},
        tuple(map(frozenset, nodes)),
        tuple(map(frozenset, edges)),
    )


def _listed(spread: tuple[float, float] | None) -> list[float] | None:
    return None if spread is None else list(spread)


def known_stability(provenance: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A circuit's `stability`, if its provenance has one as `Stability.document` writes it: files are anybody's."""
    document = provenance.get("stability")
    if not isinstance(document, Mapping) or not isinstance(document.get("resamples"), int):
        return None
    for level in ("nodes", "edges"):
        match document.get(f"{level}_jaccard"):
            case (
                None
                | {"mean": None, "spread": None}
                | {
                    "mean": int() | float(),
                    "spread": [int() | float(), int() | float()],
                }
            ):
                pass
            case _:
                return None
    return document


def drawn_sets(document: Mapping[str, Any] | None, level: str) -> list[frozenset[str]]:
    """The sets of `Stability.document`, as names; none where there is no document.

    Args:
        document: a circuit's `stability`.
        level: `nodes` or `edges`.
    """
    found = (document or {}).get(f"drawn_{level}") or {"names": [], "sets": []}
    return [frozenset(found["names"][place] for place in each) for each in found["sets"]]


def _sets_document(sets: Sequence[frozenset[Any]]) -> dict[str, Any]:
    names = sorted({str(item) for each in sets for item in each})
    place = {name: number for number, name in enumerate(names)}
    return {"names": names, "sets": [sorted(place[str(item)] for item in each) for each in sets]}


def agreement(members: Bool[np.ndarray, "set item"]) -> Agreement:
    """Mean pairwise Jaccard of some sets; two empty ones are left out.

    Args:
        members: which items each set has.
    """
    counts = members.astype(np.float32)
    both = counts @ counts.T
    sizes = counts.sum(axis=1)
    either = sizes[:, None] + sizes[None] - both
    first, second = np.triu_indices(len(members), k=1)
    known = either[first, second] > 0
    pairs = both[first, second][known] / either[first, second][known]
    if not len(pairs):
        return Agreement(None, None)
    low, high = interval(pairs)
    return Agreement(float(pairs.mean(dtype=np.float64)), (float(low), float(high)))


def _table(sets: Sequence[set[Node]] | Sequence[set[Edge]]) -> Bool[np.ndarray, "set item"]:
    items = sorted({item for each in sets for item in each}, key=str)
    return np.array([[item in each for item in items] for each in sets], dtype=bool).reshape(len(sets), len(items))


def _decide(discovery: Discovery, weights: Float[np.ndarray, "prompt"]) -> tuple[set[Node], set[Edge]]:
    """The nodes and edges that pass on one resample."""
    least = discovery.settings.threshold * abs(float(weights @ discovery.clean))
    nodes: set[Node] = set()
    edges: set[Edge] = set()
    for step in discovery.steps:
        heads = {(node.layer, node.head) for node in nodes}
        read = {node for node in step.receivers if node.kind == "logits" or (node.layer, node.head) in heads}
        if not read:
            continue
        passing = _passing(step.effects, weights, least)
        if step.name == "backups":
            passing &= (step.effects @ weights) * discovery.clean.mean() < 0
        found = {node for node, passes in zip(step.senders, passing, strict=True) if passes}
        if step.name == "backups":
            found -= nodes
        measured = [edge for edge in step.edges if edge.source in found and edge.destination in read]
        effects = np.array([step.edges[edge] for edge in measured]).reshape(len(measured), len(weights))
        passing = _passing(effects, weights, least / len(step.receivers))
        nodes |= found
        edges |= {edge.anywhere() for edge, passes in zip(measured, passing, strict=True) if passes}
        # As in the discovery, a sender none of whose edges passes keeps its strongest.
        sizes = dict(zip(measured, np.abs(effects @ weights).tolist(), strict=True))
        led = {edge.source for edge, passes in zip(measured, passing, strict=True) if passes}
        for source in {edge.source for edge in measured} - led:
            strongest = max((edge for edge in measured if edge.source == source), key=sizes.__getitem__)
            edges.add(strongest.anywhere())
    return nodes, edges


def _passing(
    effects: Float[np.ndarray, "row prompt"], weights: Float[np.ndarray, "prompt"], least: float
) -> Bool[np.ndarray, "row"]:
    mean = effects @ weights
    error = np.sqrt(np.maximum(effects**2 @ weights - mean**2, 0) / len(weights))
    return (np.abs(mean) >= least) & (np.abs(mean) > NORMAL_95 * error)
