"""The metric: how much more a model is for the answers of a prompt than for its foils.

With one answer and one foil it is the logit difference LD = logit(answer) - logit(foil). With sets of them it is the
log odds, log Σ exp(logit(answers)) - log Σ exp(logit(foils)) = log P(answers) / P(foils): of a set with one token that
is its logit, so there is one definition, and it is called LD everywhere. It is positive where the answers together are
more likely than the foils together, and differentiable.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuroplast.tasks.prompts import NO_TOKEN, PromptSet


def choices(prompts: PromptSet) -> Int[Tensor, "prompt choice"]:
    """Token ids whose logits the metric needs: answers, then foils; any token stands where there is none."""
    return torch.cat([prompts.answers, prompts.foils], dim=1).clamp(min=0)


def logit_of_set(
    logits: Float[Tensor, "prompt *copy choice"], tokens: Int[Tensor, "prompt choice"]
) -> Float[Tensor, "prompt *copy"]:
    """The log of the sum of exp(logit) over each prompt's tokens: of one token, its own logit.

    Args:
        logits: logits of the tokens.
        tokens: which they are, with `NO_TOKEN` where there is none.
    """
    absent = (tokens == NO_TOKEN).view(len(tokens), *[1] * (logits.ndim - 2), tokens.shape[1])
    return logits.masked_fill(absent, -torch.inf).logsumexp(dim=-1)


def log_odds(logits: Float[Tensor, "prompt *copy choice"], prompts: PromptSet) -> Float[Tensor, "prompt *copy"]:
    """LD from the logits of `choices`, in one or several copies of each prompt."""
    answers, foils = prompts.answers, prompts.foils
    of_answers, of_foils = logits.split([answers.shape[1], foils.shape[1]], dim=-1)
    return logit_of_set(of_answers, answers) - logit_of_set(of_foils, foils)


def log_odds_of_all(logits: Float[Tensor, "prompt vocab"], prompts: PromptSet) -> Float[Tensor, "prompt"]:
    """LD from the logits of the whole vocabulary."""
    return log_odds(logits.gather(1, choices(prompts)), prompts)
