"""What single heads do at a stage, for people to look at: where they attend, what they copy, whole patterns.

The heads of base's circuit are looked at in every stage, so that one can be followed; beside them those of the stage's
own circuit, and those with the largest direct effects. `heads.json` has the means over all prompts of the study, with
their intervals; `patterns.safetensors` the attention on the first few prompts, from every token to every token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuroplast.circuits.attention import attention_patterns
from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.copying import copy_shares
from neuroplast.circuits.evaluate import estimate_document
from neuroplast.circuits.head_measures import COPY, FIRST_TOKEN, NEGATIVE_COPY, measure_on_task
from neuroplast.components import Node
from neuroplast.models.network import Network
from neuroplast.report.looks import HEADS, PATTERNS
from neuroplast.statistics import Weights, estimate_known_mean
from neuroplast.storage import write_json, write_tensors
from neuroplast.tasks.prompts import PromptSet

MOST_HEADS = 64
"""Heads of a circuit that are looked at, the strongest first."""
MOST_DIRECT = 10
"""Heads with the largest direct effects that are looked at beside them."""
ATTENTION = "attention to "


def choose_heads(circuits: Sequence[Circuit | None], effects: np.ndarray) -> tuple[Node, ...]:
    """The heads to look at, each where it stands, in the order of the forward pass.

    Args:
        circuits: base's and the stage's own, where there are any.
        effects: direct effect of every head, (layer, head, prompt).
    """
    chosen: dict[Node, None] = {}
    for circuit in filter(None, circuits):
        strongest = sorted(circuit.heads, key=lambda node: (-abs(circuit.nodes[node] or 0.0), str(node)))
        chosen |= dict.fromkeys(strongest[:MOST_HEADS])
    order = np.argsort(-np.abs(effects.mean(axis=2)), axis=None, kind="stable")[:MOST_DIRECT]
    places = (divmod(int(index), effects.shape[1]) for index in order)
    chosen |= {Node("head", layer, head, "end"): None for layer, head in places}
    return tuple(sorted(chosen, key=lambda node: (node.layer or 0, node.head or 0, str(node))))


def run_look(
    model: Network, prompts: PromptSet, heads: Sequence[Node], n_shown: int, weights: Weights, folder: Path
) -> None:
    """Looks at heads and writes `PATTERNS`, then `HEADS`.

    Args:
        model: the stage's model.
        prompts: those of the study.
        heads: from `choose_heads`.
        n_shown: prompts, from the first on, whose attention is kept.
        weights: from `bootstrap_weights`.
        folder: the stage's.
    """
    on_task = measure_on_task(model, prompts, heads).shares
    copied = copy_shares(model, prompts, heads).numpy()
    shown = prompts.pick(torch.arange(min(n_shown, len(prompts))))
    parts = tuple(dict.fromkeys(node.at(None) for node in heads))
    patterns = attention_patterns(model, shown, parts)
    write_tensors(folder / PATTERNS, {str(part): each.half() for part, each in zip(parts, patterns, strict=True)}, {})
    document = {
        "n_prompts": len(prompts),
        "tokens": [_tokens(model, shown, row) for row in range(len(shown))],
        "positions": {name: places.tolist() for name, places in shown.positions.items()},
        "heads": {
            str(node): _head_document(on_task[node], copied[:, number], weights) for number, node in enumerate(heads)
        },
    }
    write_json(folder / HEADS, document)


def _head_document(shares: Mapping[str, np.ndarray], copied: np.ndarray, weights: Weights) -> dict[str, Any]:
    attention = {name: each for name, each in shares.items() if name.startswith(ATTENTION) and name != FIRST_TOKEN}
    return {
        "attention": {
            name.removeprefix(ATTENTION): estimate_document(estimate_known_mean(weights, each))
            for name, each in attention.items()
        },
        **{
            name.replace(" ", "_"): estimate_document(estimate_known_mean(weights, each))
            for name, each in zip((COPY, NEGATIVE_COPY), copied, strict=True)
        },
    }


def _tokens(model: Network, prompts: PromptSet, row: int) -> list[str]:
    """The tokens of a prompt as text, one by one."""
    ids = prompts.clean[row, : int(prompts.positions["end"][row]) + 1].tolist()
    return [model.tokenizer.decode([token]) for token in ids]
