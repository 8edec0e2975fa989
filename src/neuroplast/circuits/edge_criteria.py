"""How much of the model a ranking of edges explains, at every size of circuit (MIB, arXiv 2504.13151, section 3.1).

C_k is the circuit of the k % edges that are ranked first, m(X) the mean LD when nothing but the edges of X carries the
clean run and all others carry their source's counterfactual output (`neuroplast.interventions.edge_knockout`), M all
edges, ∅ none. Then

    f(k) = (m(C_k) - m(∅)) / (m(M) - m(∅)),  CPR = area under f,  CMD = area of |1 - f|.

Conventions, as in MIB's published code: k is .001 .002 .005 .01 .02 .05 .1 .2 .5 1 of all edges of the model, rounded
down to a number of edges; edges are chosen as `top-n` (or greedily) by the size of their score, and dangling ones go;
areas are trapezoids over k itself, not its logarithm, from the first k to the last, with nothing below the first. So a
ranking that explains nothing before the last point has CMD .75, MIB's figure for random circuits, and one that
explains all at once has CPR .999. MIB's published CPR ranks by the signed score, edges that help first, its CMD by the
size: `rank` says which. A ratio is one of means over prompts; intervals resample prompts.

An estimate is undefined, and says why, where the interval of m(M) - m(∅) includes 0, or where fewer edges have scores
than C_k has: a ranking of a part of the edges says nothing of circuits that are larger.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.edge_discovery import select_edges
from neuroplast.circuits.files import require_model
from neuroplast.circuits.shape import shape_of
from neuroplast.circuits.shares import quotient
from neuroplast.components import Edge
from neuroplast.errors import InputError, unknown_name
from neuroplast.interventions.chunks import Progress
from neuroplast.interventions.edge_knockout import run_edge_circuits
from neuroplast.interventions.edges import EdgeGraph, build_edge_graph
from neuroplast.interventions.selection import require_prompts
from neuroplast.models.network import Network
from neuroplast.statistics import RESAMPLES, Estimate, Weights, bootstrap_weights, estimate, estimate_mean
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Rank = Literal["size", "helping"]
RANKS: tuple[Rank, ...] = get_args(Rank)
SELECTIONS = ("top-n", "greedy")
ROUNDED = 1e-4
"""A difference of LD that rounding can make."""
RANKINGS = 3
"""Random rankings of the control."""


@dataclass(frozen=True)
class EdgeCurve:
    """Faithfulness by the share of the edges that a circuit has."""

    name: str
    """What ranked the edges: the circuit's method, or `random`."""
    rank: str
    """`size` (of the score), `helping` (the most negative score first), or `random`."""
    select: str
    """`top-n` or `greedy`."""
    n_prompts: int
    """Prompts that means are over."""
    fractions: tuple[float, ...]
    """Shares of all edges of the model."""
    n_edges: tuple[int, ...]
    """Edges of each C_k, dangling ones included."""
    n_connected: tuple[float | None, ...]
    """How many of them connect the input with the logits (of several rankings, the mean); None where undefined."""
    faithfulness: tuple[Estimate, ...]
    """f at each fraction."""
    cpr: Estimate
    """Area under f."""
    cmd: Estimate
    """Area of |1 - f|."""
    model: Estimate
    """m(M)."""
    nothing: Estimate
    """m(∅)."""
    n_scored: int
    """Edges that are ranked."""
    n_total: int
    """Edges of the model."""
    rankings: int = 1
    """How many rankings the curve is the mean of."""
    why: str | None = None
    """Why CPR and CMD are undefined."""

    def document(self) -> dict[str, Any]:
        """Everything as JSON has it; a value that could not be computed is null beside its reason."""
        return asdict(self)


