"""Where a change between two checkpoints is expressed: which activations carry it.

- Every head at END and every MLP is patched from one checkpoint into the other, both ways (`cross_patch`).
- A circuit's share of the change is what patching all its heads together from `start` into `end` undoes,
  (LD(end) - LD(end, patched)) / (LD(end) - LD(start)), a ratio of means. Random sets of heads that match it are patched
  alike, on some of the prompts, and held against the circuit there: they are its null. Heads after the damage look
  damaged too, so a share does not say where it is stored.
- The curve of what the first k heads undo: by rank of what each undoes alone; greedily, among the first `GREEDY_FROM`,
  taking the head that undoes most beside those that are taken; and in random orders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from torch import Tensor

from neuroplast.comparison.ends import Curve, Ends, random_orders
from neuroplast.components import Node
from neuroplast.interventions.chunks import Progress
from neuroplast.interventions.cross_model import cross_patch
from neuroplast.interventions.selection import Group
from neuroplast.localisation import MatchedTest, draw_matched, effective_number, gini, matched_test
from neuroplast.models.network import Network
from neuroplast.statistics import Estimate, Weights, estimate

CURVE_SIZES = (1, 2, 3, 5, 8, 12, 16, 24, 32)
"""Numbers of heads on the curves."""
GREEDY_FROM, GREEDY_STEPS = 16, 8
RANDOM_ORDERS = 10
RANDOM_PROMPTS = 16
"""Prompts, of those of the comparison, on which random sets are held against the circuit."""


@dataclass(frozen=True)
class Expressed:
    """Where the change shows in activations."""

    parts: tuple[Node, ...]
    """Every head at END, then every MLP at all positions."""
    undoes: Float[Tensor, "part prompt"]
    """LD(end, patched) - LD(end) when the part comes from `start`."""
    brings: Float[Tensor, "part prompt"]
    """LD(start, patched) - LD(start) when the part comes from `end`."""
    undone: Estimate
    """The share of the change that the circuit's heads undo together, from `start` in `end`."""
    brought: Estimate
    """The share that they bring about together, from `end` in `start`."""
    test: MatchedTest
    """What is undone, against matched random sets."""
    all_heads: Estimate
    """The share that all heads at END undo together."""
    curves: tuple[Curve, ...]
    """By rank, greedily, and in random orders."""

    @property
    def heads(self) -> list[int]:
        """The rows of heads."""
        return [row for row, node in enumerate(self.parts) if node.kind == "head"]

    @property
    def gini(self) -> float | None:
        """Concentration of what heads undo alone."""
        return gini(self.undoes[self.heads].mean(dim=1).numpy())

    @property
    def effective_number(self) -> float | None:
        """How many equal heads would be as concentrated."""
        return effective_number(self.undoes[self.heads].mean(dim=1).numpy())


