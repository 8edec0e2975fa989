"""How far a mended model is back: the rows of restoration, and one number that a target can be set for.

With the base at hand the number is the smaller of *kept*, what the model has of base's own logit difference, as an
audit tells it (`comparison.behaviour_change`), and *damage undone*, the share of the distance to base's head effects
that was closed (`plasticity.restoration`). A model that answers by another mechanism is not mended, nor is one with
the right mechanism and no answers. *Behaviour*, the share of the lost logit difference that came back, is told beside
them and does not decide: of a loss of several times what base has, nine tenths are not enough. Where damage undone is
undefined, because the damage did not touch the mechanism beyond the noise of the prompts, the other alone counts.
Without the base nobody knows what was lost, and the number is the share of held-out prompts that the model does right.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.evaluate import estimate_document
from neuroplast.comparison.behaviour_change import NO_DRIFT, behaviour_change
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.network import Network
from neuroplast.plasticity.restoration import Sample, restoration
from neuroplast.statistics import Estimate, Weights, bootstrap_weights, estimate_mean, interval
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

NO_BASE = "unknown without the base"
NOT_LOOKED_FOR = "no circuit is looked for: see `neuroplast discover` with this folder"
NOT_TRIED = "base's circuit was not tried"


@dataclass(frozen=True)
class Restored:
    """How far a model is back."""

    logit_diff: Estimate
    """Mean LD."""
    accuracy: Estimate
    """Share of prompts with LD above 0."""
    kept: Estimate
    """LD as a share of base's."""
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
        return min((each.value for each in (self.kept, self.damage_undone) if each.value is not None), default=None)


Source = Callable[[], Network]
"""Gives a model; asked only where it was not measured before."""


class Judge:
    """Judges models on the same prompts."""

    def __init__(
        self,
        base: Network | None,
        poisoned: Source,
        prompts: PromptSet,
        seed: int,
        parts: Parts,
        *,
        of_base: Parts | None = None,
        memory: str | int | None = None,
    ) -> None:
        """Measures the two ends.

        Args:
            base: the model before the damage; None where nobody has it.
            poisoned: gives the damaged model.
            prompts: held-out prompts with their counterfactuals.
            seed: seed of the bootstrap.
            parts: keeps what is measured.
            of_base: keeps what is measured of the base, where several judges share it.
            memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        """
        self.prompts, self.parts, self.memory = prompts, parts, memory
        self.weights: Weights = bootstrap_weights(len(prompts), seed)
        self._seed, self._has_base = seed, base is not None
        self._base = None if base is None else self._sample("base", lambda: base, of_base or parts)
        self._poisoned = self._sample("poisoned", poisoned, parts)

    def _sample(self, name: str, source: Source, parts: Parts) -> Sample:
        """What is measured of a model, kept under a name."""

        def measure() -> dict[str, Tensor]:
            model = source()
            if not self._has_base:
                return {"logit_diff": measure_behaviour(model, self.prompts).logit_diff}
            found = path_patch(model, self.prompts, memory=self.memory)
            return {"logit_diff": found.clean, "effects": found.effects}

        saved = parts.made(name, measure)
        effects = saved.get("effects", torch.zeros(0, len(self.prompts)))
        return Sample(saved["logit_diff"].double().numpy(), effects.double().numpy())

    def judge(self, name: str, source: Source) -> Restored:
        """How far a model is back; what is measured of it is kept under a name."""
        return self._judge(self._sample(name, source, self.parts))

    @property
    def base(self) -> Restored:
        """The base itself.

        Raises:
            ValueError: nobody has it.
        """
        if self._base is None:
            raise ValueError(NO_BASE)
        return self._judge(self._base)

    @property
    def damage(self) -> Restored:
        """The damaged model itself."""
        return self._judge(self._poisoned)

    @property
    def is_better(self) -> bool:
        """Whether the damaged model does the task better than the base: then they have changed places."""
        if self._base is None:
            return False
        return float(interval(self.weights @ (self._poisoned.logit_diff - self._base.logit_diff))[0]) > 0

    def _judge(self, found: Sample) -> Restored:
        logit_diff = estimate_mean(self.weights, found.logit_diff)
        accuracy = estimate_mean(self.weights, (found.logit_diff > 0).astype(float))
        if self._base is None:
            unknown = Estimate(None, None, NO_BASE)
            return Restored(logit_diff, accuracy, unknown, unknown, unknown, unknown)
        rows = restoration(self._base, self._poisoned, found, self.weights, self._seed)
        before, after = (torch.from_numpy(each.logit_diff) for each in (self._base, found))
        kept = behaviour_change(before, after, NO_DRIFT, self._seed).kept
        return Restored(logit_diff, accuracy, kept, rows.behaviour, rows.mechanism, rows.damage_undone)


def restored_document(found: Restored, function: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The rows of restoration, as in a study's summary, beside the behaviour.

    Args:
        found: how far the model is back.
        function: of the base's circuit in the model, from `inside_document`; None where it was not tried.
    """
    names = ("kept", "behaviour", "mechanism", "damage_undone")
    rows: dict[str, Estimate] = {name: getattr(found, name) for name in names}
    why = {name: row.why for name, row in rows.items() if row.why}
    share = function["faithfulness"] if function else {"value": None, "ci95": None, "why": NOT_TRIED}
    return {
        "score": found.score,
        **{name: row.value for name, row in rows.items()},
        "structure": None,
        "function": share["value"],
        "logit_diff": estimate_document(found.logit_diff),
        "accuracy": estimate_document(found.accuracy),
        **({"function_random": function["random"]} if function else {}),
        "ci95": {name: row.ci95 for name, row in rows.items()} | {"function": share["ci95"]},
        "why": why | {"structure": NOT_LOOKED_FOR} | ({} if "why" not in share else {"function": share["why"]}),
    }
