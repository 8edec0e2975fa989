"""Circuits of edges, run exactly: some edges carry this run, every other edge its source's counterfactual output.

The convention is that of ACDC (Conmy et al. 2023, arXiv 2304.14997), EAP-IG (Hanna et al. 2024, arXiv 2403.17806) and
MIB (arXiv 2504.13151). Each destination (each head's q, k and v, each MLP, the logits) reads

    what it reads on the counterfactual prompts + the sum over its kept edges of
    (what the source writes in this run - what it writes on the counterfactual prompts),

and the model's own norm, projections, q/k norms, position encodings, attention and MLP compute from there. With all
edges kept that is the clean run, with none the counterfactual one. Of keys and values that grouped queries share,
every query head reads its own. Where a norm stands behind the attention (Gemma 3), the heads of a layer that a
destination keeps pass it together, beside the counterfactual values of the others.

Steps: `neuroplast.interventions.edge_replay` runs circuits on one chunk of prompts; here chunks are cut, circuits
put together that share parts, and one circuit's run kept for variants of it (`CircuitRun`), which then cost only what
lies above the edges in which they differ.

The result is a logit difference, not an effect: there is no sign to choose.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.components import READ_CHANNELS, ReadChannel
from neuroplast.errors import InputError
from neuroplast.interventions.chunks import Chunk, Progress, Size, in_prompt_chunks, rows_at_once
from neuroplast.interventions.edge_replay import RECORDED, ChunkRuns, CircuitState, ReadMap, width_of
from neuroplast.interventions.edges import EdgeGraph, Workspace, build_edge_graph
from neuroplast.interventions.pairs import recorded_bytes
from neuroplast.interventions.selection import require_prompts
from neuroplast.memory import show_size, working_memory
from neuroplast.models.network import Network
from neuroplast.models.readers import find_reader
from neuroplast.tasks.prompts import PromptSet

SHARE = 0.25
"""Share of the usual rows that a chunk takes: every row brings the changes of all sources with it."""
VARIANTS = 64
"""Circuits that are planned together."""


def run_edge_circuits(
    model: Network,
    prompts: PromptSet,
    kept: Sequence[Bool[Tensor, "source destination"]],
    *,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "circuit prompt"]:
    """The logit difference with nothing but some edges, for several circuits.

    Args:
        model: the instrumented model.
        prompts: clean prompts with their counterfactuals.
        kept: each circuit's edges, as `build_sources` × `build_destinations`; `EdgeGraph.mask` makes one of names.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free. Results do not change.
        progress: called with (steps done, steps in all).

    Returns:
        LD by circuit and prompt, on the CPU, in float32.

    Raises:
        InputError: for a matrix of another model, an edge that the model does not have, or a budget too small.
        UnsupportedModelError: when the model's edges cannot be told apart.
    """
    graph, read = _prepare(model, prompts)
    masks = [graph.live(_checked(graph, mask)) for mask in kept]
    result = torch.zeros(len(masks), len(prompts))
    order = sorted(range(len(masks)), key=lambda number: int(masks[number].sum()))
    workspace = Workspace()
    if not masks:
        return result
    size = _size(model, prompts, graph, masks, len(masks))

    def work(chunk: Chunk, copies: int, tick: Callable[[], None]) -> None:
        runs = ChunkRuns(model, chunk, graph, read, workspace)
        begin = runs.counterfactual()
        for first in range(0, len(order), VARIANTS):
            part = order[first : first + VARIANTS]
            found = runs.run(begin, [masks[number] for number in part], copies * _width(graph, masks), tick)
            result[torch.tensor(part)[:, None], chunk.rows] = found.cpu()

    in_prompt_chunks(model, prompts, size, work, len(masks), memory=memory, progress=progress)
    return result


class CircuitRun:
    """A circuit's run on all prompts, kept so that variants of it cost only what differs."""

    def __init__(
        self,
        model: Network,
        prompts: PromptSet,
        kept: Bool[Tensor, "source destination"],
        *,
        memory: str | int | None = None,
    ) -> None:
        """Runs the circuit.

        Args:
            model: the instrumented model.
            prompts: clean prompts with their counterfactuals; the circuit's run on all of them is held in memory.
            kept: the circuit's edges, as `run_edge_circuits` takes them.
            memory: bound on the process's memory, such as `4GiB`; None takes what is free.

        Raises:
            InputError: as `run_edge_circuits`; also when the run does not fit the memory.
            UnsupportedModelError: when the model's edges cannot be told apart.
        """
        self.graph, read = _prepare(model, prompts)
        self.kept = self.graph.live(_checked(self.graph, kept))
        """The circuit's edges, without those that lead nowhere."""
        sources = 1 + int(self.kept.any(dim=1).sum())
        held = prompts.width * model.module.dtype.itemsize * model.d_model * (sources + 3 * model.n_layers)
        size = _size(model, prompts, self.graph, [self.kept], VARIANTS, held)
        free = working_memory(model.device, memory)
        if (needed := len(prompts) * size.recorded + size.copy) > free:
            raise InputError(
                f"the circuit's run on {len(prompts)} prompts takes {show_size(needed)}, and {show_size(free)} of "
                "memory are left: give fewer prompts, a smaller circuit, or a larger budget"
            )
        self._states: list[tuple[ChunkRuns, CircuitState]] = []
        self._n_prompts = len(prompts)
        self._budget = 0
        workspace = Workspace()

        def work(chunk: Chunk, copies: int, _: Callable[[], None]) -> None:
            runs = ChunkRuns(model, chunk, self.graph, read, workspace)
            state = runs.follow(runs.counterfactual(), self.kept)
            self._budget = max(self._budget, copies * _width(self.graph, [self.kept]))
            self._states.append((runs, state))

        in_prompt_chunks(model, prompts, size, work, 0, memory=memory)

    @property
    def difference(self) -> Float[Tensor, "prompt"]:
        """The circuit's logit difference, on the CPU."""
        found = torch.zeros(self._n_prompts)
        for runs, state in self._states:
            found[runs.chunk.rows] = state.difference.cpu()
        return found

    def variants(self, kept: Sequence[Bool[Tensor, "source destination"]]) -> Float[Tensor, "variant prompt"]:
        """The logit difference of circuits that differ from this one in few edges, on the CPU.

        Args:
            kept: the edges of each.

        Raises:
            InputError: for a matrix of another model, or an edge that the model does not have.
        """
        masks = [_checked(self.graph, mask) for mask in kept]
        found = torch.zeros(len(masks), self._n_prompts)
        for runs, state in self._states:
            for first in range(0, len(masks), VARIANTS):
                part = masks[first : first + VARIANTS]
                place = torch.arange(first, first + len(part))[:, None]
                found[place, runs.chunk.rows] = runs.run(state, part, self._budget).cpu()
        return found

    def become(self, kept: Bool[Tensor, "source destination"]) -> None:
        """Goes on from a variant.

        Args:
            kept: its edges, fewer than this circuit's.

        Raises:
            InputError: when it has an edge that this circuit does not have.
        """
        if bool((kept & ~self.kept).any()):
            raise InputError("a circuit's run goes on with some of its edges; here others were added")
        self.kept = self.graph.live(kept)
        # What leads nowhere keeps its former values in the state: nothing that is left reads them.
        self._states = [(runs, replace(runs.follow(state, kept), kept=self.kept)) for runs, state in self._states]