def edge_curve(
    model: Network,
    circuit: Circuit,
    prompts: PromptSet,
    *,
    select: str = "top-n",
    rank: str = "size",
    fractions: Sequence[float] = FRACTIONS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Progress | None = None,
) -> EdgeCurve:
    """Measures f, CPR and CMD of a circuit's scores.

    Args:
        model: the instrumented model.
        circuit: its edges and those outside are ranked by their scores; which ones belong to it does not matter.
        prompts: clean prompts with their counterfactuals.
        select: `top-n` or `greedy`, as `discover_edges` has them.
        rank: by the `size` of a score, or those that help most first (`helping`).
        fractions: shares of all edges, ascending.
        resamples: bootstrap resamples of each interval.
        seed: seed of the resamples.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted measurement goes on.
        progress: called with (steps done, steps in all).

    Returns:
        The curve; undefined where too few edges have scores, or the model does not do the task.

    Raises:
        InputError: for a circuit of another model, a wrong setting, or a budget that is too small.
        UnsupportedModelError: when the model's edges cannot be told apart.
    """
    _require_settings(select, rank, fractions)
    require_model(circuit, shape_of(model))
    curve = _Curve(model, prompts, select, fractions, resamples, seed, memory, parts or Parts(), progress)
    name, ranked = str(circuit.provenance.get("method") or "edges"), _ranked(circuit)
    if not curve.knows(len(ranked)):
        return curve.unknown(name, rank, 1, len(ranked))
    graph = build_edge_graph(model)
    scores, measured = torch.zeros(graph.exists.shape), graph.mask(ranked)
    scores[graph.places(ranked)] = torch.tensor(list(ranked.values()))
    # Of the most helping first: sizes that fall as scores rise.
    order = scores.abs() if rank == "size" else _places(-scores, measured)
    return curve.measure(graph, name, rank, [order], measured)


def random_edge_curve(
    model: Network,
    prompts: PromptSet,
    *,
    rankings: int = RANKINGS,
    select: str = "top-n",
    fractions: Sequence[float] = FRACTIONS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Progress | None = None,
) -> EdgeCurve:
    """The same of random rankings of all edges: what f, CPR and CMD are worth when scores say nothing.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        rankings: how many; the curve is their mean, and CMD the mean of theirs.
        select: `top-n` or `greedy`.
        fractions: shares of all edges, ascending.
        resamples: bootstrap resamples of each interval.
        seed: seed of the rankings and of the resamples.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted measurement goes on.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: for a wrong setting, or a budget that is too small.
        UnsupportedModelError: when the model's edges cannot be told apart.
    """
    _require_settings(select, "size", fractions)
    if type(rankings) is not int or rankings < 1:
        raise InputError(f"rankings must be a whole number, at least 1, got {rankings!r}")
    graph = build_edge_graph(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        _places(torch.rand(graph.exists.shape, generator=generator), graph.exists).float() for _ in range(rankings)
    ]
    curve = _Curve(model, prompts, select, fractions, resamples, seed, memory, parts or Parts(), progress)
    return curve.measure(graph, "random", "random", drawn, graph.exists)


