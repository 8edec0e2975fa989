"""Did mending do new damage? What is left of other tasks and of text, beside what the damaged model had left.

As in an audit (`comparison.spared`), without twins that drift: a task is told by how much of its logit difference is
left, text by the perplexity of what the first model wrote itself.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.evaluate import estimate_document
from neuroplast.comparison.behaviour_change import behaviour_change
from neuroplast.comparison.comparison import TEXT
from neuroplast.comparison.spared import build_battery
from neuroplast.comparison.text import LENGTH, log_likelihood, sample_text
from neuroplast.comparison.verdict import status_of
from neuroplast.models.network import Network
from neuroplast.statistics import Estimate, bootstrap_weights, estimate

NO_DRIFT = np.empty(0)


def check_battery(
    before: Network, models: Mapping[str, Network], *, n_prompts: int, n_samples: int, seed: int, besides: str
) -> dict[str, dict[str, Any]]:
    """What is left of each other task, and of text, in some models.

    Args:
        before: the model whose tasks and text they are.
        models: by name, the models that are looked at.
        n_prompts: prompts of each task.
        n_samples: samples of text.
        seed: seed of both.
        besides: the task that is left out.

    Returns:
        By task, by model, `status` and `kept`; or `why` where the task has no prompts for this tokenizer.
    """
    tasks, missing = build_battery(before, n_prompts, seed, besides)
    found: dict[str, dict[str, Any]] = {name: {"why": why} for name, why in missing.items()}
    for name, prompts in tasks.items():
        own = measure_behaviour(before, prompts).logit_diff
        found[name] = {
            which: _told(behaviour_change(own, measure_behaviour(model, prompts).logit_diff, NO_DRIFT, seed).kept)
            for which, model in models.items()
        }
    if n_samples:
        text = sample_text(before, n_samples, LENGTH, seed)
        weights = bootstrap_weights(len(text.tokens), seed)
        own_text = log_likelihood(before, text.tokens).double().numpy()
        for which, model in models.items():
            theirs = log_likelihood(model, text.tokens).double().numpy()
            kept = estimate(weights, lambda rows, more=theirs - own_text: np.exp(rows @ more))
            found.setdefault(TEXT, {})[which] = _told(kept)
    return found


def new_damage(found: Mapping[str, Mapping[str, Any]], before: str, after: str) -> list[str]:
    """The tasks that are damaged after mending and were not before."""
    return sorted(
        name
        for name, each in found.items()
        if after in each and each[after]["status"] == "damaged" and each.get(before, {}).get("status") != "damaged"
    )


def _told(kept: Estimate) -> dict[str, Any]:
    return {"status": status_of(kept), "kept": estimate_document(kept)}
