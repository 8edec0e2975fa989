"""Finding a circuit by its edges: score all of them, choose some, keep what connects the input with the logits.

Steps:
1. Every edge gets a score: estimated by EAP (Syed et al. 2023, arXiv 2310.10348), EAP-IG (Hanna et al. 2024, arXiv
   2403.17806) or CEAP (arXiv 2606.16920), or exactly by patching it alone (`neuroplast.interventions.edge_patching`).
2. Edges are chosen by the size of their score, whatever its sign: the `n` largest (`top-n`), all that are at least
   `threshold` × |mean LD(clean)| (`threshold`), or greedily (Hanna et al. 2024, section 3): from the logits up, always
   the largest edge into what is in already, until there are `n`.
3. Dangling parts go: edges on no path from the input to the logits change nothing
   (`neuroplast.interventions.edge_knockout`).
4. The same choice is made on bootstrap resamples of the prompts, from scores that are kept prompt by prompt: how far
   their circuits agree is the circuit's stability (arXiv 2510.00845).
5. Where asked for, the circuit is pruned (`neuroplast.circuits.edge_pruning`).

Sign: a score is LD(patched) - LD(clean), in logits, direction clean -> counterfactual; negative: the edge helps.

Deviation: stability is that of the circuit before pruning.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.circuits.circuit import SIGN, Circuit, Shape, nodes_of
from neuroplast.circuits.edge_pruning import prune_edges
from neuroplast.circuits.shape import require_difference, require_positive, shape_of
from neuroplast.circuits.stability import RESAMPLES, agreement
from neuroplast.components import Edge, Node, parse_edge
from neuroplast.errors import InputError, NothingFoundError, unknown_name
from neuroplast.interventions.edge_attribution import METHODS as ATTRIBUTIONS
from neuroplast.interventions.edge_attribution import STEPS, attribute_edges
from neuroplast.interventions.edge_patching import patch_edges
from neuroplast.interventions.edges import EdgeGraph, build_edge_graph
from neuroplast.interventions.selection import require_prompts
from neuroplast.memory import show_size, working_memory
from neuroplast.models.network import Network
from neuroplast.observer import Told, about
from neuroplast.statistics import bootstrap_weights
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

METHODS = (*ATTRIBUTIONS, "exact")
Choice = Literal["top-n", "threshold", "greedy"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
SHARE = 0.01
"""Share of the edges that are chosen where no `n` is given."""
MOST_BYTES = 2**30
"""Most that the scores of every prompt may take; without them there is no stability."""
MOST_OF_BUDGET = 0.25
"""Most of a memory budget that they may take."""
NUMBERS_AT_ONCE = 2**24
"""Scores of resamples that are held together."""


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
    progress: Told | None = None,
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
        The circuit; `outside` has the scores of the other measured edges, `provenance["steps"]` what was done, and
        `provenance["stability"]` how far resamples of the prompts agree, as `Stability.document` writes it without
        the drawn sets; where the scores of every prompt are too many to keep, null and a reason.

    Raises:
        NothingFoundError: when no edge passes, none is connected, or LD is not apart from 0 and shares of it count.
        InputError: for settings that cannot be, or a budget that is too small.
        UnsupportedModelError: when the model's edges cannot be told apart.
    """
    require_edge_settings(method, select, n, threshold, prune, candidates)
    require_prompts(prompts)
    graph, parts = build_edge_graph(model), parts or Parts()

    def measure() -> dict[str, Tensor]:
        found = _measure(model, prompts, graph, method, steps, candidates, memory, progress)
        kept = {"scores": found.scores, "measured": found.measured, "clean": found.clean}
        return kept | (_resample(graph, found, select, n, threshold) if found.by_prompt is not None else {})

    kept = parts.made(f"{method}, edge scores and stability", measure)
    scores, measured, clean = kept["scores"], kept["measured"], kept["clean"]
    n_measured = int(measured.sum())
    log: list[dict[str, Any]] = [{"step": "scores", "method": method, "edges": n_measured}]
    least = None
    if select == "threshold":
        least = (threshold or 0.0) * require_difference(clean.double().numpy())
    else:
        n = n or _usual_number(n_measured)
    chosen = select_edges(graph, scores, measured, select, n=n, least=least)
    sizes = scores[chosen].abs()
    if not len(sizes):
        largest = float(scores.abs().max())
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
        "logit_diff": float(clean.mean()),
        "n_edges": {"scored": n_measured, "chosen": len(sizes), "connected": int(live.sum())},
        "steps": log,
        "stability": _stability_document(graph, len(prompts), kept),
    }
    circuit = build_edge_circuit(shape_of(model), graph, live, scores, measured, provenance)
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
    return Circuit(shape, dict.fromkeys(nodes_of(inside)), inside, outside, provenance=provenance)


def _scored(
    graph: EdgeGraph, scores: Float[Tensor, "source destination"], mask: Bool[Tensor, "source destination"]
) -> Iterator[tuple[Edge, float]]:
    return zip(graph.edges(mask), scores.T[mask.T].tolist(), strict=True)


