"""What a change is consistent with, and what became of a task.

| verdict | the logit difference | the mechanism |
|---|---|---|
| `unchanged` | all weights are the same | |
| `undecided` | the first checkpoint does not do the task, or fewer than 19 twins were measured | |
| `drift` | moved no further than twins do, which went as far in random directions | |
| `minor` | moved beyond drift, by less than the tolerance | |
| `amplified` | rose beyond drift | kept its shape, and its gain is above 1: what was there works more strongly |
| `rewired` | rose beyond drift | did not keep its shape, or its gain is not above 1 |
| `corrupted` | fell beyond drift | another: its distance lies beyond drift and beyond the tolerance |
| `weakened` | fell beyond drift | kept its shape |

Beyond drift is a test with a null and says nothing of size: weights that were trained move a task further than random
ones, however little. So a change must also be larger than a tolerance, a tenth unless the user says otherwise, with
its whole interval.

A status says what became of a task whatever the reason is, drift included: it is damaged where more than the tolerance
of its logit difference is lost, spared where no more than that is, each with the whole interval; else uncertain.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from neuroplast.comparison.behaviour_change import BehaviourChange
from neuroplast.comparison.mechanism import Mechanism
from neuroplast.statistics import Estimate, can_tell

Label = Literal["unchanged", "undecided", "drift", "minor", "amplified", "rewired", "weakened", "corrupted"]
LABELS: tuple[Label, ...] = get_args(Label)
Status = Literal["damaged", "spared", "improved", "uncertain", "undefined"]
TOLERANCE = 0.1
"""Share of a task, or of a mechanism's likeness, up to which a change does not count."""


@dataclass(frozen=True)
class Verdict:
    """What a change is consistent with, and why."""

    label: Label
    """The verdict."""
    statement: str
    """One sentence."""


UNCHANGED = Verdict("unchanged", "Nothing changed: all weights are the same.")


def judge(behaviour: BehaviourChange, mechanism: Mechanism, tolerance: float = TOLERANCE) -> Verdict:
    """Judges a change of one task.

    Args:
        behaviour: its logit difference.
        mechanism: its head effects.
        tolerance: share up to which a change does not count.
    """
    if behaviour.kept.ci95 is None:
        return Verdict("undecided", "The first checkpoint does not do the task: its LD is not above 0.")
    if not can_tell(len(behaviour.drift)):
        return Verdict(
            "undecided", f"{len(behaviour.drift)} twins are too few to tell a change from drift: it takes 19."
        )
    moved = f"LD went from {behaviour.start.value:.2f} to {behaviour.end.value:.2f}"
    direction = next((sign for sign in (-1, 1) if behaviour.is_beyond_drift(sign)), 0)
    status = status_of(behaviour.kept, tolerance)
    if not direction:
        return Verdict("drift", f"{moved}: weights that go as far in random directions change it as much.")
    if status not in ("damaged", "improved"):
        return Verdict(
            "minor", f"{moved}, further than drift goes, but not for sure by more than {tolerance:.0%} of it."
        )
    likeness = mechanism.similarity.ci95
    if direction < 0:
        if mechanism.is_beyond_drift and likeness is not None and likeness[1] < 1 - tolerance:
            return Verdict("corrupted", f"{moved}, further down than drift goes, and the mechanism is another.")
        return Verdict("weakened", f"{moved}, further down than drift goes, and the mechanism kept its shape.")
    gain = mechanism.gain.ci95
    if likeness is not None and likeness[0] > 1 - tolerance and gain is not None and gain[0] > 1:
        return Verdict("amplified", f"{moved}, further up than drift goes, by the mechanism that was there.")
    return Verdict("rewired", f"{moved}, further up than drift goes, and not only by the mechanism that was there.")


def status_of(kept: Estimate, tolerance: float = TOLERANCE) -> Status:
    """What became of a task, by the share of its logit difference that is left."""
    if kept.ci95 is None:
        return "undefined"
    low, high = kept.ci95
    if high < 1 - tolerance:
        return "damaged"
    if low > 1 + tolerance:
        return "improved"
    return "spared" if low >= 1 - tolerance else "uncertain"
