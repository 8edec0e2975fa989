"""Exact edge patching: one edge at a time, by running the model (the reference that attribution estimates).

An edge u -> v is patched when v alone reads u's counterfactual output in place of its clean one, everything else that
v reads staying clean, and everything after v recomputing. That is path patching into v with heads and MLPs frozen
(`neuroplast.interventions.path_patching`): v's input is a sum, so only the part of the model above v runs.

Sign: effect = LD(patched) - LD(clean), in logits. The cost is a forward pass above v for every edge and prompt, so
name the edges, or the few receivers, that matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.components import Edge, Node, parse_edge
from neuroplast.errors import InputError
from neuroplast.interventions.chunks import Chunk, Progress, in_prompt_chunks
from neuroplast.interventions.edges import joined
from neuroplast.interventions.pairs import Pair
from neuroplast.interventions.path_patching import PathPatch, places_for, size_of_paths
from neuroplast.interventions.selection import EACH, Selection, select_destinations, select_senders
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet


@dataclass(frozen=True)
class EdgeEffects:
    """The exact effect of each edge that was patched; on the CPU, in float32."""

    edges: tuple[Edge, ...]
    """What was patched, one edge a row."""
    effects: Float[Tensor, "edge prompt"]
    """LD(patched) - LD(clean), in logits; negative: the edge helps."""
    clean: Float[Tensor, "prompt"]
    """Logit difference, answer minus foil, on the clean prompts."""
    counterfactual: Float[Tensor, "prompt"]
    """The same difference on the counterfactual prompts."""


def patch_edges(
    model: Network,
    prompts: PromptSet,
    edges: Sequence[Edge | str] | Edge | str | None = None,
    *,
    senders: Selection = "all",
    receivers: Selection = "logits",
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> EdgeEffects:
    """Patches edges one at a time, exactly.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        edges: which, such as `a20.h0->a23.h3<q>`; None takes all from `senders` to `receivers`.
        senders: `heads`, `mlps`, `input`, `all`, or nodes.
        receivers: `q`, `k`, `v`, `mlps`, `logits`, `all`, or nodes; each is patched alone.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free. Results do not change.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: for a name that is none, a part that is not there, no edge, or a budget that is too small.
    """
    model.require_mlps()
    chosen = choose_edges(model, prompts, edges, senders, receivers)
    by_destination: dict[Node, list[int]] = {}
    for number, edge in enumerate(chosen):
        # Of the logits, only those at END count.
        read = edge.destination.at("end") if edge.destination.kind == "logits" else edge.destination
        by_destination.setdefault(read, []).append(number)
    sources = [(edge.source,) for edge in chosen]
    effects = torch.zeros(len(chosen), len(prompts))
    clean, counterfactual = torch.zeros(len(prompts)), torch.zeros(len(prompts))

    places = places_for([(node,) for node in by_destination], sources, "frozen")

    def work(chunk: Chunk, copies: int, tick: Callable[[], None]) -> None:
        pair = Pair(model, chunk, *places)
        clean[chunk.rows], counterfactual[chunk.rows] = pair.clean.cpu(), pair.counterfactual.cpu()
        for destination, numbers in by_destination.items():
            for first in range(0, len(numbers), copies):
                part = numbers[first : first + copies]
                patch = PathPatch(pair, [sources[number] for number in part], (destination,), "frozen")
                effects[torch.tensor(part)[:, None], chunk.rows] = patch.effects().T.cpu()
            tick()

    widest = max(by_destination, key=lambda node: (node.kind != "logits", node.kind == "mlp", node.position is None))
    size = size_of_paths(model, prompts, (widest,), places, max(map(len, by_destination.values())))
    in_prompt_chunks(model, prompts, size, work, len(by_destination), memory=memory, progress=progress)
    return EdgeEffects(chosen, effects, clean, counterfactual)


def choose_edges(
    model: Network,
    prompts: PromptSet,
    edges: Sequence[Edge | str] | Edge | str | None,
    senders: Selection,
    receivers: Selection,
) -> tuple[Edge, ...]:
    """The edges that are named, or all from some senders to some receivers.

    Raises:
        InputError: for a name that is none, a part that is not there, or where no edge is left.
    """
    if edges is not None:
        listed = [edges] if isinstance(edges, str | Edge) else edges
        named = [edge if isinstance(edge, Edge) else parse_edge(edge) for edge in listed]
        if not named:
            raise InputError("no edges are given; expected names such as a20.h0->a23.h3<q>, or None for all")
        for edge in named:
            if EACH in (edge.source.position, edge.destination.position):
                raise InputError(f"{edge}: an edge stands at one position, or at all")
        # Selecting them checks that the model has these parts and the prompts these positions.
        select_senders([edge.source for edge in named], model, prompts)
        select_destinations([edge.destination for edge in named], model, prompts)
        for edge in named:
            if not joined(edge.source, edge.destination, model.is_parallel):
                raise InputError(f"{model.name} has no edge {edge}: both read the same residual stream")
        return tuple(named)
    groups = select_senders(senders, model, prompts)
    if together := [group for group in groups if len(group) > 1]:
        raise InputError(f"an edge begins at one node, got the group {'+'.join(map(str, together[0]))}")
    chosen = tuple(
        Edge(source, destination)
        for destination in select_destinations(receivers, model, prompts)
        for (source,) in groups
        if joined(source, destination, model.is_parallel)
    )
    if not chosen:
        raise InputError("no edge joins these senders and receivers: a receiver must come after its sender")
    return chosen
