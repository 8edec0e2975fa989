"""Rows of circuits: finding one, and judging many."""

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.bench.job import Counted, Job, Missing, Peer, PeerTime, Setting
from neuroplast.bench.operations import Operations
from neuroplast.bench.rate import timed
from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.discover import discover
from neuroplast.components import Node
from neuroplast.interventions.ablation import Ablation, build_ablation
from neuroplast.interventions.chunks import build_chunk
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.interventions.selection import position_mask
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

DISCOVERY: dict[str, Any] = {"threshold": 0.1, "depth": 1}
"""Settings of the discovery: the heads that do most, and those that they read."""
DISCOVERY_PROMPTS = 8
"""Prompts of the discovery, the fewest that it takes; with more than 16, heads would be cut on some of them."""
CIRCUITS, SIZE = 20, 20
"""Circuits that are judged, and heads of each."""
TIMED = 2
"""Circuits that are judged by hooks."""


def draw_circuits(model: Network, prompts: PromptSet, n: int) -> list[list[Node]]:
    """Circuits of random heads at random named positions."""
    generator = torch.Generator().manual_seed(0)
    heads, names = model.n_layers * model.n_heads, list(prompts.positions)
    circuits: list[list[Node]] = []
    for _ in range(n):
        drawn = torch.randperm(heads * len(names), generator=generator)[:SIZE].tolist()
        places = [(*divmod(index % heads, model.n_heads), names[index // heads]) for index in drawn]
        circuits.append([Node("head", layer, head, name) for layer, head, name in places])
    return circuits


def discovery(setting: Setting) -> Job:
    """A circuit found by path patching."""
    model, prompts = setting.model, setting.prompts(DISCOVERY_PROMPTS, DISCOVERY_PROMPTS)
    operations = Operations(model, prompts)

    def count(found: Circuit) -> float:
        return operations.discovery(found.provenance["steps"])

    told = ", ".join(f"{name} {value}" for name, value in DISCOVERY.items())
    return Job(
        f"a circuit found by path patching ({told}), {len(prompts)} prompts",
        lambda: discover(model, prompts, **DISCOVERY),
        Counted(count),
        Missing("no peer finds circuits by path patching"),
        is_long=True,
    )


def criteria(setting: Setting) -> Job:
    """Random circuits judged by what is left of the logit difference, every other head knocked out."""
    model, prompts = setting.model, setting.prompts()
    circuits = draw_circuits(model, prompts, CIRCUITS)
    ablation = build_ablation(model, prompts)
    operations = Operations(model, prompts).circuits(circuits)

    def by_hooks(found: Float[Tensor, "set prompt"]) -> PeerTime:
        slow: list[Tensor] = []
        few = circuits[:TIMED]
        seconds = timed(lambda: slow.extend(judge_by_hooks(model, prompts, each, ablation) for each in few), model)
        error = max(float((a - b).abs().max()) for a, b in zip(found, slow, strict=False))
        return PeerTime(seconds / len(few) * len(circuits), f"{len(few)} of {len(circuits)} circuits", error)

    return Job(
        f"{len(circuits)} circuits of {SIZE} heads judged, {len(prompts)} prompts",
        lambda: run_knockouts(model, prompts, circuits, ablation, keep=True),
        Counted(lambda _: operations),
        Peer("hooks before each output projection", by_hooks),
    )


@torch.no_grad()
def judge_by_hooks(
    model: Network, prompts: PromptSet, nodes: Collection[Node], ablation: Ablation
) -> Float[Tensor, "prompt"]:
    """One circuit's logit difference by one forward pass of the whole prompts, with hooks."""
    chunk = build_chunk(prompts, torch.arange(len(prompts)), model.device)
    values = ablation.values(model, chunk, model.n_layers)
    with ExitStack() as stack:
        for layer, projection in enumerate(model.parts.projections):
            kept = torch.zeros(*chunk.prompts.clean.shape, model.n_heads, dtype=torch.bool, device=model.device)
            for node in nodes:
                if node.layer == layer:
                    kept[..., node.head] |= position_mask(chunk.prompts, node.position)

            def replace(_: object, args: tuple[Tensor], layer: int = layer, kept: Tensor = kept) -> tuple[Tensor]:
                z = args[0].view(*kept.shape, model.d_head)
                return (torch.where(kept[..., None], z, values[layer]).view(args[0].shape),)

            stack.callback(projection.register_forward_pre_hook(replace).remove)
        logits = model.logits(chunk.prompts.clean, chunk.end)
    rows = torch.arange(len(prompts), device=model.device)
    return (logits[rows, chunk.prompts.answer] - logits[rows, chunk.prompts.foil]).cpu()
