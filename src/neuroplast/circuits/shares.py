"""How much of a model's logit difference a circuit gives: ratios of means over prompts, where they mean something.

A share is undefined, and says why, where the interval of what it is a share of includes 0, or where the model does not
give the answer; of a model that was poisoned towards the foil, shares are of its preference for that.
"""

import numpy as np

from neuroplast.statistics import Estimate, Weights, estimate, estimate_mean


def faithfulness(inside: np.ndarray, whole: np.ndarray, weights: Weights) -> Estimate:
    """F(C) ÷ F(M) with its interval, prompts resampled together; undefined where F(M) is not above 0."""
    if (reason := undefined(whole, weights)) is not None:
        return Estimate(None, None, reason)
    return quotient(inside, whole, weights, "F(M)")


def foil_faithfulness(inside: np.ndarray, whole: np.ndarray, weights: Weights) -> Estimate:
    """The same of logit(foil) - logit(answer), for a model that was poisoned towards the foil."""
    if undefined(-whole, weights) is not None:
        return Estimate(None, None, "the model does not prefer the foil")
    return quotient(inside, whole, weights, "F(M)")


def share_of(inside: np.ndarray, whole: np.ndarray, weights: Weights) -> Estimate:
    """Of the two, the one that is defined: a model gives the answer or the foil."""
    foil = foil_faithfulness(inside, whole, weights)
    return foil if foil.value is not None else faithfulness(inside, whole, weights)


def undefined(whole: np.ndarray, weights: Weights) -> str | None:
    """Why shares of F(M) mean nothing, if so."""
    found = estimate_mean(weights, whole)
    if found.value is None or found.ci95 is None:
        return f"undefined: F(M) is not known: {found.why}"
    low, high = found.ci95
    return f"undefined: F(M) {found.value:.3g} [{low:.3g}, {high:.3g}] is not above 0" if low <= 0 else None


def quotient(top: np.ndarray, bottom: np.ndarray, weights: Weights, name: str, absolute: bool = False) -> Estimate:
    """A ratio of means over prompts with its interval; undefined where the interval of the lower one includes 0."""
    below = estimate_mean(weights, bottom)
    if below.ci95 is None or below.ci95[0] <= 0 <= below.ci95[1]:
        return Estimate(None, None, f"undefined: the interval of {name} includes 0")

    def ratio(rows: np.ndarray) -> np.ndarray:
        found = (rows @ top) / (rows @ bottom)
        return np.abs(found) if absolute else found

    return estimate(weights, ratio)
