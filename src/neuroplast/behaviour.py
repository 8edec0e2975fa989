"""What a model does on a task: logit difference, accuracy, top-1, the probability of the answer; prompt by prompt."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.models.network import Network
from neuroplast.tasks.prompts import PromptSet

BATCH = 64


@dataclass(frozen=True)
class Behaviour:
    """Next-token behaviour at END on the clean prompts; on the CPU."""

    logit_diff: Float[Tensor, "prompt"]
    """logit(answer) - logit(foil); the metric LD."""
    answer_probability: Float[Tensor, "prompt"]
    """P(answer) over the whole vocabulary."""
    answer_top1: Bool[Tensor, "prompt"]
    """Whether the answer is the most likely token of all."""
    foil_top1: Bool[Tensor, "prompt"]
    """Whether the foil is."""


@torch.no_grad()
def measure_behaviour(model: Network, prompts: PromptSet) -> Behaviour:
    """Runs the clean prompts, a batch at a time.

    Args:
        model: the instrumented model.
        prompts: prompts with their answers and foils.
    """
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        logits = model.logits(batch.clean, batch.positions["end"]).float().cpu()
        answer = logits.gather(1, batch.answer[:, None])[:, 0]
        foil = logits.gather(1, batch.foil[:, None])[:, 0]
        top = logits.argmax(dim=1)
        parts.append((answer - foil, (answer - logits.logsumexp(1)).exp(), top == batch.answer, top == batch.foil))
    return Behaviour(*(torch.cat(column) for column in zip(*parts, strict=True)))