def edge_faithfulness(
    model: Network,
    circuit: Circuit,
    prompts: PromptSet,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """f of a circuit's own edges: (m(C) - m(∅)) / (m(M) - m(∅)).

    Args:
        model: the instrumented model.
        circuit: its edges are kept, whatever their scores.
        prompts: clean prompts with their counterfactuals.
        resamples: bootstrap resamples of the interval.
        seed: seed of the resamples.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted measurement goes on.
        progress: called with (steps done, steps in all).

    Returns:
        The share; undefined, with the reason, where the circuit has no edges without positions, or m(M) - m(∅) is not
        apart from 0.

    Raises:
        InputError: for a circuit of another model, or a budget that is too small.
        UnsupportedModelError: when the model's edges cannot be told apart.
    """
    require_model(circuit, shape_of(model))
    edges = [edge for edge in circuit.edges if edge.source.position is None and edge.destination.position is None]
    if not edges or circuit.provenance.get("method") == "path patching":
        return Estimate(None, None, "the circuit has no edges of the whole model, only paths at positions")
    graph = build_edge_graph(model)

    def measure() -> dict[str, Tensor]:
        sets = [torch.zeros_like(graph.exists), graph.exists, graph.mask(edges)]
        return {"logit_diff": run_edge_circuits(model, prompts, sets, memory=memory, progress=progress)}

    kept = (parts or Parts()).made("chosen edges", measure)["logit_diff"].double().numpy()
    empty, whole, inside = kept
    weights = bootstrap_weights(len(prompts), seed, resamples)
    return quotient(inside - empty, whole - empty, weights, "m(M) - m(∅)")


class _Curve:
    """Measures curves on one model and one set of prompts."""

    def __init__(
        self,
        model: Network,
        prompts: PromptSet,
        select: str,
        fractions: Sequence[float],
        resamples: int,
        seed: int,
        memory: str | int | None,
        parts: Parts,
        progress: Progress | None,
    ) -> None:
        require_prompts(prompts)
        self.model, self.prompts, self.select = model, prompts, select
        self.fractions, self.weights = tuple(map(float, fractions)), bootstrap_weights(len(prompts), seed, resamples)
        self.memory, self.parts, self.progress = memory, parts, progress
        self.n_total = shape_of(model).n_edges
        self.n_edges = tuple(int(fraction * self.n_total) for fraction in self.fractions)

    def knows(self, n_scored: int) -> bool:
        """Whether so many ranked edges give a single point: if not, nothing is worth running."""
        return n_scored >= self.n_edges[-1] or any(0 < n <= n_scored for n in self.n_edges)

    def unknown(self, name: str, rank: str, rankings: int, n_scored: int) -> EdgeCurve:
        """The curve without a point."""
        short = self._short(n_scored)
        nothing = Estimate(None, None, short)
        points = [nothing] * len(self.n_edges)
        return self._curve(name, rank, rankings, n_scored, [], points, (nothing, nothing, nothing, nothing), short)

    def _short(self, n_scored: int) -> str | None:
        if n_scored >= self.n_edges[-1]:
            return None
        return f"only {n_scored} of {self.n_total} edges are ranked, and the largest circuit has {self.n_edges[-1]}"

    def measure(
        self,
        graph: EdgeGraph,
        name: str,
        rank: str,
        rankings: Sequence[Tensor],
        measured: Bool[Tensor, "source destination"],
    ) -> EdgeCurve:
        """The mean curve of some rankings of the measured edges; larger numbers come first."""
        if self.select == "greedy":
            measured = measured & _leading(graph, measured)
        n_scored = int(measured.sum())
        if not self.knows(n_scored):
            return self.unknown(name, rank, len(rankings), n_scored)
        within = [n for n in self.n_edges if n <= n_scored]
        masks = [
            [graph.live(select_edges(graph, each, measured, self.select, n=n)) for n in within] for each in rankings
        ]
        found = self._run(graph, f"edge curve {rank} {self.select}", masks)
        empty, whole, circuits = found[0], found[1], found[2:].reshape(len(rankings), len(within), -1)
        span = estimate_mean(self.weights, whole - empty)
        why = None
        if span.value is None or span.ci95 is None or (span.ci95[0] <= ROUNDED and span.ci95[1] >= -ROUNDED):
            why = f"m(M) - m(∅) is {_shown(span)}, not apart from 0: the counterfactuals take nothing away"

        def shares(weights: Weights) -> Float[np.ndarray, "some ranking fraction"]:
            """f of each ranking."""
            least = weights @ empty
            above = np.einsum("sp,rfp->srf", weights, circuits) - least[:, None, None]
            below = np.broadcast_to((weights @ whole - least)[:, None, None], above.shape)
            # A resample of nothing but prompts that the counterfactual leaves as they are has no f.
            return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)

        points: list[Estimate] = []
        for index, n in enumerate(self.n_edges):
            if why is not None:
                points.append(Estimate(None, None, why))
            elif index < len(within):
                points.append(estimate(self.weights, lambda rows, at=index: shares(rows)[..., at].mean(axis=1)))
            else:
                points.append(Estimate(None, None, f"it has {n} edges, and only {n_scored} are ranked"))
        why = why or self._short(n_scored)
        cpr = cmd = Estimate(None, None, why)
        if why is None:
            cpr = estimate(self.weights, lambda rows: self._area(shares(rows)).mean(axis=1))
            cmd = estimate(self.weights, lambda rows: self._area(np.abs(1 - shares(rows))).mean(axis=1))
        connected = [sum(int(each[index].sum()) for each in masks) / len(masks) for index in range(len(within))]
        model, nothing = estimate_mean(self.weights, whole), estimate_mean(self.weights, empty)
        return self._curve(
            name, rank, len(rankings), n_scored, connected, points, (cpr, cmd, model, nothing), why or cpr.why
        )

    def _curve(
        self,
        name: str,
        rank: str,
        rankings: int,
        n_scored: int,
        connected: Sequence[float],
        points: Sequence[Estimate],
        values: tuple[Estimate, Estimate, Estimate, Estimate],
        why: str | None,
    ) -> EdgeCurve:
        cpr, cmd, model, nothing = values
        return EdgeCurve(
            name=name,
            rank=rank,
            select=self.select,
            n_prompts=len(self.prompts),
            fractions=self.fractions,
            n_edges=self.n_edges,
            n_connected=(*connected, *[None] * (len(self.n_edges) - len(connected))),
            faithfulness=tuple(points),
            cpr=cpr,
            cmd=cmd,
            model=model,
            nothing=nothing,
            n_scored=n_scored,
            n_total=self.n_total,
            rankings=rankings,
            why=why,
        )

    def _run(
        self, graph: EdgeGraph, name: str, masks: Sequence[Sequence[Tensor]]
    ) -> Float[np.ndarray, "circuit prompt"]:
        """LD with no edges, with all, and of every circuit; equal circuits run once."""
        wanted = [torch.zeros_like(graph.exists), graph.exists, *(mask for each in masks for mask in each)]
        numbers: dict[bytes, int] = {}
        which = [numbers.setdefault(mask.numpy().tobytes(), len(numbers)) for mask in wanted]
        first = [wanted[which.index(number)] for number in range(len(numbers))]

        def measure() -> dict[str, Tensor]:
            found = run_edge_circuits(self.model, self.prompts, first, memory=self.memory, progress=self.progress)
            return {"logit_diff": found}

        return self.parts.made(name, measure)["logit_diff"].double().numpy()[which]

    def _area(self, values: Float[np.ndarray, "some ranking fraction"]) -> Float[np.ndarray, "some ranking"]:
        widths = np.diff(self.fractions)
        return ((values[..., 1:] + values[..., :-1]) / 2) @ widths


