"""What was spared: other tasks, and text in general (the specificity battery).

Of every task: its logit difference before and after, against drift; the effects of all heads on its logits before and
after. Of text that `start` wrote: how far the expectations of the other checkpoint diverge from its own, against drift,
and the change of perplexity. What became of each is told by how much is left of it (`verdict.status_of`), beyond drift
or not; a task that `start` does not do is `undefined`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from neuroplast.comparison.behaviour_change import BehaviourChange
from neuroplast.comparison.mechanism import Mechanism
from neuroplast.comparison.verdict import Status, status_of
from neuroplast.errors import InputError
from neuroplast.models.network import Network
from neuroplast.statistics import Estimate, p_value
from neuroplast.tasks import TASKS, build_prompt_set
from neuroplast.tasks.prompts import PromptSet


@dataclass(frozen=True)
class TaskChange:
    """What became of a task."""

    behaviour: BehaviourChange
    """Its logit difference."""
    mechanism: Mechanism
    """Its head effects."""

    def status(self, tolerance: float) -> Status:
        """Whether it was spared."""
        return status_of(self.behaviour.kept, tolerance)


@dataclass(frozen=True)
class TextChange:
    """What became of text that `start` wrote."""

    divergence: Estimate
    """KL divergence of the other checkpoint's expectations from those of `start`, in nats a token."""
    drift: Float[np.ndarray, "twin"]
    """The twins' divergence."""
    start_perplexity: Estimate
    """Perplexity of `start` on its own text."""
    end_perplexity: Estimate
    """Perplexity of the other."""
    kept: Estimate
    """Perplexity of `start` ÷ that of the other."""

    @property
    def p(self) -> float | None:
        """The chance that drift diverges as far."""
        return None if self.divergence.value is None else p_value(self.divergence.value, self.drift)

    def status(self, tolerance: float) -> Status:
        """Whether it was spared."""
        return status_of(self.kept, tolerance)


def build_battery(
    model: Network, n_prompts: int, seed: int, besides: str
) -> tuple[Mapping[str, PromptSet], Mapping[str, str]]:
    """Prompts of all tasks but one, and why some have none.

    Args:
        model: whose tokenizer reads them.
        n_prompts: prompts of each.
        seed: their seed.
        besides: the task that is left out.
    """
    found: dict[str, PromptSet] = {}
    missing: dict[str, str] = {}
    for name, task in TASKS.items():
        if name == besides:
            continue
        try:
            records = task.build_records(model.tokenizer, n_prompts, seed, counterfactual=task.counterfactuals[0])
            found[name] = build_prompt_set(model.tokenizer, name, records)
        except InputError as error:  # its words are not in this tokenizer
            missing[name] = str(error)
    return found, missing
