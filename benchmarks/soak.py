"""Many interventions one after another in one process: the memory stays flat, and nothing is left on the model.

    python benchmarks/soak.py --model tiny --interventions 200 --prompts 8

The kinds of intervention take turns. After each, what was freed is given back to the system and the process's memory is
read. The first quarter is left out: libraries load on first use, and allocators find their size. Flat means that the
line through the others rises by less than `SLOPE` KiB an intervention, and that after the last turn as many tensors are
alive as after the second. The last line is JSON; the exit code is 1 where memory is not flat, or where a hook, an
exchanged function or a gradient is left on a model, or other logits than before.
"""

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import neuroplast as npl
from neuroplast.components import Node
from neuroplast.interventions.edge_knockout import run_edge_circuits
from neuroplast.interventions.edges import build_edge_graph
from neuroplast.interventions.knockout import build_knockout, run_knockouts
from neuroplast.memory import used_memory
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

SLOPE = 16.0
"""KiB an intervention: a recording of one prompt that is kept takes more, of `tiny` too."""


def changed(model: Network) -> Network:
    """The same model with a little noise on all weights."""
    module, generator = copy.deepcopy(model.module), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.01 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator))
    return build_network(module, model.tokenizer, "changed")


def kinds_of(model: Network, other: Network, prompts: PromptSet) -> dict[str, Callable[[], object]]:
    """The interventions that take turns, by name; each is of a few parts, so that a turn is short."""
    last = model.n_layers - 1
    heads = [Node("head", last, head, "end") for head in range(2)]
    graph = build_edge_graph(model)
    without = graph.exists.clone()
    without[0] = False

    def knock_out() -> object:
        knockout = build_knockout(model, prompts, f"a{last}.h0@end, a{last}.h1@end")
        return run_knockouts(model, prompts, [heads, heads[:1]], knockout.ablation)

    return {
        "paths": lambda: npl.path_patch(model, prompts, senders=f"a{last}.h0, m0"),
        "paths to heads": lambda: npl.path_patch(model, prompts, senders="a0.h0", receivers=f"a{last}.h1<q>@end"),
        "activations": lambda: npl.activation_patch(model, prompts, sites=f"a{last}.h0@end, a1.h1<q>, r1, m0"),
        "knockout": knock_out,
        "EAP": lambda: npl.attribute_edges(model, prompts, method="eap"),
        "edges": lambda: npl.patch_edges(model, prompts, senders="a0.h0, m0", receivers="logits"),
        "edge circuit": lambda: run_edge_circuits(model, prompts, [without]),
        "ledger": lambda: npl.build_ledger(model, other, prompts, tolerance=0.9),
        "across models": lambda: npl.cross_patch(model, other, prompts, sites=f"a{last}.h0@end, m0"),
        "traces": lambda: npl.causal_trace(model, prompts, kinds="residual", n_noise=1, sigma=0.1),
    }


def state_of(model: Network) -> list[Any]:
    """What an intervention could leave behind on a model."""
    left: list[Any] = [model.module.training, *(parameter.grad is None for parameter in model.module.parameters())]
    for part in model.module.modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        left += [*map(len, hooks), "forward" in vars(part)]
    return left


def n_tensors() -> int:
    """Tensors that are alive."""
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def soak(name: str, interventions: int, n_prompts: int) -> dict[str, Any]:
    """Runs them, and tells how the memory went."""
    model = npl.load_model(name)
    other = changed(model)
    prompts = npl.tasks.load_task("ioi").prompts(model, n_prompts, 0)
    end = prompts.positions["end"]
    before = [state_of(each) for each in (model, other)]
    logits = [each.logits(prompts.clean, end) for each in (model, other)]
    kinds = kinds_of(model, other, prompts)
    memory, tensors, seconds = [], [], dict.fromkeys(kinds, 0.0)
    for number in range(interventions):
        kind = list(kinds)[number % len(kinds)]
        begun = time.perf_counter()
        kinds[kind]()
        seconds[kind] += time.perf_counter() - begun
        memory.append(used_memory(torch.device("cpu")) / 1024)
        if number % len(kinds) == len(kinds) - 1:
            tensors.append(n_tensors())
            print(f"{number + 1:5} interventions  {memory[-1] / 1024:8.1f} MiB  {tensors[-1]} tensors", flush=True)
    settled = memory[len(memory) // 4 :]
    slope = float(np.polyfit(range(len(settled)), settled, 1)[0])
    same = all(
        torch.equal(was, each.logits(prompts.clean, end)) for was, each in zip(logits, (model, other), strict=True)
    )
    clean = same and before == [state_of(each) for each in (model, other)]
    return {
        "model": name,
        "interventions": interventions,
        "kinds": len(kinds),
        "first_mib": round(settled[0] / 1024, 1),
        "last_mib": round(settled[-1] / 1024, 1),
        "slope_kib": round(slope, 2),
        "tensors": [tensors[min(1, len(tensors) - 1)], tensors[-1]],
        "nothing_left": clean,
        "flat": slope < SLOPE and tensors[-1] <= tensors[min(1, len(tensors) - 1)],
        "seconds": {kind: round(each, 1) for kind, each in seconds.items()},
    }


def main() -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(description="Many interventions in one process.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--interventions", type=int, default=200, help="at least 20: two turns of all kinds")
    parser.add_argument("--prompts", type=int, default=8)
    asked = parser.parse_args()
    if asked.interventions < 20:
        parser.error("--interventions must be at least 20")
    found = soak(asked.model, asked.interventions, asked.prompts)
    print(json.dumps(found))
    sys.exit(0 if found["flat"] and found["nothing_left"] else 1)


if __name__ == "__main__":
    main()
