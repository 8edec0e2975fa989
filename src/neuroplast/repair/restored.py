"""How far a mended model is back: the rows of restoration, and one number that a target can be set for.

With the base at hand the number is the smaller of *behaviour*, the share of the lost logit difference that came back,
and *damage undone*, the share of the distance to base's head effects that was closed (`plasticity.restoration`). A
model that answers by another mechanism is not mended, nor is one with the right mechanism and no answers. Without the
base nobody knows what was lost, and the number is the share of held-out prompts that the model does right.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuroplast.behaviour import measure_behaviour
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.plasticity.restoration import Sample, restoration
from neuroplast.statistics import RESAMPLES, Estimate, Weights, bootstrap_weights, estimate_mean
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

NO_BASE = "unknown without the base"


@dataclass(frozen=True)
class Restored:
    """How far a model is back."""

    logit_diff: Estimate
    """Mean LD."""
    accuracy: Estimate
    """Share of prompts with LD above 0."""
    behaviour: Estimate
    """Share of the lost LD that came back."""
    mechanism: Estimate
    """Correlation of head effects with base's."""
    damage_undone: Estimate
    """Share of the distance to base's head effects that was closed."""

    @property
    def score(self) -> float | None:
        """What the target is set for; None where it is undefined."""
        if self.mechanism.why == NO_BASE:
            return self.accuracy.value
        if self.behaviour.value is None or self.damage_undone.value is None:
            return None
        return min(self.behaviour.value, self.damage_undone.value)


@dataclass
class Judge:
    """Judges models on the same prompts."""

    base: Network | None
    """The model before the damage; None where nobody has it."""
    poisoned: Network
    """The damaged model."""
    prompts: PromptSet
    """Held-out prompts with their counterfactuals."""
    seed: int
    """Seed of the bootstrap."""
    parts: Parts
    """Keeps what is measured."""
    memory: str | int | None = None
    """Bound on the process's memory."""
    weights: Weights = field(init=False)
    """Resamples of the prompts."""

    def __post_init__(self) -> None:
        self.weights = bootstrap_weights(len(self.prompts), self.seed, RESAMPLES)
        self._poisoned = self.sample("poisoned", self.poisoned)
        self._base = None if self.base is None else self.sample("base", self.base)

    def sample(self, name: str, model: Network) -> Sample:
        """What is measured of a model, kept under a name."""

        def measure() -> dict[str, Tensor]:
            if self.base is None:
                return {"logit_diff": measure_behaviour(model, self.prompts).logit_diff}
            found = path_patch(model, self.prompts, memory=self.memory)
            return {"logit_diff": found.clean, "effects": found.effects}

        saved = self.parts.made(name, measure)
        effects = saved.get("effects", torch.zeros(0, len(self.prompts)))
        return Sample(saved["logit_diff"].double().numpy(), effects.double().numpy())

    def judge(self, name: str, model: Network) -> Restored:
        """How far a model is back; what is measured of it is kept under a name."""
        return self._judge(self.sample(name, model))

    @property
    def damage(self) -> Restored:
        """The damaged model itself."""
        return self._judge(self._poisoned)

    @property
    def undamaged(self) -> Restored | None:
        """The base, which is restored by definition; None where nobody has it."""
        return None if self._base is None else self._judge(self._base)

    def _judge(self, found: Sample) -> Restored:
        logit_diff = estimate_mean(self.weights, found.logit_diff)
        accuracy = estimate_mean(self.weights, (found.logit_diff > 0).astype(float))
        if self._base is None:
            unknown = Estimate(None, None, NO_BASE)
            return Restored(logit_diff, accuracy, unknown, unknown, unknown)
        rows = restoration(self._base, self._poisoned, found, self.weights, self.seed)
        return Restored(logit_diff, accuracy, rows.behaviour, rows.mechanism, rows.damage_undone)
