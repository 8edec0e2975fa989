"""Where a change between two checkpoints is stored: which weights make it.

The ledger splits the change of LD over all weights; its parts here are heads (query, key, value and output map
together), MLPs, norms, the embedding and the unembedding. A share is what a part adds, as a share of the change, a
ratio of means; shares add up to 1 but for the quadrature's error. Beside them stand

- the share of the squared weight change that lies in a group, which is what a ledger that does not look at the
  direction of the change would say;
- matched random sets of heads, whose shares are the null of the circuit's;
- grafts: what putting the weights of `start` into `end` really undoes, part after part in the order of the ledger.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.comparison.ends import Curve, Ends, random_orders
from neuroplast.components import HEAD_KINDS, Component, Kind, Node
from neuroplast.interventions.chunks import Progress
from neuroplast.interventions.grafting import graft
from neuroplast.interventions.ledger import Ledger, build_ledger
from neuroplast.interventions.selection import Group
from neuroplast.localisation import MatchedTest, draw_matched, effective_number, gini, matched_test
from neuroplast.models.network import Network
from neuroplast.models.weights import WeightMap
from neuroplast.statistics import Estimate

GROUPS: Mapping[str, tuple[Kind, ...]] = {
    "heads": HEAD_KINDS,
    "mlps": ("mlp",),
    "norms": ("norm",),
    "biases": ("bias",),
    "embedding": ("embedding",),
    "unembedding": ("unembedding",),
    **{f"heads<{kind}>": (kind,) for kind in HEAD_KINDS},
}
CURVE_SIZES = (1, 2, 4, 8, 16, 32, 64)
RANDOM_GRAFTS = 2


@dataclass(frozen=True)
class Split:
    """A ledger, with a head's maps taken together."""

    ledger: Ledger
    """The whole change, split."""
    members: Mapping[str, tuple[int, ...]]
    """Heads, MLPs, layers' norms and biases, embedding, norm and unembedding; the ledger's rows of each."""

    @property
    def by_part(self) -> Float[Tensor, "part prompt"]:
        """What each part adds to LD, from start to end."""
        return torch.stack([self.ledger.shares[list(rows)].sum(dim=0) for rows in self.members.values()])

    def ranked_parts(self, known: Container[Component]) -> dict[str, tuple[Component, ...]]:
        """The parts that have weights, what adds most to the change first, with their components.

        Args:
            known: the components that have weights of their own.
        """
        toward = self.by_part.mean(dim=1) * self.ledger.change.mean().sign()
        found: dict[str, tuple[Component, ...]] = {}
        for name, _ in sorted(zip(self.members, toward.tolist(), strict=True), key=lambda each: -each[1]):
            mine = tuple(each for row in self.members[name] if (each := self.ledger.components[row]) in known)
            found |= {name: mine} if mine else {}
        return found

    @property
    def gini(self) -> float | None:
        """Concentration over parts."""
        return gini(self.by_part.mean(dim=1).numpy())

    @property
    def effective_number(self) -> float | None:
        """How many equal parts would be as concentrated."""
        return effective_number(self.by_part.mean(dim=1).numpy())

    @property
    def of_sizes(self) -> dict[str, float | None]:
        """By group of parts, its share of the summed sizes of what all parts add: what cancels counts, too."""
        sizes = self.by_part.mean(dim=1).abs()
        kinds = [self.ledger.components[rows[0]].kind for rows in self.members.values()]
        whole = float(sizes.sum())
        found: dict[str, float | None] = {}
        for name, group in GROUPS.items():
            if "<" not in name:
                chosen = torch.tensor([kind in group for kind in kinds])
                found[name] = float(sizes[chosen].sum()) / whole if whole else None
        return found


@dataclass(frozen=True)
class Stored:
    """Where the change lies in the weights."""

    split: Split
    """The whole change, split."""
    shares: Mapping[str, Estimate]
    """By part, its share of the change."""
    groups: Mapping[str, Estimate]
    """By group of `GROUPS`, its share of the change."""
    of_squares: Mapping[str, float]
    """By group, its share of the squared change of all weights."""
    circuit: Estimate
    """The share of the circuit's heads."""
    test: MatchedTest
    """The same, against matched random sets."""
    grafts: Mapping[str, Estimate]
    """What grafts of whole groups undo: the circuit's heads, all heads, all MLPs."""
    curves: tuple[Curve, ...]
    """What grafts undo, in the ledger's order and in random ones."""