def measure_expressed(ends: Ends, circuit: Group, *, n_random: int, seed: int) -> Expressed:
    """Patches between two checkpoints, and holds a circuit against matched random sets.

    Args:
        ends: the two.
        circuit: heads, at positions or without; may be empty.
        n_random: how many matched random sets.
        seed: seed of the random sets and orders.
    """
    heads, mlps = _every_part(ends.start)
    every = [(node,) for node in (*heads, *mlps)]
    alone = _patch(ends, "patching start into end", every)
    brings = _patch(ends, "patching end into start", every, bring=True)["effects"]
    change = alone["donor"] - alone["receiver"]
    ranked = [heads[row] for row in _ranked(alone["effects"][: len(heads)], change)]

    def share(effects: Tensor) -> Estimate:
        return ends.share(effects, change)

    undone = brought = Estimate(None, None, "no circuit to look at")
    test = MatchedTest(0, why=undone.why)
    if circuit:
        undone = share(_patch(ends, "circuit into end", [circuit])["effects"][0])
        brought = share(-_patch(ends, "circuit into start", [circuit], bring=True)["effects"][0])
        test = MatchedTest(0, why=undone.why)
        if undone.value is not None:
            sets = [circuit, *draw_matched(circuit, ends.start.n_heads, n_random, seed)]
            some = replace(ends, prompts=ends.prompts[:: max(1, len(ends.prompts) // RANDOM_PROMPTS)])
            joint = _patch(some, "matched random sets", sets)
            whole = (joint["donor"] - joint["receiver"]).double().mean()
            of_circuit, *of_random = (joint["effects"].double().mean(dim=1) / whole).tolist()
            test = matched_test(of_circuit, np.array(of_random))

    sizes = tuple(size for size in CURVE_SIZES if size <= len(heads))
    orders = [ranked, *([heads[row] for row in order] for order in random_orders(len(heads), RANDOM_ORDERS, seed))]
    groups = [tuple(order[:size]) for order in orders for size in sizes]
    curves = _patch(ends, "curves", [*groups, heads])["effects"]
    by_order = curves[:-1].view(len(orders), len(sizes), -1)
    taken, greedy = _greedy(ends, ranked, change)
    return Expressed(
        (*heads, *mlps),
        alone["effects"],
        brings,
        undone,
        brought,
        test,
        share(curves[-1]),
        (
            Curve("rank", tuple(map(str, ranked[: sizes[-1]])), sizes, tuple(map(share, by_order[0]))),
            Curve("greedy", tuple(map(str, taken)), tuple(range(1, len(taken) + 1)), tuple(map(share, greedy))),
            Curve("random", (), sizes, tuple(map(share, by_order[1:].mean(dim=0)))),
        ),
    )


def undo_alone(ends: Ends, name: str) -> Float[Tensor, "head prompt"]:
    """What every head at END undoes alone, from `start` in `end`; kept under a name."""
    heads, _ = _every_part(ends.start)
    return _patch(ends, name, [(node,) for node in heads])["effects"]


def _patch(ends: Ends, name: str, sites: Sequence[Group], *, bring: bool = False) -> dict[str, Tensor]:
    """Patches `start` into `end`, which undoes the change, or brings it about the other way round."""
    receiver, donor = (ends.start, ends.end) if bring else (ends.end, ends.start)

    def measure(progress: Progress | None) -> dict[str, Tensor]:
        found = cross_patch(receiver, donor, ends.prompts, sites=sites, memory=ends.memory, progress=progress)
        return {"effects": found.effects, "receiver": found.receiver, "donor": found.donor}

    return ends.made(name, measure)


def _every_part(model: Network) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """All heads at END, and all MLPs where any were found."""
    layers = range(model.n_layers)
    heads = tuple(Node("head", layer, head, "end") for layer in layers for head in range(model.n_heads))
    return heads, tuple(Node("mlp", layer) for layer in layers) if model.parts.mlps else ()


def _ranked(effects: Float[Tensor, "head prompt"], change: Float[Tensor, "prompt"]) -> list[int]:
    """Rows by what each undoes of the change, most first."""
    undone = effects.double().mean(dim=1) * change.double().mean().sign()
    return undone.argsort(descending=True, stable=True).tolist()


def _greedy(ends: Ends, ranked: Sequence[Node], change: Float[Tensor, "prompt"]) -> tuple[list[Node], list[Tensor]]:
    """The heads that are taken in turn, and what all that are taken undo."""
    left, taken, found = list(ranked[:GREEDY_FROM]), list[Node](), list[Tensor]()
    while left and len(taken) < GREEDY_STEPS:
        effects = _patch(ends, f"greedy curve {len(taken) + 1}", [(*taken, node) for node in left])["effects"]
        best = _ranked(effects, change)[0]
        taken.append(left.pop(best))
        found.append(effects[best])
    return taken, found


def summarise(expressed: Expressed, weights: Weights) -> Mapping[str, tuple[Estimate, Estimate]]:
    """By part, what it undoes and what it brings, in logits."""
    rows = zip(expressed.parts, expressed.undoes.double().numpy(), expressed.brings.double().numpy(), strict=True)
    return {
        str(node): (estimate(weights, lambda w, u=undoes: w @ u), estimate(weights, lambda w, b=brings: w @ b))
        for node, undoes, brings in rows
    }
