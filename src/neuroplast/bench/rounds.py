"""Measuring: every row warmed up, then all in turn with the machine's own rate, then what others take.

What is measured in the same rounds suffers the same disturbances, so ratios move less than seconds do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neuroplast.bench.job import Alternating, Job, Missing, PeerTime
from neuroplast.bench.rate import matrix_rate, timed
from neuroplast.errors import NeuroplastError
from neuroplast.models.network import Network
from neuroplast.observer import Observer

NO_PEERS = "peers were not asked for"


@dataclass
class Clock:
    """What was measured of one row."""

    job: Job
    """What is run."""
    found: Any = None
    """What it gave, the first time."""
    seconds: list[float] = field(default_factory=list[float])
    """What it took, each time."""
    floor: list[float] = field(default_factory=list[float])
    """What its floor took, where that is run."""
    peer: PeerTime | Missing = field(default_factory=lambda: Missing(NO_PEERS))
    """What it takes elsewhere."""
    failed: str | None = None
    """Why it cannot be measured on this model."""


def measure_rounds(model: Network, clocks: Mapping[str, Clock], repeats: int, observer: Observer) -> list[float]:
    """Measures all rows, and gives the rates of matrix products that were measured between them.

    Args:
        model: the model.
        clocks: what is measured is noted there.
        repeats: rounds.
        observer: is told how it goes.
    """
    rates: list[float] = []
    brief = {name: clock for name, clock in clocks.items() if not clock.job.is_long}
    observer.stage("warm-up", 0, repeats + 2)
    for number, (name, clock) in enumerate(brief.items()):
        observer.progress("rows", number, len(brief), name)
        _run(clock, lambda clock=clock: _warm_up(clock))
    for repeat in range(repeats):
        members = clocks if repeat == 0 else brief
        observer.stage(f"round {repeat + 1}", repeat + 1, repeats + 2)
        for number, (name, clock) in enumerate(members.items()):
            observer.progress("rows", number, len(members), name)
            rates.append(matrix_rate(model))
            _run(clock, lambda clock=clock: _time(clock, model))
    return rates


def measure_peers(clocks: Mapping[str, Clock], observer: Observer) -> None:
    """Measures what the rows take by other means, where there are any."""
    for number, (name, clock) in enumerate(clocks.items()):
        observer.progress("rows", number, len(clocks), name)
        peer = clock.job.peer
        if isinstance(peer, Missing):
            clock.peer = peer
        elif clock.failed is None:
            try:
                clock.peer = peer.measure(clock.found)
            except NeuroplastError as error:
                clock.peer = Missing(str(error))


def _run(clock: Clock, work: Callable[[], None]) -> None:
    if clock.failed is None:
        try:
            work()
        except NeuroplastError as error:
            clock.failed = str(error)


def _warm_up(clock: Clock) -> None:
    clock.found = clock.job.run()
    if isinstance(clock.job.floor, Alternating):
        clock.job.floor.run(clock.found)


def _time(clock: Clock, model: Network) -> None:
    given: list[Any] = []
    seconds = timed(lambda: given.append(clock.job.run()), model)
    if clock.found is None:
        clock.found = given[0]
    if isinstance(floor := clock.job.floor, Alternating):
        clock.floor.append(timed(lambda: floor.run(clock.found), model))
    clock.seconds.append(seconds)
