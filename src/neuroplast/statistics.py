"""Intervals. The unit that is resampled is the prompt: percentile bootstrap, Efron & Tibshirani 1993, chapter 13.

Resampling weights are drawn once per number of prompts and seed, so quantities measured on the same prompts (a
stage and its base) are resampled together and their difference keeps its pairing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import stdtrit

RESAMPLES = 2000
LEVEL = 0.95
ALPHA = 0.05
"""A p up to this is beyond chance."""
MOST_SEED = 2**32 - 1
"""The largest seed: some generators take no larger ones."""
FEWEST_SEEDS = 3
"""Seeds from which on they, and not prompts, are the unit of an interval."""
NORMAL_95 = 1.959964
"""Standard errors from a mean to either end of its 95 % interval, where the mean is normal."""

Weights = Float[np.ndarray, "resample prompt"]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, or the reason why there is none."""

    value: float | None
    """The value on all prompts."""
    ci95: tuple[float, float] | None = None
    """Bootstrap interval over prompts."""
    why: str | None = None
    """Why the value is None."""


def bootstrap_weights(n_prompts: int, seed: int, resamples: int = RESAMPLES) -> Weights:
    """Weights of prompts in each resample; a row sums to 1.

    Args:
        n_prompts: how many prompts were measured.
        seed: seed of the draw.
        resamples: how many resamples.
    """
    counts = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=resamples)
    return counts / n_prompts


def interval(samples: Float[np.ndarray, "resample *rest"]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 2.5 % and 97.5 % points over resamples, elementwise; resamples without a value (NaN) are left out."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(samples, [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def estimate(
    weights: Weights, statistic: Callable[[Float[np.ndarray, "some prompt"]], NDArray[np.float64]]
) -> Estimate:
    """A statistic of the prompts with its interval.

    Args:
        weights: from `bootstrap_weights`.
        statistic: takes weights of shape (some, prompt), each row summing to 1, and gives one value a row.
    """
    n_prompts = weights.shape[1]
    value = float(statistic(np.full((1, n_prompts), 1 / n_prompts))[0])
    samples = statistic(weights)
    if not np.isfinite(value) or not np.isfinite(samples).any():
        return Estimate(None, None, "not a number on these prompts")
    low, high = interval(samples)
    return Estimate(value, (float(low), float(high)))


def estimate_mean(weights: Weights, values: Float[np.ndarray, "prompt"]) -> Estimate:
    """The mean over prompts with its interval."""
    return estimate(weights, lambda rows: rows @ values)


def estimate_known_mean(weights: Weights, values: Float[np.ndarray, "prompt"]) -> Estimate:
    """The mean over the prompts that have a value, with its interval; those without one are NaN."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)

    def mean(rows: Float[np.ndarray, "some prompt"]) -> NDArray[np.float64]:
        there = rows @ known
        return np.divide(rows @ filled, there, out=np.full(len(rows), np.nan), where=there > 0)

    return estimate(weights, mean)


def is_above(ci95: Sequence[float], bound: float) -> bool | None:
    """Whether a value lies above a bound, by its interval; None where the bound lies in it."""
    low, high = ci95
    return True if low > bound else False if high <= bound else None


def over_seeds(values: Sequence[float | None]) -> Estimate:
    """The mean over seeds with its interval by Student's t: what another seed would give, not another prompt.

    Args:
        values: one value a seed; None where it is undefined.
    """
    known = np.array([value for value in values if value is not None])
    if len(known) < FEWEST_SEEDS:
        return Estimate(None, None, f"{len(known)} seeds have a value: it takes {FEWEST_SEEDS} to be the unit")
    wide = float(stdtrit(len(known) - 1, 1 - (1 - LEVEL) / 2) * known.std(ddof=1) / len(known) ** 0.5)
    mean = float(known.mean())
    return Estimate(mean, (mean - wide, mean + wide))


def p_value(value: float, null: Float[np.ndarray, "draw"]) -> float | None:
    """The chance that the null gives as much: (1 + draws that do) / (1 + draws).

    Exact where, under the null, the value is one draw more (Phipson and Smyth 2010, arXiv 1603.05766). A draw without
    a value counts as one that does.

    Returns:
        None where nothing was drawn, or the value is none.
    """
    if not len(null) or not np.isfinite(value):
        return None
    # A draw that is the value itself counts, whatever rounding does.
    return (1 + int((~(null < value - 1e-9 * abs(value))).sum())) / (1 + len(null))


def can_tell(n: int) -> bool:
    """Whether a null of that many draws can have anything beyond chance: it takes 19."""
    return 1 / (1 + n) <= ALPHA


def row_correlations(
    first: Float[np.ndarray, "some node"], second: Float[np.ndarray, "some node"]
) -> Float[np.ndarray, "some"]:
    """Pearson correlation of corresponding rows; NaN where a row is constant."""
    a = first - first.mean(axis=1, keepdims=True)
    b = second - second.mean(axis=1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    products = (a * b).sum(axis=1)
    return np.divide(products, scale, out=np.full_like(products, np.nan), where=scale > 0)
