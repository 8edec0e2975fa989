"""What a change is consistent with: amplification, corruption, or drift.

| verdict | the logit difference | the mechanism |
|---|---|---|
| `unchanged` | all weights are the same | |
| `undecided` | was measured on too few twins (19 are needed) | |
| `drift` | moved no further than twins do, which went as far in random directions | |
| `amplified` | rose beyond drift | its gain is above 1: the circuit that was there works more strongly |
| `rewired` | rose beyond drift | its gain is not above 1: something else does it |
| `corrupted` | fell beyond drift | changed beyond the noise of the prompts |
| `weakened` | fell beyond drift | is as it was, in shape |

No limit in here is a number of ours but the level of 0.05: each test has its own null.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from neuroplast.comparison.behaviour_change import BehaviourChange
from neuroplast.comparison.mechanism import Mechanism
from neuroplast.statistics import can_tell

Label = Literal["unchanged", "undecided", "drift", "amplified", "rewired", "corrupted", "weakened"]
LABELS: tuple[Label, ...] = get_args(Label)
Status = Literal["damaged", "spared", "improved", "undefined"]


@dataclass(frozen=True)
class Verdict:
    """What a change is consistent with, and why."""

    label: Label
    """The verdict."""
    statement: str
    """One sentence."""


UNCHANGED = Verdict("unchanged", "Nothing changed: all weights are the same.")


def judge(behaviour: BehaviourChange, mechanism: Mechanism) -> Verdict:
    """Judges a change of one task."""
    if not can_tell(len(behaviour.drift)):
        return Verdict(
            "undecided", f"{len(behaviour.drift)} twins are too few to tell a change from drift: it takes 19."
        )
    moved = f"LD went from {behaviour.start.value:.2f} to {behaviour.end.value:.2f}"
    if behaviour.is_beyond_drift(-1):
        if mechanism.is_changed:
            return Verdict("corrupted", f"{moved}, further down than drift goes, and the mechanism is another.")
        return Verdict("weakened", f"{moved}, further down than drift goes, and the mechanism kept its shape.")
    if behaviour.is_beyond_drift(1):
        gain = mechanism.gain.ci95
        if gain is not None and gain[0] > 1:
            return Verdict("amplified", f"{moved}, further up than drift goes, by the mechanism that was there.")
        return Verdict(
            "rewired", f"{moved}, further up than drift goes, and not by the mechanism that was there alone."
        )
    return Verdict("drift", f"{moved}: weights that go as far in random directions change it as much.")


def status_of(change: BehaviourChange) -> Status:
    """What became of a task: `damaged` or `improved` beyond drift, or `spared`; undefined where that cannot be told."""
    if change.start.ci95 is None or change.start.ci95[0] <= 0 or not can_tell(len(change.drift)):
        return "undefined"
    if change.is_beyond_drift(-1):
        return "damaged"
    return "improved" if change.is_beyond_drift(1) else "spared"