def _prepare(model: Network, prompts: PromptSet) -> tuple[EdgeGraph, list[dict[ReadChannel, ReadMap]]]:
    require_prompts(prompts)
    model.require_mlps()
    found: list[dict[ReadChannel, ReadMap]] = []
    for layer in range(model.n_layers):
        projections = model.projections.get(layer) or find_reader(model, layer).projections
        found.append({channel: ReadMap(projections[channel], model) for channel in READ_CHANNELS})
    return build_edge_graph(model), found


def _checked(graph: EdgeGraph, mask: Bool[Tensor, "source destination"]) -> Bool[Tensor, "source destination"]:
    if mask.shape != graph.exists.shape:
        raise InputError(
            f"a circuit's matrix is {tuple(mask.shape)}; the model has {tuple(graph.exists.shape)} sources and "
            "destinations"
        )
    mask = mask.cpu()
    for u, v in (mask & ~graph.exists).nonzero().tolist():
        raise InputError(f"the model has no edge from {graph.sources[u]} to {graph.destinations[v]}")
    return mask


def _width(graph: EdgeGraph, masks: Collection[Bool[Tensor, "source destination"]]) -> int:
    """Residual streams that one copy of the largest circuit holds."""
    return max(width_of(graph, int(mask.any(dim=1).sum())) for mask in masks)


def _size(
    model: Network, prompts: PromptSet, graph: EdgeGraph, masks: Sequence[Tensor], at_once: int, held: int = 0
) -> Size:
    """What circuits hold, a prompt; `held` bytes of it stay."""
    width, row = prompts.width, model.d_model * model.module.dtype.itemsize
    recorded = recorded_bytes(model, width, [RECORDED]) + held
    rows = int(rows_at_once(model) * SHARE)
    copies = max(1, min(at_once, rows // (width * len(prompts))))
    return Size(recorded, width * row * _width(graph, masks), copies, share=SHARE)
