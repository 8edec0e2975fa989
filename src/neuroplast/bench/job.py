"""What a row of the table is: something that is run, what it is held against, and what others take for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroplast.models.network import Network
from neuroplast.tasks import load_task
from neuroplast.tasks.prompts import PromptSet

TASK = "ioi"
"""Whose prompts are measured: every prompt has one answer and one foil, as the counts take it."""


@dataclass(frozen=True)
class Counted:
    """A floor that is counted: the time of the matrix products that a result needs, at this machine's rate."""

    operations: Callable[[Any], float]
    """Multiplications and additions; called with the result."""


@dataclass(frozen=True)
class Alternating:
    """A floor that is run, in turn with what it is a floor of."""

    run: Callable[[Any], object]
    """Called with the result."""


@dataclass(frozen=True)
class Missing:
    """There is none."""

    why: str
    """The reason, for the reader of the table."""


@dataclass(frozen=True)
class PeerTime:
    """What the same takes by other means."""

    seconds: float
    """For the whole."""
    timed: str
    """How much of it was timed, such as `2 of 270 heads`."""
    max_difference: float | None = None
    """The largest difference of its numbers from ours, in logits; None where there is nothing to compare."""


@dataclass(frozen=True)
class Peer:
    """The same by other means."""

    name: str
    """Whose, or which."""
    measure: Callable[[Any], PeerTime]
    """Times it; called with our result."""


@dataclass(frozen=True)
class Job:
    """A row, ready to run."""

    what: str
    """What is run, with its sizes; two tables are compared only where this is the same."""
    run: Callable[[], Any]
    """What is timed."""
    floor: Counted | Alternating | Missing
    """The least that it could take."""
    peer: Peer | Missing
    """What it takes elsewhere."""
    is_long: bool = False
    """Whether it runs once, with no warm-up."""


@dataclass(frozen=True)
class Setting:
    """What all rows are measured on."""

    model: Network
    """The model; no row changes it."""
    name: str
    """What `load_model` takes for it."""
    n_prompts: int
    """Prompts of a row that does not take fewer."""
    device: str
    """As `load_model` takes it."""
    folder: Path
    """For what a row has to write; removed at the end."""

    def prompts(self, most: int | None = None, least: int = 1) -> PromptSet:
        """The prompts of a row.

        Args:
            most: how many it takes at most, where all would take too long.
            least: how many it needs.
        """
        n = max(least, min(self.n_prompts, most or self.n_prompts))
        return load_task(TASK).prompts(self.model, n, 0)
