"""What a model does on a task: logit difference, accuracy, top-1, probabilities; prompt by prompt."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuroplast.models.network import Network
from neuroplast.tasks.metric import log_odds_of_all, logit_of_set
from neuroplast.tasks.prompts import PromptSet

BATCH = 64


@dataclass(frozen=True)
class Behaviour:
    """Next-token behaviour at END on the clean prompts; on the CPU."""

    logit_diff: Float[Tensor, "prompt"]
    """logit(answer) - logit(foil), or the log odds of the sets; the metric LD. The prompt is done where it is > 0."""
    answer_probability: Float[Tensor, "prompt"]
    """P(answer) over the whole vocabulary; of several answers, the sum."""
    answer_top1: Bool[Tensor, "prompt"]
    """Whether the most likely token of all is an answer."""
    foil_top1: Bool[Tensor, "prompt"]
    """Whether it is a foil."""
    prob_diff: Float[Tensor, "prompt"]
    """The probability difference: sum of P over the answers - sum of P over the foils."""


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
        answers, foils = batch.answers, batch.foils
        whole, top = logits.logsumexp(dim=1), logits.argmax(dim=1, keepdim=True)
        p_answer, p_foil = (
            (logit_of_set(logits.gather(1, tokens.clamp(min=0)), tokens) - whole).exp() for tokens in (answers, foils)
        )
        right, wrong = (top == answers).any(dim=1), (top == foils).any(dim=1)
        parts.append((log_odds_of_all(logits, batch), p_answer, right, wrong, p_answer - p_foil))
    return Behaviour(*(torch.cat(column) for column in zip(*parts, strict=True)))
