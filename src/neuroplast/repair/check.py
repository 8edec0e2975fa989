"""Did mending do new damage? What is left of other tasks and of text, of what the damaged model had left.

As in an audit (`comparison.spared`), without twins that drift: a task is told by how much of its logit difference is
left, text by the perplexity of what the first model wrote. New damage is what the mended model lost against the damaged
one, unless that only takes it back to what base has.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.evaluate import estimate_document
from neuroplast.comparison.behaviour_change import NO_DRIFT, behaviour_change
from neuroplast.comparison.comparison import TEXT
from neuroplast.comparison.spared import build_battery
from neuroplast.comparison.text import log_likelihood, sample_text
from neuroplast.comparison.verdict import status_of
from neuroplast.errors import InputError
from neuroplast.models.network import Network
from neuroplast.statistics import Estimate, bootstrap_weights, estimate

POISONED, MENDED, AGAINST = "poisoned", "mended", "against_poisoned"


def check_battery(
    base: Network | None,
    poisoned: Network,
    mended: Network,
    *,
    n_prompts: int,
    seed: int,
    besides: str,
) -> dict[str, dict[str, Any]]:
    """What is left of each other task, and of text.

    Args:
        base: the model before the damage; None where nobody has it.
        poisoned: the damaged model.
        mended: the mended one.
        n_prompts: prompts of each task.
        seed: seed of both.
        besides: the task that is left out.

    Returns:
        By task, `status` and `kept` of `against_poisoned` and, with the base, of `poisoned` and `mended` against it; or
        `why` where it cannot be told.
    """
    tasks, missing = build_battery(poisoned, n_prompts, seed, besides)
    found: dict[str, dict[str, Any]] = {name: {"why": why} for name, why in missing.items()}
    for name, prompts in tasks.items():
        before, after = (measure_behaviour(model, prompts).logit_diff for model in (poisoned, mended))
        found[name] = {AGAINST: _told(behaviour_change(before, after, NO_DRIFT, seed).kept)}
        if base is not None:
            own = measure_behaviour(base, prompts).logit_diff
            for which, theirs in ((POISONED, before), (MENDED, after)):
                found[name][which] = _told(behaviour_change(own, theirs, NO_DRIFT, seed).kept)
    return found | {TEXT: _check_text(base, poisoned, mended, seed)}


def new_damage(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tasks of which mending itself lost more than the tolerance."""
    as_base = ("spared", "improved")
    return sorted(
        name
        for name, each in found.items()
        if AGAINST in each
        and each[AGAINST]["status"] == "damaged"
        and each.get(MENDED, {}).get("status") not in as_base
    )


def _check_text(base: Network | None, poisoned: Network, mended: Network, seed: int) -> dict[str, Any]:
    try:
        text = sample_text(base or poisoned, seed=seed)
    except InputError as error:  # the tokenizer has nothing to begin with
        return {"why": str(error)}
    weights = bootstrap_weights(len(text.tokens), seed)

    def kept(first: Float[np.ndarray, "sample"], second: Float[np.ndarray, "sample"]) -> dict[str, Any]:
        return _told(estimate(weights, lambda rows: np.exp(rows @ (second - first))))

    before, after = (log_likelihood(model, text.tokens).double().numpy() for model in (poisoned, mended))
    found = {AGAINST: kept(before, after)}
    if base is not None:
        own = log_likelihood(base, text.tokens).double().numpy()
        found |= {POISONED: kept(own, before), MENDED: kept(own, after)}
    return found


def _told(kept: Estimate) -> dict[str, Any]:
    return {"status": status_of(kept), "kept": estimate_document(kept)}