def measure_stored(ends: Ends, circuit: Group, *, n_random: int, seed: int) -> Stored:
    """Splits the change over the weights, and grafts them.

    Args:
        ends: the two checkpoints.
        circuit: heads; their positions do not matter here.
        n_random: how many matched random sets.
        seed: seed of the random sets and orders.
    """
    split = split_change(ends, "ledger")
    ledger, change = split.ledger, split.ledger.change

    def share(effects: Tensor) -> Estimate:
        return ends.share(effects, change)

    heads = sorted({Node("head", node.layer, node.head) for node in circuit}, key=lambda node: node.depth)
    of_circuit = share(_of_heads(ledger, heads)) if heads else Estimate(None, None, "no circuit to look at")
    test = MatchedTest(0, why=of_circuit.why)
    if of_circuit.value is not None:
        random = draw_matched(heads, ends.start.n_heads, n_random, seed)
        shares = [float(_of_heads(ledger, each).double().mean() / change.double().mean()) for each in random]
        test = matched_test(of_circuit.value, np.array(shares))
    grafts, curves = _grafts(ends, split, heads, seed)
    return Stored(
        split,
        {name: share(each) for name, each in zip(split.members, split.by_part, strict=True)},
        {name: share(ledger.shares[ledger.rows(*kinds)].sum(dim=0)) for name, kinds in GROUPS.items()},
        _of_squares(ends.start, ends.end),
        of_circuit,
        test,
        grafts,
        curves,
    )


def split_change(ends: Ends, name: str) -> Split:
    """Splits the change over parts; kept under a name."""

    def measure(progress: Progress | None) -> dict[str, Tensor]:
        found = build_ledger(ends.start, ends.end, ends.prompts, memory=ends.memory, progress=progress)
        points = torch.tensor([found.points])
        return {"shares": found.shares, "start": found.start, "end": found.end, "points": points}

    saved = ends.made(name, measure)
    components = WeightMap(ends.start).components
    ledger = Ledger(components, saved["shares"], saved["start"], saved["end"], int(saved["points"][0]))
    members: dict[str, list[int]] = {}
    for row, component in enumerate(components):
        members.setdefault(component.part, []).append(row)
    return Split(ledger, {part: tuple(rows) for part, rows in members.items()})


def _of_heads(ledger: Ledger, heads: Sequence[Node]) -> Float[Tensor, "prompt"]:
    grid = ledger.by_head()
    return grid[[node.layer or 0 for node in heads], [node.head or 0 for node in heads]].sum(dim=0)


def _of_squares(start: Network, end: Network) -> dict[str, float]:
    """By group, its share of the squared change; what several parts share counts in each, and once in the whole."""
    theirs = dict(end.module.named_parameters())
    changes = {name: (theirs[name] - weight).detach().double() for name, weight in start.module.named_parameters()}
    whole = sum(float(change.square().sum()) for change in changes.values())
    pieces = WeightMap(start).pieces()
    found: dict[str, float] = {}
    for name, kinds in GROUPS.items():
        seen: dict[str, Tensor] = {}
        for component, mine in pieces.items():
            for piece in mine if component.kind in kinds else ():
                seen.setdefault(piece.name, torch.zeros_like(changes[piece.name], dtype=torch.bool))[piece.index] = True
        found[name] = sum(float(changes[name][mask].square().sum()) for name, mask in seen.items()) / whole
    return found


def _grafts(
    ends: Ends, split: Split, heads: Sequence[Node], seed: int
) -> tuple[dict[str, Estimate], tuple[Curve, ...]]:
    """What weights of `start` undo in `end`."""
    owned = split.ranked_parts(WeightMap(ends.start).pieces())
    ranked, names = list(owned), [name for name in split.members if name in owned]
    orders = [ranked, *([names[at] for at in order] for order in random_orders(len(names), RANDOM_GRAFTS, seed))]
    sizes = tuple(size for size in CURVE_SIZES if size < len(owned))
    wanted = {
        "circuit": [str(node) for node in heads],
        "heads": [name for name, mine in owned.items() if mine[0].head is not None],
        "mlps": [name for name, mine in owned.items() if mine[0].kind == "mlp"],
    }
    wanted = {name: mine for name, mine in wanted.items() if mine}
    sets = [*wanted.values(), *(order[:size] for order in orders for size in sizes)]

    def measure(progress: Progress | None) -> dict[str, Tensor]:
        grafts = [[each for name in mine for each in owned[name]] for mine in sets]
        found = graft(ends.end, ends.start, ends.prompts, grafts, memory=ends.memory, progress=progress)
        return {"effects": found.effects}

    def share(effects: Tensor) -> Estimate:
        return ends.share(-effects, split.ledger.change)

    effects = ends.made("grafting", measure)["effects"]
    by_order = effects[len(wanted) :].view(len(orders), len(sizes), -1)
    return {name: share(each) for name, each in zip(wanted, effects, strict=False)}, (
        Curve("rank", tuple(ranked[: sizes[-1]]), sizes, tuple(map(share, by_order[0]))),
        Curve("random", (), sizes, tuple(map(share, by_order[1:].mean(dim=0)))),
    )
