"""Finding a circuit by its edges: score all of them, choose some, keep what connects the input with the logits.

Steps:
1. Every edge gets a score: estimated by EAP (Syed et al. 2023, arXiv 2310.10348), EAP-IG (Hanna et al. 2024, arXiv
   2403.17806) or CEAP (arXiv 2606.16920), or exactly by patching it alone (`neuroplast.interventions.edge_patching`).
2. Edges are chosen by the size of their score, whatever its sign: the `n` largest (`top-n`), all that are at least
   `threshold` × |mean LD(clean)| (`threshold`), or greedily (Hanna et al. 2024, section 3): from the logits up, always
   the largest edge into what is in already, until there are `n`.
3. Dangling parts go: edges on no path from the input to the logits change nothing
   (`neuroplast.interventions.edge_knockout`).
4. Where asked for, the circuit is pruned like ACDC (Conmy et al. 2023, arXiv 2304.14997): destinations from the
   logits down; each edge into one is removed for good when that changes the mean LD of what is left by less than
   tau × |mean LD(clean)|; then dangling parts go again. Removed edges carry their source's counterfactual output.

Sign: a score is LD(patched) - LD(clean), in logits, direction clean -> counterfactual; negative: the edge helps.

Deviations: ACDC's metric is the KL divergence from the clean run's output; here it is LD, which the rest of this
library measures, so an edge that moves only other tokens goes. ACDC takes a destination's edges in the order of the
sources; here the weakest score comes first. Many edges are tried at once on a guess of what becomes of the earlier
ones, and again where the guess was wrong: each is decided as if they had been tried one by one.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.circuit import SIGN, Circuit, Shape
from neuroplast.circuits.path_discovery import shape_of
from neuroplast.circuits.stability import agreement
from neuroplast.components import Edge, Node, parse_edge
from neuroplast.errors import InputError, NothingFoundError, unknown_name
from neuroplast.interventions.chunks import Progress
from neuroplast.interventions.edge_attribution import METHODS as ATTRIBUTIONS
from neuroplast.interventions.edge_attribution import STEPS, attribute_edges
from neuroplast.interventions.edge_knockout import VARIANTS, CircuitRun, EdgeGraph, build_edge_graph
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.edges import EdgeScores
from neuroplast.interventions.selection import require_prompts
from neuroplast.models.network import Network
from neuroplast.statistics import bootstrap_weights, interval
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

METHODS = (*ATTRIBUTIONS, "exact")
Choice = Literal["top-n", "threshold", "greedy"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
SHARE = 0.01
"""Share of the edges that are chosen where no `n` is given."""
RESAMPLES = 100
"""Bootstrap resamples of stability."""
NUMBERS_AT_ONCE = 2**24
"""Scores of resamples that are held together."""

Report = Callable[[str, int, int], None]
"""Called with (activity, steps done, steps in all)."""


def discover_edges(
    model: Network,
    prompts: PromptSet,
    *,
    method: str = "eap-ig",
    select: str = "top-n",
    n: int | None = None,
    threshold: float | None = None,
    steps: int = STEPS,
    prune: float | None = None,
    candidates: Sequence[Edge | str] | None = None,
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Report | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Circuit:
    """Finds a circuit by its edges.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        method: how edges are scored: `eap`, `eap-ig`, `ceap`, or `exact`, which costs a forward pass an edge.
        select: how they are chosen: `top-n`, `threshold` or `greedy`.
        n: edges that `top-n` and `greedy` choose, before dangling parts go; None takes 1 % of those measured.
        threshold: least score of `threshold`, as a share of |mean LD(clean)|.
        steps: gradients of `eap-ig` and `ceap`.
        prune: tau of `prune_edges`; None leaves the circuit as it was chosen.
        candidates: the edges that `exact` measures, such as `a20.h0->a23.h3<q>`; None measures all.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted discovery goes on.
        progress: called with (activity, done, total).
        say: told what was measured, chosen and removed.

    Returns:
        The circuit; `outside` has the scores of the other measured edges, `provenance["steps"]` what was done.

    Raises:
        NothingFoundError: when no edge passes, none is connected, or LD is not apart from 0 and shares of it count.
        InputError: for settings that cannot be, or a budget that is too small.
        UnsupportedModelError: when the model's edges cannot be told apart.
    """
    _require_settings(method, select, n, threshold, prune, candidates)
    require_prompts(prompts)
    graph, parts = build_edge_graph(model), parts or Parts()
    kept = parts.made(
        "edge scores", lambda: _measure(model, prompts, graph, method, steps, candidates, memory, progress)
    )
    scored = _Scored(kept["scores"], kept["measured"], kept["clean"])
    n_measured = int(scored.measured.sum())
    log: list[dict[str, Any]] = [{"step": "scores", "method": method, "edges": n_measured}]
    least = None
    if select == "threshold":
        least = (threshold or 0.0) * require_difference(scored.clean)
    elif n is None:
        n = max(1, round(SHARE * n_measured))
    chosen = select_edges(graph, scored.scores, scored.measured, select, n=n, least=least)
    sizes = scored.scores[chosen].abs()
    if not len(sizes):
        largest = float(scored.scores.abs().max())
        raise NothingFoundError(
            f"no edge passes: the threshold {threshold:.3g} of LD is {least:.3g}, and the largest score {largest:.3g}; "
            "give a lower threshold"
        )
    log.append({"step": select, "edges": len(sizes), "least score": float(sizes.min())})
    live = graph.live(chosen)
    log.append({"step": "dangling parts removed", "edges": int(live.sum()), "removed": len(sizes) - int(live.sum())})
    say(
        f"{method}: {n_measured} edges scored, {len(sizes)} chosen by {select}, {int(live.sum())} of them between "
        "input and logits"
    )
    if not live.any():
        raise NothingFoundError(
            f"none of the {len(sizes)} chosen edges lies on a path from the input to the logits: "
            f"give {'a lower threshold' if select == 'threshold' else 'a larger n'}, or select greedily"
        )
    provenance: dict[str, Any] = {
        "method": method,
        "gradients": {"eap": 1, "exact": None}.get(method, steps),
        "select": select,
        "n": n,
        "threshold": threshold,
        "absolute": True,
        "sign": SIGN,
        "direction": "clean->counterfactual",
        "task": prompts.task,
        "n_prompts": len(prompts),
        "logit_diff": float(scored.clean.mean()),
        "n_edges": {"scored": n_measured, "chosen": len(sizes), "connected": int(live.sum())},
        "steps": log,
    }
    circuit = build_edge_circuit(shape_of(model), graph, live, scored.scores, scored.measured, provenance)
    if prune is None:
        return circuit
    return prune_edges(model, prompts, circuit, prune, memory=memory, parts=parts, progress=progress, say=say)


def select_edges(
    graph: EdgeGraph,
    scores: Float[Tensor, "source destination"],
    measured: Bool[Tensor, "source destination"],
    select: str,
    *,
    n: int | None = None,
    least: float | None = None,
) -> Bool[Tensor, "source destination"]:
    """Chooses edges by the size of their score; of equal ones the first.

    Args:
        graph: the model's edges.
        scores: a score for each edge; its sign does not matter.
        measured: which edges have one.
        select: `top-n`, `threshold` or `greedy`.
        n: how many `top-n` and `greedy` choose.
        least: least size that `threshold` chooses.

    Raises:
        InputError: when there are not so many edges, or `greedy` does not reach so many from the logits.
    """
    size = scores.abs()
    if select == "threshold":
        return measured & (size >= (least or 0.0))
    found, wanted, there = torch.zeros_like(measured), n or 0, int(measured.sum())
    if wanted > there:
        raise InputError(f"n is {wanted}, and only {there} edges are scored: give at most {there}")
    if select == "top-n":
        order = size.masked_fill(~measured, -1.0).flatten().sort(descending=True, stable=True).indices[:wanted]
        found.view(-1)[order] = True
        return found
    places = list(_take_greedily(graph, size, measured, wanted))
    if len(places) < wanted:
        raise InputError(f"n is {wanted}, and greedy selection reaches only {len(places)} edges from the logits")
    for place in places:
        found[place] = True
    return found


def _take_greedily(
    graph: EdgeGraph, size: Float[Tensor, "source destination"], measured: Bool[Tensor, "source destination"], n: int
) -> Iterator[tuple[int, int]]:
    reads: dict[Node, list[int]] = {}
    for column, node in enumerate(graph.destinations):
        reads.setdefault(replace(node, channel=None), []).append(column)
    waiting: list[tuple[float, int, int]] = []
    inside: set[Node] = set()

    def enter(node: Node) -> None:
        inside.add(node)
        for column in reads.get(node, []):
            rows = measured[:, column].nonzero()[:, 0].tolist()
            for row, value in zip(rows, size[rows, column].tolist(), strict=True):
                heapq.heappush(waiting, (-value, row, column))

    enter(Node("logits"))
    for _ in range(n):
        if not waiting:
            return
        _, row, column = heapq.heappop(waiting)
        yield row, column
        if graph.sources[row] not in inside:
            enter(graph.sources[row])


def build_edge_circuit(
    shape: Shape,
    graph: EdgeGraph,
    kept: Bool[Tensor, "source destination"],
    scores: Float[Tensor, "source destination"],
    measured: Bool[Tensor, "source destination"],
    provenance: Mapping[str, Any],
) -> Circuit:
    """A circuit of some edges, with the scores of all that were measured."""
    inside, outside = dict(_scored(graph, scores, kept)), dict(_scored(graph, scores, measured & ~kept))
    return Circuit(shape, dict.fromkeys(_nodes_of(inside)), inside, outside, provenance=provenance)


def _scored(
    graph: EdgeGraph, scores: Float[Tensor, "source destination"], mask: Bool[Tensor, "source destination"]
) -> Iterator[tuple[Edge, float]]:
    return zip(graph.edges(mask), scores.T[mask.T].tolist(), strict=True)


def _nodes_of(edges: Mapping[Edge, Any]) -> Iterator[Node]:
    for edge in edges:
        yield edge.source
        yield replace(edge.destination, channel=None)


def prune_edges(
    model: Network,
    prompts: PromptSet,
    circuit: Circuit,
    tau: float,
    *,
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Report | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Circuit:
    """Removes the edges of a circuit that the mean LD does not need: step 4, exact.

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
    _require_positive("tau", tau)
    require_prompts(prompts)
    shape, graph, parts = shape_of(model), build_edge_graph(model), parts or Parts()
    if not shape.fits(circuit.shape):
        raise InputError(f"the circuit is one of {circuit.shape.name}, which has other parts than {model.name}")
    if not circuit.edges:
        raise InputError("the circuit has no edges to prune: give one that was found by its edges")
    mask = graph.mask(circuit.edges)
    least = tau * require_difference(measure_behaviour(model, prompts).logit_diff)
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
    nodes = set(_nodes_of(left))
    gone = {edge: score for edge, score in circuit.edges.items() if edge not in left and score is not None}
    pruning = {
        "tau": tau,
        "metric": "mean LD",
        "n_prompts": len(prompts),
        "n_edges": {"before": len(circuit.edges), "after": len(left)},
    }
    steps = [*circuit.provenance.get("steps", ()), *(row.document() for row in log)]
    return replace(
        circuit,
        nodes={node: score for node, score in circuit.nodes.items() if node in nodes},
        edges=left,
        outside={**circuit.outside, **gone},
        roles={node: role for node, role in circuit.roles.items() if node in nodes},
        provenance={**circuit.provenance, "pruning": pruning, "steps": steps},
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


def require_difference(clean: Float[Tensor, "prompt"]) -> float:
    """|mean LD|, which shares are taken of.

    Raises:
        NothingFoundError: when its interval includes 0.
    """
    low, high = interval(bootstrap_weights(len(clean), 0) @ clean.double().numpy())
    if low <= 0 <= high:
        raise NothingFoundError(
            f"LD {float(clean.mean()):.2f} [{low:.2f}, {high:.2f}] is not apart from 0: the model does not do the "
            "task, and shares of LD mean nothing"
        )
    return abs(float(clean.mean()))


@dataclass(frozen=True)
class EdgeStability:
    """Whether other prompts would have given the same edges."""

    n: int
    """Edges that each resample chooses, before dangling parts go."""
    n_prompts: int
    """Prompts that are resampled."""
    resamples: int
    """How many resamples."""
    seed: int
    """Seed of the draw."""
    jaccard: float
    """Mean Jaccard of two resamples' edges."""
    spread: tuple[float, float]
    """The 2.5 % and 97.5 % points of the pairs."""


def edge_stability(scores: EdgeScores, n: int, resamples: int = RESAMPLES, seed: int = 0) -> EdgeStability:
    """Chooses the n largest edges on bootstrap resamples of the prompts (arXiv 2510.00845).

    Args:
        scores: from `attribute_edges` with `per_prompt=True`.
        n: edges that are chosen, by the size of their mean score.
        resamples: how many, at least 2.
        seed: seed of the draw.

    Raises:
        InputError: for scores that are not kept prompt by prompt or are of a single prompt, fewer than two resamples,
            or an n that is not between 1 and the number of edges.
    """
    if scores.per_prompt is None:
        raise InputError("stability needs the scores of every prompt: attribute the edges with per_prompt=True")
    if len(scores.clean) < 2:
        raise InputError("stability needs at least 2 prompts to resample, got 1")
    if resamples < 2:
        raise InputError(f"{resamples} resamples: agreement needs at least 2, better 100")
    values = scores.per_prompt[scores.exists]
    if not 0 < n <= len(values):
        raise InputError(f"n is {n}; expected 1 to {len(values)}, the edges that are scored")
    weights = torch.from_numpy(bootstrap_weights(len(scores.clean), seed, resamples)).to(values.dtype)
    parts = weights.split(max(1, NUMBERS_AT_ONCE // len(values)))
    chosen = torch.cat([(values @ part.T).abs().topk(n, dim=0).indices.T for part in parts])
    # Most edges are never chosen: only the others are columns.
    seen, places = chosen.unique(return_inverse=True)
    members = torch.zeros(resamples, len(seen), dtype=torch.bool).scatter_(1, places, True)
    found = agreement(members.numpy())
    assert found.mean is not None and found.spread is not None
    return EdgeStability(n, len(scores.clean), resamples, seed, found.mean, found.spread)


@dataclass(frozen=True)
class _Scored:
    """What was measured."""

    scores: Float[Tensor, "source destination"]
    measured: Bool[Tensor, "source destination"]
    clean: Float[Tensor, "prompt"]


def _measure(
    model: Network,
    prompts: PromptSet,
    graph: EdgeGraph,
    method: str,
    steps: int,
    candidates: Sequence[Edge | str] | None,
    memory: str | int | None,
    progress: Report | None,
) -> dict[str, Tensor]:
    """The fields of `_Scored`."""
    told = _named(progress, method)
    if method != "exact":
        found = attribute_edges(model, prompts, method=method, steps=steps, memory=memory, progress=told)
        return {"scores": found.scores, "measured": found.exists, "clean": found.clean}
    edges = None
    if candidates is not None:
        edges = [edge if isinstance(edge, Edge) else parse_edge(edge) for edge in candidates]
        graph.mask(edges)  # refuses what is none before anything is measured
    exact = patch_edges(model, prompts, edges, receivers="all", memory=memory, progress=told)
    scores = torch.zeros(graph.exists.shape)
    scores[graph.places(exact.edges)] = exact.effects.mean(dim=1)
    return {"scores": scores, "measured": graph.mask(exact.edges), "clean": exact.clean}


def _named(progress: Report | None, name: str) -> Progress | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _require_settings(
    method: str,
    select: str,
    n: int | None,
    threshold: float | None,
    prune: float | None,
    candidates: Sequence[Edge | str] | None,
) -> None:
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if select not in CHOICES:
        raise unknown_name("selection", select, CHOICES)
    if candidates is not None and method != "exact":
        raise InputError(f"candidates are for method 'exact'; {method!r} scores all edges at once: leave them out")
    if n is not None and (type(n) is not int or n < 1):
        raise InputError(f"n must be a whole number, at least 1, got {n!r}")
    if select == "threshold":
        if n is not None:
            raise InputError("select='threshold' takes a threshold, not n: give one of them")
        if threshold is None:
            raise InputError("select='threshold' needs a threshold, a share of |LD| such as 0.005")
    elif threshold is not None:
        raise InputError(f"select={select!r} takes n, not a threshold: use select='threshold'")
    for name, value in (("threshold", threshold), ("tau", prune)):
        if value is not None:
            _require_positive(name, value)


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"{name} must be a positive number, a share of |LD| such as 0.005, got {value!r}")
