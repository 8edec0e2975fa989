"""Does fine-tuning strengthen the circuit that is there, or build another one?

With e(h) the mean direct effect of head h on the logits before fine-tuning, e'(h) after it, and s(h) the sign of e(h),

- growth of a head     s(h) (e'(h) - e(h)): how much more it does of what it did
- share of a circuit   growth of its heads ÷ the sum of |e' - e| over all heads of the model

1 is a change that does nothing but strengthen the circuit's own heads in what they did. Heads that come anew, and heads
that turn round, take from it. It is held against random sets of as many heads in the same layers.

The signs are those on all prompts, in every resample: the size of what is no more than noise would be larger in each
resample than it is, and its interval would lie beside the value. On all prompts such noise makes the share too small.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from neuroplast.components import Node
from neuroplast.localisation import MatchedTest, draw_matched, matched_test
from neuroplast.statistics import Estimate, Weights, estimate

HeadEffects = Float[np.ndarray, "layer head prompt"]


def growth_share(before: HeadEffects, after: HeadEffects, heads: Sequence[Node], weights: Weights) -> Estimate:
    """The share of all change of direct effects that strengthens some heads in what they did.

    Args:
        before: effects of all heads before fine-tuning.
        after: the same afterwards, on the same prompts.
        heads: the circuit's; where they stand does not matter.
        weights: from `bootstrap_weights`.
    """
    if not heads:
        return Estimate(None, None, "no head of base's circuit acts on the logits")
    old, change = (each.reshape(-1, each.shape[-1]) for each in (before, after - before))
    grown, size = (np.sign(each.mean(axis=1))[:, None] * change for each in (old, change))
    mine = grown[np.ravel_multi_index(_places(heads), before.shape[:2])].sum(axis=0)
    whole = size.sum(axis=0)

    def share(rows: Float[np.ndarray, "some prompt"]) -> Float[np.ndarray, "some"]:
        bottom = rows @ whole
        return np.divide(rows @ mine, bottom, out=np.full_like(bottom, np.nan), where=bottom > 0)

    return estimate(weights, share)


def growth_test(
    before: HeadEffects, after: HeadEffects, heads: Sequence[Node], share: Estimate, n_random: int, seed: int
) -> MatchedTest:
    """Holds a circuit's share against those of random sets of as many heads in the same layers.

    Args:
        before: as `growth_share` takes it; likewise `after` and `heads`.
        after: effects afterwards.
        heads: the circuit's.
        share: what `growth_share` gave.
        n_random: how many random sets.
        seed: seed of the draws.
    """
    if share.value is None:
        return MatchedTest(0, why=share.why)
    old, new = before.mean(axis=2), after.mean(axis=2)
    grown, whole = np.sign(old) * (new - old), np.abs(new - old).sum()
    anywhere = list(dict.fromkeys(node.at(None) for node in heads))
    drawn = draw_matched(anywhere, before.shape[1], n_random, seed)
    return matched_test(share.value, np.array([grown[_places(each)].sum() / whole for each in drawn]))


def _places(heads: Sequence[Node]) -> tuple[np.ndarray, np.ndarray]:
    layers, places = zip(*dict.fromkeys((node.layer or 0, node.head or 0) for node in heads), strict=True)
    return np.array(layers), np.array(places)