def _ranked(circuit: Circuit) -> dict[Edge, float]:
    """The scores of a circuit's edges and of those outside; effects of paths, or at positions, are none of these."""
    if circuit.provenance.get("method") == "path patching":
        return {}
    return {
        edge: score
        for edge, score in (*circuit.outside.items(), *circuit.edges.items())
        if score is not None and edge.source.position is None and edge.destination.position is None
    }


def _places(
    values: Float[Tensor, "source destination"], among: Bool[Tensor, "source destination"]
) -> Float[Tensor, "source destination"]:
    """Numbers from 1 in the order of the values."""
    found = torch.zeros_like(values)
    found[among] = values[among].argsort(stable=True).argsort().to(values.dtype) + 1
    return found


def _shown(found: Estimate) -> str:
    return "not a number" if found.ci95 is None else f"{found.value:.3g} [{found.ci95[0]:.3g}, {found.ci95[1]:.3g}]"


def _leading(graph: EdgeGraph, measured: Bool[Tensor, "source destination"]) -> Bool[Tensor, "source destination"]:
    """The edges from which the logits can be reached, which is all that greedy selection ever takes."""
    leads = torch.zeros(len(graph.destinations), dtype=torch.bool)
    leads[-1] = True
    for layer in reversed(range(graph.n_layers)):
        leads[graph.mlp_reads(layer)] = (measured[graph.mlp_written(layer)] & leads).any()
        leads[graph.heads_read(layer)] = (measured[graph.heads_written(layer)] & leads).any(dim=1).repeat(3)
    return leads.expand(measured.shape)


def _require_settings(select: str, rank: str, fractions: Sequence[float]) -> None:
    if select not in SELECTIONS:
        raise unknown_name("selection", select, SELECTIONS)
    if rank not in RANKS:
        raise unknown_name("rank", rank, RANKS)
    ascending = all(low < high for low, high in pairwise(fractions))
    if len(fractions) < 2 or not ascending or not (fractions[0] >= 0 and fractions[-1] <= 1):
        raise InputError(f"fractions must be at least two ascending shares between 0 and 1, got {list(fractions)}")
