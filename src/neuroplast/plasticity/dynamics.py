"""How a mechanism breaks and heals: numbers of the way that fine-tunings took.

A *way* is a quantity (the strength of the name movers, say) beside the logit difference LD, prompt by prompt, at the
steps of one fine-tuning that were measured.

- **half-way**: the step at which a mean is first half-way from where it began to a goal, between two measured steps by
  a straight line. Breaking ends where poisoning ended, healing would end at base.
- **coupling**: Spearman's correlation, over the measured steps of all ways, of strength with LD. LD is made of what
  heads add, so some coupling is there with any heads: it is to be held against that of matched random sets.
- **hysteresis**: strength on the way back minus strength on the way there, at the same LD: the mean over `LEVELS`
  values of LD that both ways pass. Below 0, the same behaviour comes back with less of the class. Where a way passes
  an LD several times, the mean counts. Where it leaps over more than `WIDEST` of the common range from one measured
  step to the next, nobody knows how strong it was there, and these values are left out.

Intervals are over prompts, all steps being resampled together. Several seeds are put together by
`neuroplast.statistics.over_seeds`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.stats import rankdata

from neuroplast.statistics import Estimate, Weights, estimate, interval, row_correlations

LEVELS = 40
"""Values of the logit difference at which two ways are compared."""
WIDEST = 1 / 3
"""Share of the common range of LD that two measured steps may lie apart for what is between to be read off a line."""
FEWEST_POINTS = 4
"""Measured steps below which no coupling is told."""
BEYOND = 0.025
"""Share of resamples without a value from which on there is no 95 % interval."""

Rows = Float[np.ndarray, "some prompt"]


@dataclass(frozen=True)
class Way:
    """One quantity and the logit difference along one fine-tuning."""

    steps: Int[np.ndarray, "point"]
    """The measured steps, rising."""
    logit_diff: Float[np.ndarray, "point prompt"]
    """LD at each."""
    strength: Float[np.ndarray, "point prompt"]
    """The quantity at each."""


def half_way(
    steps: Int[np.ndarray, "point"],
    followed: Callable[[Rows], Float[np.ndarray, "some point"]],
    goal: Callable[[Rows], Float[np.ndarray, "some"]],
    weights: Weights,
) -> Estimate:
    """The step at which something that is followed is first half-way to a goal.

    Args:
        steps: the measured steps, rising.
        followed: takes weights of prompts, a row each, and gives what is followed at each step.
        goal: the same of where half of the way is counted to.
        weights: from `bootstrap_weights`.

    Returns:
        The step, a fraction between two measured ones; undefined where the way to the goal is within the noise, or
        half of it was not gone.
    """
    low, high = interval(goal(weights) - followed(weights)[:, 0])
    if low <= 0 <= high:
        return Estimate(None, None, "undefined: the way from the first step to the goal is within the noise")

    def crossing(rows: Rows) -> Float[np.ndarray, "some"]:
        series = followed(rows)
        way = goal(rows) - series[:, 0]
        gone = np.divide(series - series[:, :1], way[:, None], out=np.zeros_like(series), where=way[:, None] != 0)
        past = gone >= 0.5
        at = np.where(past.any(axis=1), past.argmax(axis=1), 0)
        row = np.arange(len(rows))
        before = np.maximum(at - 1, 0)
        rise = gone[row, at] - gone[row, before]
        part = np.divide(0.5 - gone[row, before], rise, out=np.zeros_like(rise), where=rise > 0)
        return np.where(at > 0, steps[before] + part * (steps[at] - steps[before]), np.nan)

    return _defined(weights, crossing, "half of the way was not gone by the last step")


def half_way_of_mean(
    steps: Int[np.ndarray, "point"],
    values: Float[np.ndarray, "point prompt"],
    goal: Float[np.ndarray, "prompt"],
    weights: Weights,
) -> Estimate:
    """The step at which the mean over prompts is first half-way from its first value to that of `goal`."""
    return half_way(steps, lambda rows: rows @ values.T, lambda rows: rows @ goal, weights)


def coupling(ways: Sequence[Way], weights: Weights) -> Estimate:
    """Spearman's correlation of strength with the logit difference, over the measured steps of some ways.

    Args:
        ways: the ways; where one begins with the model that another ended with, both rows count.
        weights: from `bootstrap_weights`.
    """
    logit_diff = np.concatenate([way.logit_diff for way in ways])
    if len(logit_diff) < FEWEST_POINTS:
        return Estimate(None, None, f"{len(logit_diff)} measured steps are too few: it takes {FEWEST_POINTS}")
    strength = np.concatenate([way.strength for way in ways])
    return _defined(weights, lambda rows: _spearman(rows @ strength.T, rows @ logit_diff.T), "it does not vary")


def random_couplings(
    logit_diff: Float[np.ndarray, "point prompt"], strengths: Float[np.ndarray, "set point prompt"]
) -> Float[np.ndarray, "set"]:
    """The coupling of each of many sets of heads, on all prompts."""
    means = strengths.mean(axis=2)
    return _spearman(means, np.broadcast_to(logit_diff.mean(axis=1), means.shape))


def hysteresis(there: Way, back: Way, weights: Weights) -> Estimate:
    """Strength on the way back minus strength on the way there, at matched logit difference.

    Args:
        there: the way of breaking.
        back: the way of healing.
        weights: from `bootstrap_weights`.

    Returns:
        In the unit of strength; undefined where the two have no logit difference in common, or leap over it.
    """

    def gap(rows: Rows) -> Float[np.ndarray, "some"]:
        sides = [(rows @ way.logit_diff.T, rows @ way.strength.T) for way in (there, back)]
        low = np.maximum(*(differences.min(axis=1) for differences, _ in sides))
        high = np.minimum(*(differences.max(axis=1) for differences, _ in sides))
        middles = (np.arange(LEVELS) + 0.5) / LEVELS
        levels = low[:, None] + middles * (high - low)[:, None]
        first, second = (_at_levels(*side, levels, WIDEST * (high - low)) for side in sides)
        known = np.isfinite(second - first) & (high > low)[:, None]
        total, count = np.where(known, second - first, 0.0).sum(axis=1), known.sum(axis=1)
        return np.divide(total, count, out=np.full(len(rows), np.nan), where=count > 0)

    return _defined(weights, gap, "the two ways have no logit difference in common, or leap over it between steps")


def _at_levels(
    differences: Float[np.ndarray, "some point"],
    strength: Float[np.ndarray, "some point"],
    levels: Float[np.ndarray, "some level"],
    widest: Float[np.ndarray, "some"],
) -> Float[np.ndarray, "some level"]:
    """The strength at each level: the mean over the pieces of the way that pass it and are not too wide."""
    begins, ends = differences[:, :-1, None], differences[:, 1:, None]
    wanted = levels[:, None]
    low, high = np.minimum(begins, ends), np.maximum(begins, ends)
    passes = (low <= wanted) & (wanted <= high) & (begins != ends) & (high - low <= widest[:, None, None])
    part = np.divide(wanted - begins, ends - begins, out=np.zeros(passes.shape), where=passes)
    there = strength[:, :-1, None] + part * (strength[:, 1:, None] - strength[:, :-1, None])
    count = passes.sum(axis=1)
    return np.divide((there * passes).sum(axis=1), count, out=np.full(levels.shape, np.nan), where=count > 0)


def _spearman(first: Float[np.ndarray, "some point"], second: Float[np.ndarray, "some point"]) -> NDArray[np.float64]:
    return row_correlations(rankdata(first, axis=1), rankdata(second, axis=1))


def _defined(weights: Weights, statistic: Callable[[Rows], NDArray[np.float64]], why: str) -> Estimate:
    """An estimate, where nearly all resamples have a value too; else there is no interval, and so no value."""
    missing = float(np.isnan(statistic(weights)).mean())
    whole = np.full((1, weights.shape[1]), 1 / weights.shape[1])
    if np.isnan(statistic(whole)[0]):
        return Estimate(None, None, f"undefined: {why}")
    if missing >= BEYOND:
        return Estimate(None, None, f"undefined: in {missing:.0%} of resamples of the prompts {why}")
    return estimate(weights, statistic)
