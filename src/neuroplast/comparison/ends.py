"""The two ends of a change, and what is measured between them on the same prompts."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor

from neuroplast.interventions.chunks import Progress
from neuroplast.localisation import area_under
from neuroplast.models.network import Network
from neuroplast.observer import Told, about
from neuroplast.statistics import Estimate, Weights, estimate, interval
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

WITHIN_NOISE = "undefined: the logit difference did not change beyond the noise of the prompts"


@dataclass(frozen=True)
class Ends:
    """Two checkpoints of one model, the prompts that both run, and how what is measured is kept and told."""

    start: Network
    """The one, such as the base."""
    end: Network
    """The other."""
    prompts: PromptSet
    """Clean prompts with their counterfactuals."""
    weights: Weights
    """Resamples of the prompts."""
    memory: str | int | None = None
    """Bound on the process's memory, such as `4GiB`; None takes what is free."""
    parts: Parts = field(default_factory=Parts)
    """Keeps what is measured, so that an interrupted comparison goes on."""
    progress: Told | None = None
    """Called with (activity, done, total)."""

    def made(self, name: str, measure: Callable[[Progress | None], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `measure` gives, unless it is kept already; it is told whom to tell how it goes."""
        return self.parts.made(name, lambda: measure(about(self.progress, name)))

    def share(self, effects: Float[Tensor, "prompt"], change: Float[Tensor, "prompt"]) -> Estimate:
        """The mean effect as a share of the mean change; undefined where the interval of the change includes 0."""
        part, whole = effects.double().numpy(), change.double().numpy()
        low, high = interval(self.weights @ whole)
        if low <= 0 <= high:
            return Estimate(None, None, WITHIN_NOISE)
        return estimate(self.weights, lambda rows: (rows @ part) / (rows @ whole))


@dataclass(frozen=True)
class Curve:
    """What taking back more and more parts undoes of a change."""

    order: str
    """`rank`, `greedy` or `random`."""
    names: tuple[str, ...]
    """The parts in their order; empty for random ones."""
    sizes: tuple[int, ...]
    """How many are taken back together."""
    shares: tuple[Estimate, ...]
    """What they undo; of random orders, the mean over orders."""

    @property
    def area(self) -> float | None:
        """The mean height of the curve from 0 parts to its last, so of curves of one length; None where undefined."""
        values = [each.value for each in self.shares]
        known = [value for value in values if value is not None]
        return area_under(self.sizes, known) if known and len(known) == len(values) else None


def random_orders(n_parts: int, n: int, seed: int) -> list[list[int]]:
    """Orders of parts, drawn at random."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(n_parts).tolist() for _ in range(n)]
