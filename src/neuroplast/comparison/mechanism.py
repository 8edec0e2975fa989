"""How the mechanism of a task changed: the effects of all heads on the logits, before and after.

- similarity: the correlation r of mean head effects. Twins that drift (`behaviour_change`) are the null of the distance
  1 - r, on a part of the same prompts.
- gain: how much stronger the mechanism works, the slope through 0 of the effects after on those before; above 1 it is
  amplified, below 0 it works against the task. It does not see what is new, which the similarity does.
- sign flips: heads whose intervals lie on different sides of 0.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from neuroplast.components import Node
from neuroplast.interventions.effects import Effects
from neuroplast.interventions.selection import Group
from neuroplast.plasticity.restoration import Sample, similarity
from neuroplast.statistics import ALPHA, Estimate, Weights, can_tell, estimate, interval, p_value, row_correlations

THRESHOLD = 0.02
"""Least effect of a head of the circuit at END, as a share of LD (Wang et al. 2022)."""


@dataclass(frozen=True)
class Flip:
    """A head that flipped sign."""

    name: str
    """The head."""
    start: Estimate
    """Its effect before, in logits; negative: it helped."""
    end: Estimate
    """Its effect after."""


@dataclass(frozen=True)
class Mechanism:
    """Head effects before and after."""

    start: Sample
    """Before."""
    end: Sample
    """After."""
    similarity: Estimate
    """Correlation of the mean head effects."""
    gain: Estimate
    """Slope of the effects after on those before."""
    flips: tuple[Flip, ...]
    """The heads that flipped sign, the largest move first."""
    distance: float | None = None
    """1 - r on the prompts that the twins are measured on."""
    drift: Float[np.ndarray, "twin"] = field(default_factory=lambda: np.empty(0))
    """The twins' distances."""

    @property
    def p(self) -> float | None:
        """The chance that drift goes as far from the mechanism of `start`."""
        return None if self.distance is None else p_value(self.distance, self.drift)

    @property
    def is_beyond_drift(self) -> bool | None:
        """Whether the distance lies beyond that of the twins; None where that cannot be told."""
        return None if self.p is None or not can_tell(len(self.drift)) else self.p <= ALPHA


def distance_between(start: Effects, end: Effects) -> float:
    """1 - r of the mean head effects; nan where the effects of all heads are the same in either."""
    before, after = (each.effects.double().mean(dim=1).numpy()[None] for each in (start, end))
    return float(1 - row_correlations(before, after)[0])


def build_mechanism(start: Effects, end: Effects, weights: Weights) -> Mechanism:
    """Compares head effects of the same prompts in two checkpoints.

    Args:
        start: `path_patch` of all heads in the one.
        end: the same in the other.
        weights: resamples of the prompts.
    """
    before, after = (Sample(each.clean.double().numpy(), each.effects.double().numpy()) for each in (start, end))

    def gain(rows: Float[np.ndarray, "some prompt"]) -> Float[np.ndarray, "some"]:
        old, new = rows @ before.effects.T, rows @ after.effects.T
        size = (old**2).sum(axis=1)
        return np.divide((old * new).sum(axis=1), size, out=np.full_like(size, np.nan), where=size > 0)

    return Mechanism(
        before,
        after,
        similarity(after, before, weights),
        estimate(weights, gain),
        _flips(start.names, before, after, weights),
    )


def _flips(names: tuple[str, ...], before: Sample, after: Sample, weights: Weights) -> tuple[Flip, ...]:
    sides: list[list[Estimate]] = []
    for sample in (before, after):
        low, high = interval(weights @ sample.effects.T)
        sides.append(
            [
                Estimate(float(mean), (float(a), float(b)))
                for mean, a, b in zip(sample.effects.mean(axis=1), low, high, strict=True)
            ]
        )
    flips = [Flip(*each) for each in zip(names, *sides, strict=True) if _side(each[1]) * _side(each[2]) < 0]
    return tuple(sorted(flips, key=lambda flip: -abs((flip.end.value or 0) - (flip.start.value or 0))))


def _side(effect: Estimate) -> int:
    low, high = effect.ci95 or (0.0, 0.0)
    return int(low > 0) - int(high < 0)


def direct_circuit(effects: Effects, weights: Weights) -> Group:
    """The heads at END that act on the logits: `THRESHOLD` of LD or more, and apart from 0. Empty where LD is not."""
    differences = effects.clean.double().numpy()
    if interval(weights @ differences)[0] <= 0:
        return ()
    values = effects.effects.double().numpy()
    low, high = interval(weights @ values.T)
    passes = (np.abs(values.mean(axis=1)) >= THRESHOLD * differences.mean()) & ((low > 0) | (high < 0))
    nodes = [group[0] for group in effects.senders]
    return tuple(Node("head", nodes[row].layer, nodes[row].head, "end") for row in np.flatnonzero(passes))