@dataclass(frozen=True)
class _Measured:
    """The scores of edges."""

    scores: Float[Tensor, "source destination"]
    """Means over prompts."""
    measured: Bool[Tensor, "source destination"]
    """Which edges have one."""
    clean: Float[Tensor, "prompt"]
    """LD on the clean prompts."""
    by_prompt: Float[Tensor, "*edge prompt"] | None
    """The scores prompt by prompt, where they are kept."""
    places: tuple[Sequence[int] | slice, Sequence[int] | slice]
    """Where these stand in the matrix."""


def _measure(
    model: Network,
    prompts: PromptSet,
    graph: EdgeGraph,
    method: str,
    steps: int,
    candidates: Sequence[Edge | str] | None,
    memory: str | int | None,
    progress: Told | None,
) -> _Measured:
    told, several = about(progress, method), len(prompts) > 1
    if method != "exact":
        keep = several and _bytes_by_prompt(graph, len(prompts)) <= _most_bytes(model, memory)
        found = attribute_edges(
            model, prompts, method=method, steps=steps, per_prompt=keep, memory=memory, progress=told
        )
        return _Measured(found.scores, found.exists, found.clean, found.per_prompt, (slice(None), slice(None)))
    edges = None
    if candidates is not None:
        edges = [edge if isinstance(edge, Edge) else parse_edge(edge) for edge in candidates]
        graph.mask(edges)  # refuses what is none before anything is measured
    exact = patch_edges(model, prompts, edges, receivers="all", memory=memory, progress=told)
    places = graph.places(exact.edges)
    scores = torch.zeros(graph.exists.shape)
    scores[places] = exact.effects.mean(dim=1)
    return _Measured(scores, graph.mask(exact.edges), exact.clean, exact.effects if several else None, places)


def _usual_number(n_measured: int) -> int:
    return max(1, round(SHARE * n_measured))


def _bytes_by_prompt(graph: EdgeGraph, n_prompts: int) -> int:
    return 4 * graph.exists.numel() * n_prompts


def _most_bytes(model: Network, memory: str | int | None) -> int:
    if memory is None or model.device.type != "cpu":
        return MOST_BYTES
    return min(MOST_BYTES, int(MOST_OF_BUDGET * working_memory(model.device, memory)))


def _resample(
    graph: EdgeGraph, found: _Measured, select: str, n: int | None, threshold: float | None
) -> dict[str, Tensor]:
    """Chooses anew on bootstrap resamples of the prompts.

    Returns:
        `nodes` and `edges`: mean pairwise Jaccard of the circuits' heads and of their edges, with the 2.5 % and 97.5 %
        points of the pairs (NaN where all are empty); `frequency`: share of the circuits that have each source.
    """
    assert found.by_prompt is not None
    weights = torch.from_numpy(bootstrap_weights(len(found.clean), 0, RESAMPLES)).float()
    n = n or _usual_number(int(found.measured.sum()))
    drawn: list[Tensor] = []
    for part in weights.split(max(1, NUMBERS_AT_ONCE // graph.exists.numel())):
        for row, values in zip(part, (found.by_prompt @ part.T).unbind(dim=-1), strict=True):
            scores = torch.zeros(graph.exists.shape)
            scores[found.places] = values
            least = (threshold or 0.0) * abs(float(row @ found.clean))
            drawn.append(graph.live(select_edges(graph, scores, found.measured, select, n=n, least=least)))
    edges = torch.stack(drawn)
    sources = edges.any(dim=2)
    heads = torch.tensor([node.kind == "head" for node in graph.sources])
    # Most edges are never chosen: only the others are columns.
    members = {"nodes": sources[:, heads], "edges": edges[:, edges.any(dim=0)]}
    return {name: _numbers(each) for name, each in members.items()} | {"frequency": sources.double().mean(dim=0)}


def _numbers(members: Bool[Tensor, "circuit item"]) -> Float[Tensor, "number"]:
    found = agreement(members.numpy())
    if found.mean is None or found.spread is None:
        return torch.full((3,), float("nan"), dtype=torch.float64)
    return torch.tensor([found.mean, *found.spread], dtype=torch.float64)


def _stability_document(graph: EdgeGraph, n_prompts: int, kept: Mapping[str, Tensor]) -> dict[str, Any]:
    if "frequency" not in kept:
        why = "a single prompt cannot be resampled"
        if n_prompts > 1:
            size = show_size(_bytes_by_prompt(graph, n_prompts))
            why = f"the scores of every prompt take {size}, too much to keep: give fewer prompts, or a larger budget"
        return {"resamples": 0, "nodes_jaccard": None, "edges_jaccard": None, "frequency": {}, "why": why}
    document: dict[str, Any] = {"resamples": RESAMPLES}
    for level in ("nodes", "edges"):
        mean, *spread = kept[level].tolist()
        known = math.isfinite(mean)
        document[f"{level}_jaccard"] = {"mean": mean if known else None, "spread": spread if known else None}
    shares = zip(graph.sources, kept["frequency"].tolist(), strict=True)
    document["frequency"] = {str(node): share for node, share in shares if share and node.kind == "head"}
    return document


def require_edge_settings(
    method: str,
    select: str = CHOICES[0],
    n: int | None = None,
    threshold: float | None = None,
    prune: float | None = None,
    candidates: Sequence[Edge | str] | None = None,
) -> None:
    """Checks settings of `discover_edges`.

    Raises:
        InputError: for settings that cannot be.
    """
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
            require_positive(name, value)
