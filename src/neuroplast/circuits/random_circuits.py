"""Circuits drawn at random that are like another one: the control of whatever is said of it."""

from collections import Counter

import numpy as np

from neuroplast.circuits.circuit import Circuit
from neuroplast.components import Node


def matched_random(circuit: Circuit, n: int, seed: int) -> list[tuple[Node, ...]]:
    """Random circuits with as many heads in the same layers and at the same positions, none of them the circuit's.

    Where a layer has too few other heads, the nearest layers give theirs; none are drawn where the model has too few.
    """
    rng = np.random.default_rng(seed)
    own = set(circuit.heads)
    shape = circuit.shape
    if crowded_position(circuit) is not None:
        return []
    drawn: list[tuple[Node, ...]] = []
    for _ in range(n):
        taken: set[Node] = set()
        for node in circuit.heads:
            layer = node.layer or 0
            for distance in range(shape.n_layers):
                near = [at for at in {layer - distance, layer + distance} if 0 <= at < shape.n_layers]
                free = [
                    other
                    for at in sorted(near)
                    for head in range(shape.n_heads)
                    if (other := Node("head", at, head, node.position)) not in own and other not in taken
                ]
                if free:
                    taken.add(free[int(rng.integers(len(free)))])
                    break
        drawn.append(tuple(sorted(taken, key=str)))
    return drawn


def crowded_position(circuit: Circuit) -> str | None:
    """Where no circuit of other heads can be as large as this one: more than half of the heads belong to it."""
    counts = Counter(node.position for node in circuit.heads)
    most = circuit.shape.n_layers * circuit.shape.n_heads // 2
    return next((f"@{name}" if name else "all positions" for name, n in counts.items() if n > most), None)
