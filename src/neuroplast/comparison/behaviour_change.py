"""What changed in behaviour, and whether it is more than drift.

Drift is the null: twins of the start whose weights went as far as those of the end, tensor by tensor, in random
directions. A change is beyond drift in one direction when its rank among the twins' changes says so,
p = (1 + twins that changed as much) / (1 + twins), at most 0.05, and the paired interval over prompts excludes 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.models.between import Between
from neuroplast.models.network import Network
from neuroplast.statistics import ALPHA, Estimate, bootstrap_weights, estimate, estimate_mean, p_value
from neuroplast.storage import Parts

NO_DRIFT: Float[np.ndarray, "twin"] = np.empty(0)
"""No twins: the change is told without its null."""


@dataclass(frozen=True)
class BehaviourChange:
    """The change of one task's logit difference between two checkpoints."""

    start: Estimate
    """Mean LD of the one."""
    end: Estimate
    """Mean LD of the other."""
    start_accuracy: Estimate
    """Share of prompts with LD above 0 in the one."""
    end_accuracy: Estimate
    """The same in the other."""
    change: Estimate
    """Mean of LD(end) - LD(start), prompts paired."""
    kept: Estimate
    """LD of the other as a share of LD of the one, a ratio of means; undefined where that is not apart from 0."""
    drift: Float[np.ndarray, "twin"]
    """The mean changes of the twins."""

    @property
    def p_fall(self) -> float | None:
        """The chance that drift lets LD fall as far."""
        return self._p(-1)

    @property
    def p_rise(self) -> float | None:
        """The chance that drift lets LD rise as far."""
        return self._p(1)

    def _p(self, sign: int) -> float | None:
        return None if self.change.value is None else p_value(sign * self.change.value, sign * self.drift)

    def is_beyond_drift(self, sign: int) -> bool:
        """Whether LD rose (1) or fell (-1) by more than drift explains."""
        p, ends = self._p(sign), self.change.ci95
        return p is not None and ends is not None and p <= ALPHA and min(sign * end for end in ends) > 0


def behaviour_change(
    start: Float[Tensor, "prompt"], end: Float[Tensor, "prompt"], drift: Float[np.ndarray, "twin"], seed: int = 0
) -> BehaviourChange:
    """The change from LD of the same prompts in both checkpoints, with the twins' mean LD for the null.

    Args:
        start: LD of the one.
        end: LD of the other.
        drift: mean LD of each twin.
        seed: seed of the bootstrap.
    """
    weights = bootstrap_weights(len(start), seed)
    before, after = start.double().numpy(), end.double().numpy()
    of_start = estimate_mean(weights, before)
    kept = Estimate(None, None, "undefined: LD of the first checkpoint is not above 0")
    if of_start.ci95 is not None and of_start.ci95[0] > 0:
        kept = estimate(weights, lambda rows: (rows @ after) / (rows @ before))
    return BehaviourChange(
        kept=kept,
        start=of_start,
        end=estimate_mean(weights, after),
        start_accuracy=estimate_mean(weights, (before > 0).astype(float)),
        end_accuracy=estimate_mean(weights, (after > 0).astype(float)),
        change=estimate_mean(weights, after - before),
        drift=drift - before.mean(),
    )


def run_drift(
    between: Between,
    measures: Mapping[str, Callable[[Network], float]],
    n: int,
    seed: int,
    *,
    parts: Parts,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Float[np.ndarray, "twin"]]:
    """Measures the twins.

    Args:
        between: the two checkpoints.
        measures: what to measure of each, by name.
        n: how many twins.
        seed: seed of the twins.
        parts: keeps each twin that is measured.
        progress: called with (twins done, twins in all).
    """

    def measure(twin: int) -> dict[str, Tensor]:
        between.drift(seed, twin)
        return {name: torch.tensor([each(between.model)], dtype=torch.float64) for name, each in measures.items()}

    found: dict[str, list[float]] = {name: [] for name in measures}
    for twin in range(n):
        for name, value in parts.made(f"drift-{twin:04}", lambda twin=twin: measure(twin)).items():
            found[name].append(float(value[0]))
        if progress is not None:
            progress(twin + 1, n)
    return {name: np.array(values) for name, values in found.items()}
