"""Recovery measured without a trick denominator (method.md section 6).

For base B, poisoned P and recovered R, with LD the logit difference and e(.) the vector of mean head effects:

- behaviour      (LD(R) - LD(P)) / (LD(B) - LD(P)): 0 is no recovery, 1 is the base's own level
- mechanism      the correlation of e(R) with e(B); scale-free, so dividing e by |LD| would not change it
- damage undone  1 - d(R, B) / d(P, B), with d = 1 - correlation

A ratio is undefined, and said to be, while the poison's damage lies within the noise: for behaviour, when the
interval of LD(B) - LD(P) includes 0; for damage undone, when d(P, B) is no more than swapping B and P gives on prompts
drawn at random, which is what the prompts' noise alone would do if the two had one mechanism (a paired permutation).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from neuroplast.statistics import Estimate, Weights, estimate, interval, row_correlations


@dataclass(frozen=True)
class Sample:
    """One stage's measurements on the shared prompts."""

    logit_diff: Float[np.ndarray, "prompt"]
    """Logit difference, prompt by prompt."""
    effects: Float[np.ndarray, "node prompt"]
    """Effect of every head on the logit difference, prompt by prompt."""


@dataclass(frozen=True)
class Restoration:
    """The rows of restoration that need no circuit."""

    behaviour: Estimate
    """Share of the lost logit difference that came back."""
    mechanism: Estimate
    """Correlation of head effects with the base's."""
    damage_undone: Estimate
    """Share of the distance to the base that was closed."""


def similarity(sample: Sample, base: Sample, weights: Weights) -> Estimate:
    """Correlation of a stage's mean head effects with the base's, prompts resampled together."""
    return estimate(weights, lambda rows: _correlation(sample, base, rows))


def restoration(base: Sample, poisoned: Sample, recovered: Sample, weights: Weights, seed: int) -> Restoration:
    """Measures how far a stage came back from the poison; give the control as `recovered` for the control's rows.

    Args:
        base: the model before anything was done to it.
        poisoned: the damaged model.
        recovered: the model to be judged.
        weights: from `bootstrap_weights`, for the shared prompts.
        seed: seed of the null's swaps.
    """

    def regained(rows: Float[np.ndarray, "some prompt"]) -> Float[np.ndarray, "some"]:
        lost = rows @ (base.logit_diff - poisoned.logit_diff)
        return _ratio(rows @ (recovered.logit_diff - poisoned.logit_diff), lost)

    def undone(rows: Float[np.ndarray, "some prompt"]) -> Float[np.ndarray, "some"]:
        return 1 - _ratio(1 - _correlation(recovered, base, rows), 1 - _correlation(poisoned, base, rows))

    low, high = interval(weights @ (base.logit_diff - poisoned.logit_diff))
    behaviour = estimate(weights, regained)
    if low <= 0 <= high:
        behaviour = Estimate(None, None, "undefined: the poison changed the logit difference within the noise")
    damage_undone = estimate(weights, undone)
    if why := within_noise(base, poisoned, len(weights), seed):
        damage_undone = Estimate(None, None, why)
    return Restoration(behaviour, similarity(recovered, base, weights), damage_undone)


def within_noise(base: Sample, poisoned: Sample, resamples: int, seed: int) -> str | None:
    """Why the poison's damage to the mechanism cannot be told from the noise of the prompts; None where it can."""
    means = (each.effects.mean(axis=1)[None] for each in (base, poisoned))
    damage, floor = float(1 - row_correlations(*means)[0]), swapped_distance(base, poisoned, resamples, seed)
    if damage > floor:
        return None
    return f"undefined: the poison's damage {damage:.3g} is within the noise of the prompts {floor:.3g}"


def swapped_distance(base: Sample, other: Sample, resamples: int, seed: int) -> float:
    """The 97.5 % point of d when two stages change places on prompts drawn at random: the noise floor of d."""
    swaps = np.random.default_rng(seed).random((resamples, base.effects.shape[1])) < 0.5
    change = (other.effects - base.effects).T
    first, second = (base.effects.mean(axis=1) + each.astype(float) @ change / len(change) for each in (swaps, ~swaps))
    return float(interval(1 - row_correlations(first, second))[1])


def _correlation(first: Sample, second: Sample, rows: Float[np.ndarray, "some prompt"]) -> Float[np.ndarray, "some"]:
    return row_correlations(rows @ first.effects.T, rows @ second.effects.T)


def _ratio(top: Float[np.ndarray, "some"], bottom: Float[np.ndarray, "some"]) -> Float[np.ndarray, "some"]:
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)
