"""Judging circuits: measured ÷ arithmetic floor, and ÷ plain hooks, in one run.

    python benchmarks/circuits.py --model smollm2-135m --prompts 64 --circuits 100

Random circuits of one size, heads at named positions, each judged by the logit difference that is left when every
other head is knocked out (mean by position). The floor counts the matrix products of one run with all heads knocked
out, and for each circuit the rows where it keeps a head, and END, from its first layer up, at this machine's own
matrix-product rate, measured between the repeats. The peer is what people write today: one forward pass of the whole
prompts a circuit, with a hook before each output projection; a few circuits are timed and scaled to all. The last
line is one JSON object.
"""

import argparse
import json
import statistics
from contextlib import ExitStack

import torch
from torch import Tensor

import neuroplast as npl
from engine import Operations, load, matrix_rate, timed
from neuroplast.components import Node
from neuroplast.interventions.ablation import Ablation, build_ablation
from neuroplast.interventions.chunks import build_chunk
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.interventions.selection import position_mask
from neuroplast.memory import reuse_freed_memory
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

SIZE = 20


def draw_circuits(model: Network, prompts: PromptSet, n: int) -> list[list[Node]]:
    """Random heads at random named positions."""
    generator = torch.Generator().manual_seed(0)
    heads, names = model.n_layers * model.n_heads, list(prompts.positions)
    circuits: list[list[Node]] = []
    for _ in range(n):
        drawn = torch.randperm(heads * len(names), generator=generator)[:SIZE].tolist()
        places = [(*divmod(index % heads, model.n_heads), names[index // heads]) for index in drawn]
        circuits.append([Node("head", layer, head, name) for layer, head, name in places])
    return circuits


def count(model: Network, prompts: PromptSet, circuits: list[list[Node]]) -> float:
    """Operations of the matrix products that the circuits' logit differences need."""
    operations = Operations(model, prompts)
    total = operations.run(model.n_layers)
    for nodes in circuits:
        touched = torch.stack(
            [position_mask(prompts, node.position) for node in [*nodes, Node("logits", position="end")]]
        )
        rows = int(touched.any(dim=0).sum())
        total += 2 * rows * sum(operations.layer[min(node.layer or 0 for node in nodes) :])
    return total + operations.read_out(len(circuits) * len(prompts))


@torch.no_grad()
def by_hooks(model: Network, prompts: PromptSet, nodes: list[Node], ablation: Ablation) -> Tensor:
    """One circuit's logit difference by one forward pass of the whole model, with hooks."""
    chunk = build_chunk(prompts, torch.arange(len(prompts)), model.device)
    values = ablation.values(model, chunk, model.n_layers)
    with ExitStack() as stack:
        for layer, projection in enumerate(model.parts.projections):
            kept = torch.zeros(*chunk.prompts.clean.shape, model.n_heads, dtype=torch.bool)
            for node in nodes:
                if node.layer == layer:
                    kept[..., node.head] |= position_mask(chunk.prompts, node.position)

            def replace(_: object, args: tuple[Tensor], layer: int = layer, kept: Tensor = kept) -> tuple[Tensor]:
                z = args[0].view(*kept.shape, model.d_head)
                return (torch.where(kept[..., None], z, values[layer]).view(args[0].shape),)

            stack.callback(projection.register_forward_pre_hook(replace).remove)
        logits = model.logits(chunk.prompts.clean, chunk.end)
    rows = torch.arange(len(prompts))
    return logits[rows, chunk.prompts.answer] - logits[rows, chunk.prompts.foil]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--circuits", type=int, default=100)
    parser.add_argument("--peers", type=int, default=4, help="circuits that are judged by hooks")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    reuse_freed_memory()
    model = load(options.model)
    prompts = npl.tasks.ioi.prompts(model, n=options.prompts, seed=0)
    circuits = draw_circuits(model, prompts, options.circuits)
    ablation = build_ablation(model, prompts)
    found = run_knockouts(model, prompts, circuits, ablation, keep=True)
    rates, seconds = [], []
    for _ in range(options.repeats):
        rates.append(matrix_rate(model))
        seconds.append(timed(lambda: run_knockouts(model, prompts, circuits, ablation, keep=True), model))
    rate, own = statistics.median(rates), statistics.median(seconds)
    floor = count(model, prompts, circuits) / rate
    slow: list[Tensor] = []
    peer = timed(
        lambda: slow.extend(by_hooks(model, prompts, each, ablation) for each in circuits[: options.peers]), model
    )
    whole = peer / options.peers * options.circuits
    error = max(float((a - b).abs().max()) for a, b in zip(found, slow, strict=False))
    print(f"{model.name}: {options.circuits} circuits of {SIZE} heads, {len(prompts)} prompts")
    print(f"matrix products {rate / 1e9:.1f} GFLOP/s")
    print(f"measured {own:.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), {own / floor:.2f} × floor {floor:.1f} s")
    print(f"hooks    {whole:.1f} s ({options.peers} timed): {whole / own:.1f} × ours; largest difference {error:.1e}")
    document = {"seconds": own, "over_floor": own / floor, "speedup_over_hooks": whole / own, "max_difference": error}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
