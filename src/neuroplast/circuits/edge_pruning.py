"""Pruning a circuit of edges, as ACDC does it (Conmy et al. 2023, arXiv 2304.14997).

Steps: go through the destinations from the logits down. Each edge into one is removed for good when that changes the
mean LD of what is left by less than tau × |mean LD(clean)|; then dangling parts go. Removed edges carry their source's
counterfactual output (`neuroplast.interventions.edge_knockout`).

Sign: a change counts whichever way LD moves.

Deviations: ACDC's metric is the KL divergence from the clean run's output; here it is LD, which the rest of this
library measures, so an edge that moves only other tokens goes. ACDC takes a destination's edges in the order of the
sources; here the weakest score comes first. Many edges are tried at once on a guess of what becomes of the earlier
ones, and again where the guess was wrong: each is decided as if they had been tried one by one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.circuit import Circuit, nodes_of
from neuroplast.circuits.files import require_model
from neuroplast.circuits.shape import require_difference, require_positive, shape_of
from neuroplast.errors import InputError, NothingFoundError
from neuroplast.interventions.edge_knockout import VARIANTS, CircuitRun
from neuroplast.interventions.edges import EdgeGraph, build_edge_graph
from neuroplast.interventions.selection import require_prompts
from neuroplast.models.network import Network
from neuroplast.observer import Told
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet


def prune_edges(
    model: Network,
    prompts: PromptSet,
    circuit: Circuit,
    tau: float,
    *,
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Told | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Circuit:
    """Removes the edges of a circuit that the mean LD does not need, exactly.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        circuit: a circuit of edges without positions.
        tau: least change of the mean LD that keeps an edge, as a share of |mean LD(clean)|.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps each layer's decisions, so that an interrupted pruning goes on.
        progress: called with (activity, done, total).
        say: told how many edges went in each layer.

    Returns:
        What is left; `outside` has the removed edges too, where they have scores.

    Raises:
        NothingFoundError: when nothing is left, or LD is not apart from 0.
        InputError: for a circuit of another model, one without edges or with positions, a tau that is not positive,
            or a budget that is too small.
        UnsupportedModelError: when the model's edges cannot be told apart.
    """
    require_positive("tau", tau)
    require_prompts(prompts)
    graph, parts = build_edge_graph(model), parts or Parts()
    require_model(circuit, shape_of(model))
    if not circuit.edges:
        raise InputError("the circuit has no edges to prune: give one that was found by its edges")
    mask = graph.mask(circuit.edges)
    least = tau * require_difference(measure_behaviour(model, prompts).logit_diff.double().numpy())
    run = CircuitRun(model, prompts, mask, memory=memory)
    sizes = torch.full(graph.exists.shape, float("inf"))
    scored = {edge: abs(score) for edge, score in circuit.edges.items() if score is not None}
    sizes[graph.places(scored)] = torch.tensor(list(scored.values()))
    log = [_Pruned("dangling parts", int(mask.sum()), int((mask & ~run.kept).sum()), 0, float(run.difference.mean()))]
    total = int(run.kept.sum())
    for name, columns in _from_the_logits(graph):
        before = int(run.kept.sum())

        def decide(columns: range = columns) -> dict[str, Tensor]:
            tried = removed = 0
            for column in columns:
                order = [row for row in sizes[:, column].sort(stable=True).indices.tolist() if run.kept[row, column]]
                tried += len(order)
                removed += _prune_destination(run, column, order, least)
            return {"kept": run.kept, "counts": torch.tensor([tried, removed])}

        decided = parts.made(f"pruned {name}", decide)
        if not torch.equal(decided["kept"], run.kept):
            run.become(decided["kept"])
        tried, removed = decided["counts"].tolist()
        if tried:
            fell = before - int(run.kept.sum()) - removed
            log.append(_Pruned(name, tried, removed, fell, float(run.difference.mean())))
            say(f"{name}: {tried} edges tried, {removed} removed, {fell} fell with them, LD {log[-1].logit_diff:.3f}")
        if progress is not None:
            below = run.kept[:, : min(columns)].sum()
            progress("pruning", total - int(below), total)
    if not run.kept.any():
        raise NothingFoundError(f"nothing is left: no edge changes LD by {tau:.3g} of it; give a smaller tau")
    left = {edge: circuit.edges[edge] for edge in graph.edges(run.kept)}
    nodes = set(nodes_of(left))
    gone = {edge: score for edge, score in circuit.edges.items() if edge not in left and score is not None}
    pruning = {
        "tau": tau,
        "metric": "mean LD",
        "n_prompts": len(prompts),
        "n_edges": {"before": len(circuit.edges), "after": len(left)},
    }
    provenance = {
        **circuit.provenance,
        "pruning": pruning,
        "steps": [*circuit.provenance.get("steps", ()), *(row.document() for row in log)],
    }
    if stability := circuit.provenance.get("stability"):
        provenance["stability"] = {**stability, "of": "the circuit before pruning"}
    return replace(
        circuit,
        nodes={node: score for node, score in circuit.nodes.items() if node in nodes},
        edges=left,
        outside={**circuit.outside, **gone},
        roles={node: role for node, role in circuit.roles.items() if node in nodes},
        provenance=provenance,
    )


@dataclass(frozen=True)
class _Pruned:
    """What became of the edges into one layer."""

    step: str
    tried: int
    removed: int
    fell: int
    logit_diff: float

    def document(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "edges": self.tried,
            "removed": self.removed,
            "fell with them": self.fell,
            "logit_diff": self.logit_diff,
        }


def _from_the_logits(graph: EdgeGraph) -> Iterator[tuple[str, range]]:
    """The destinations' columns, from the last to the first, layer by layer."""
    end = len(graph.destinations) - 1
    yield "logits", range(end, end - 1, -1)
    for layer in reversed(range(graph.n_layers)):
        yield f"layer {layer}", range(graph.mlp_reads(layer), graph.heads_read(layer).start - 1, -1)


def _prune_destination(run: CircuitRun, column: int, rows: Sequence[int], least: float) -> int:
    """Decides on the edges into one destination in turn; gives how many were removed."""
    left, removed, at_once, expected = list(rows), 0, 4, True
    kept, before = run.kept, float(run.difference.mean(dtype=torch.float64))
    while left:
        masks: list[Tensor] = []
        for row in left[:at_once]:
            # Each without the edges before it too, or with them, as they are expected to go or to stay.
            masks.append((masks[-1] if expected and masks else kept).clone())
            masks[-1][row, column] = False
        values = run.variants(masks).mean(dim=1, dtype=torch.float64).tolist()
        decided, goes = 0, expected
        for mask, value in zip(masks, values, strict=True):
            goes = abs(value - before) < least
            decided += 1
            if goes:
                removed, kept, before = removed + 1, mask, value
            if goes != expected:
                break
        left = left[decided:]
        at_once = min(2 * at_once, VARIANTS) if goes == expected else max(2, at_once // 2)
        expected = goes
    if removed:
        run.become(kept)
    return removed
