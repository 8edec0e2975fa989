"""Where a change between two checkpoints is expressed: which activations carry it.

- Every head at END and every MLP is patched from one checkpoint into the other, both ways (`cross_patch`).
- A circuit's share of the change is what patching all its heads together from `start` into `end` undoes,
  (LD(end) - LD(end, patched)) / (LD(end) - LD(start)), a ratio of means. Random sets of heads that match it are patched
  alike: they are its null. Heads after the damage look damaged too, so a share does not say where it is stored.
- The curve of what the first k heads undo: by rank of what each undoes alone; greedily, among the first `GREEDY_FROM`,
  taking the head that undoes most beside those that are taken; and in random orders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.components import Node
from neuroplast.interventions.cross_model import cross_patch
from neuroplast.interventions.selection import Group
from neuroplast.localisation import MatchedTest, area_under, draw_matched, effective_number, gini, matched_test
from neuroplast.models.network import Network
from neuroplast.observer import Told, about
from neuroplast.statistics import Estimate, Weights, estimate, interval
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

CURVE_SIZES = (1, 2, 3, 5, 8, 12, 16, 24, 32)
"""Numbers of heads on the curves."""
GREEDY_FROM, GREEDY_STEPS = 16, 8
RANDOM_ORDERS = 10
WITHIN_NOISE = "undefined: the logit difference did not change beyond the noise of the prompts"


@dataclass(frozen=True)
class Curve:
    """What patching more and more parts undoes of the change."""

    order: str
    """`rank`, `greedy` or `random`."""
    names: tuple[str, ...]
    """The parts in their order; empty for random ones."""
    sizes: tuple[int, ...]
    """How many are patched together."""
    shares: tuple[Estimate, ...]
    """What they undo; of random orders, the mean over orders."""

    @property
    def area(self) -> float | None:
        """The mean height of the curve from 0 parts to its last, so of curves of one length; None where undefined."""
        values = [each.value for each in self.shares]
        known = [value for value in values if value is not None]
        return area_under(self.sizes, known) if len(known) == len(values) else None


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


def share_of_change(
    effects: Float[np.ndarray, "prompt"], change: Float[np.ndarray, "prompt"], weights: Weights
) -> Estimate:
    """The mean effect as a share of the mean change; undefined where the interval of the change includes 0."""
    low, high = interval(weights @ change)
    if low <= 0 <= high:
        return Estimate(None, None, WITHIN_NOISE)
    return estimate(weights, lambda rows: (rows @ effects) / (rows @ change))


def measure_expressed(
    start: Network,
    end: Network,
    prompts: PromptSet,
    circuit: Group,
    weights: Weights,
    *,
    n_random: int,
    seed: int,
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Told | None = None,
) -> Expressed:
    """Patches between two checkpoints, and holds a circuit against matched random sets.

    Args:
        start: the one checkpoint.
        end: the other.
        prompts: clean prompts.
        circuit: heads, at positions or without; may be empty.
        weights: resamples of the prompts.
        n_random: how many matched random sets.
        seed: seed of the random sets and orders.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted measurement goes on.
        progress: called with (activity, done, total).
    """
    kept = parts or Parts()

    def patch(name: str, into: Network, donor: Network, sites: Sequence[Group] | str) -> dict[str, Tensor]:
        def make() -> dict[str, Tensor]:
            found = cross_patch(into, donor, prompts, sites=sites, memory=memory, progress=about(progress, name))
            return {"effects": found.effects, "receiver": found.receiver, "donor": found.donor}

        return kept.made(name, make)

    heads, mlps = _every_part(start)
    every: list[Group] = [(node,) for node in (*heads, *mlps)]
    undo = partial(patch, into=end, donor=start)
    alone = undo("patching start into end", sites=every)
    brings = patch("patching end into start", start, end, every)["effects"]
    change = (alone["donor"] - alone["receiver"]).double().numpy()
    ranked = [heads[row] for row in _ranked(alone["effects"][: len(heads)], change)]

    random = draw_matched(circuit, start.n_heads, n_random, seed)
    whole = [circuit, *random] if circuit else []
    joint = undo("matched random sets", sites=whole)["effects"] if whole else torch.zeros(0, len(prompts))
    brought = patch("circuit into start", start, end, [circuit])["effects"][0] if circuit else None
    orders = _random_orders(heads, seed)
    sizes = [size for size in CURVE_SIZES if size <= len(heads)]
    groups = [tuple(order[:size]) for order in (ranked, *orders) for size in sizes]
    curves = undo("curves", sites=[*groups, heads])["effects"]
    taken, greedy = _greedy(undo, ranked, change)

    def share(effects: Tensor) -> Estimate:
        return share_of_change(effects.double().numpy(), change, weights)

    by_order = curves[:-1].view(1 + len(orders), len(sizes), -1)
    undone = share(joint[0]) if circuit else Estimate(None, None, "no circuit to look at")
    test = MatchedTest(0, why=undone.why)
    if undone.value is not None:
        test = matched_test(undone.value, (joint[1:].double().mean(dim=1) / change.mean()).numpy())
    return Expressed(
        (*heads, *mlps),
        alone["effects"],
        brings,
        undone,
        Estimate(None, None, undone.why) if brought is None else share(-brought),
        test,
        share(curves[-1]),
        (
            _curve("rank", ranked, sizes, [share(each) for each in by_order[0]]),
            _curve("greedy", taken, range(1, len(taken) + 1), [share(each) for each in greedy]),
            _curve("random", (), sizes, [share(each) for each in by_order[1:].mean(dim=0)]),
        ),
    )


def undo_alone(
    name: str,
    start: Network,
    end: Network,
    prompts: PromptSet,
    kept: Parts,
    memory: str | int | None = None,
    progress: Told | None = None,
) -> Float[Tensor, "head prompt"]:
    """What every head at END undoes alone, from `start` in `end`.

    Args:
        name: what it is kept under, and told of.
        start: the one checkpoint.
        end: the other.
        prompts: clean prompts.
        kept: keeps it.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        progress: called with (activity, done, total).
    """

    def make() -> dict[str, Tensor]:
        found = cross_patch(end, start, prompts, sites="heads@end", memory=memory, progress=about(progress, name))
        return {"effects": found.effects}

    return kept.made(name, make)["effects"]


def _every_part(model: Network) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """All heads at END, and all MLPs where any were found."""
    layers = range(model.n_layers)
    heads = tuple(Node("head", layer, head, "end") for layer in layers for head in range(model.n_heads))
    return heads, tuple(Node("mlp", layer) for layer in layers) if model.parts.mlps else ()


def _ranked(effects: Float[Tensor, "head prompt"], change: Float[np.ndarray, "prompt"]) -> list[int]:
    """Rows by what each undoes of the change, most first."""
    undone = effects.double().mean(dim=1) * float(np.sign(change.mean()))
    return undone.argsort(descending=True, stable=True).tolist()


def _random_orders(heads: Sequence[Node], seed: int) -> list[list[Node]]:
    rng = np.random.default_rng(seed)
    return [[heads[row] for row in rng.permutation(len(heads))] for _ in range(RANDOM_ORDERS)]


def _greedy(
    undo: "partial[dict[str, Tensor]]", ranked: Sequence[Node], change: Float[np.ndarray, "prompt"]
) -> tuple[list[Node], list[Tensor]]:
    """The heads that are taken in turn, and what all that are taken undo."""
    left, taken, found = list(ranked[:GREEDY_FROM]), list[Node](), list[Tensor]()
    while left and len(taken) < GREEDY_STEPS:
        effects = undo(f"greedy curve {len(taken) + 1}", sites=[(*taken, node) for node in left])["effects"]
        best = _ranked(effects, change)[0]
        taken.append(left.pop(best))
        found.append(effects[best])
    return taken, found


def _curve(order: str, nodes: Sequence[Node], sizes: Sequence[int], shares: Sequence[Estimate]) -> Curve:
    names = tuple(str(node) for node in nodes[: max(sizes, default=0)])
    return Curve(order, names, tuple(sizes), tuple(shares))


def summarise(expressed: Expressed, weights: Weights) -> Mapping[str, tuple[Estimate, Estimate]]:
    """By part, what it undoes and what it brings, in logits."""
    rows = zip(expressed.parts, expressed.undoes.double().numpy(), expressed.brings.double().numpy(), strict=True)
    return {
        str(node): (estimate(weights, lambda w, u=undoes: w @ u), estimate(weights, lambda w, b=brings: w @ b))
        for node, undoes, brings in rows
    }
