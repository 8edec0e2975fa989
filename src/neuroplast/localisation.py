"""Is something localised? Concentration over parts, and a circuit's share against matched random sets.

- Gini coefficient and effective number (the participation ratio (Σ|x|)² / Σx²) of the sizes of all parts.
- A circuit's share is held against sets drawn at random that have as many heads in the same layers and at the same
  positions. The circuit's own heads may be drawn too, so under the null its share is one draw among the others. (The
  control of a judged circuit, `circuits.random_circuits`, has none of its heads; a p-value of that would not be exact.)
- Localised is what lies mostly in the circuit, and more than in random sets.
- The effect size is how many standard deviations of the draws the circuit lies above their mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, prod

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from neuroplast.components import Node
from neuroplast.statistics import ALPHA, Estimate, can_tell, is_above, p_value

MOST = 0.5
"""The share of a change above which a circuit has most of it."""
FEWEST_SETS = 40
"""Possible random sets below which nothing can be told from chance."""


@dataclass(frozen=True)
class MatchedTest:
    """A circuit's share against matched random sets; empty, with a reason, where it cannot be told."""

    n: int
    """Random sets."""
    share: float | None = None
    """The circuit's share on the prompts that the random sets are measured on."""
    mean: float | None = None
    """Their mean share."""
    sd: float | None = None
    """The standard deviation of their shares."""
    p: float | None = None
    """The chance that a random set has as large a share."""
    effect_size: float | None = None
    """(share - mean) / sd; None where all random sets have one share."""
    why: str | None = None
    """Why there is no p."""

    @property
    def beaten(self) -> bool | None:
        """Whether the circuit's share is beyond chance."""
        return None if self.p is None or not can_tell(self.n) else self.p <= ALPHA


def gini(values: ArrayLike) -> float | None:
    """The Gini coefficient of the sizes of values: 0 where all are equal, near 1 where one has everything."""
    sizes = np.sort(np.abs(np.asarray(values, dtype=float)))
    if not len(sizes) or not sizes.sum():
        return None
    ranks = np.arange(1, len(sizes) + 1)
    return float(2 * (ranks * sizes).sum() / (len(sizes) * sizes.sum()) - (len(sizes) + 1) / len(sizes))


def effective_number(values: ArrayLike) -> float | None:
    """How many equal parts would be as concentrated: (Σ|x|)² / Σx²."""
    sizes = np.abs(np.asarray(values, dtype=float))
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if sizes.any() else None


def draw_matched(circuit: Sequence[Node], n_heads: int, n: int, seed: int) -> list[tuple[Node, ...]]:
    """Sets of heads with as many in the same layers at the same positions; the circuit's own may be among them.

    Args:
        circuit: heads, at positions or without.
        n_heads: heads a layer.
        n: how many sets; none are drawn where fewer than `FEWEST_SETS` are possible.
        seed: seed of the draws.
    """
    places: dict[tuple[int, str | None], int] = {}
    for node in circuit:
        key = (node.layer or 0, node.position)
        places[key] = places.get(key, 0) + 1
    if not places or prod(comb(n_heads, count) for count in places.values()) < FEWEST_SETS:
        return []
    rng = np.random.default_rng(seed)
    return [
        tuple(
            Node("head", layer, int(head), position)
            for (layer, position), count in places.items()
            for head in rng.choice(n_heads, size=count, replace=False)
        )
        for _ in range(n)
    ]


def matched_test(share: float, random: Float[np.ndarray, "draw"]) -> MatchedTest:
    """Holds a share against those of random sets.

    Args:
        share: the circuit's.
        random: those of `draw_matched`; empty where none could be drawn.
    """
    if not len(random):
        return MatchedTest(0, why="no random sets were drawn, or the circuit's layers leave too few others")
    mean, sd = float(random.mean()), float(random.std())
    why = (
        None if can_tell(len(random)) else f"{len(random)} random sets are too few to tell it from chance: it takes 19"
    )
    return MatchedTest(len(random), share, mean, sd, p_value(share, random), (share - mean) / sd if sd else None, why)


def is_localised(share: Estimate, test: MatchedTest) -> bool | None:
    """Whether a circuit has most of a change, and more than matched random sets; None where that cannot be told.

    Args:
        share: the circuit's share.
        test: the same share against random sets.
    """
    if share.ci95 is None or test.beaten is None:
        return None
    return is_above(share.ci95, MOST) if test.beaten else False


def area_under(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The mean height of a curve that begins at (0, 0), by the trapezoid rule; 1 where it is 1 from the first part on.

    Args:
        sizes: numbers of parts, rising.
        values: the curve there.
    """
    x, y = np.array([0, *sizes], dtype=float), np.array([0.0, *values])
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / x[-1])
