"""Who is told how a long run goes: the command line draws bars, a program may listen or not."""

from collections.abc import Callable
from typing import Protocol

Told = Callable[[str, int, int], None]
"""Is told of several activities: called with (activity, done, total), as `Observer.progress` is."""


class Observer(Protocol):
    """Is told how a run goes."""

    def say(self, line: str) -> None:
        """Something slow begins, or something was found."""
        ...

    def stage(self, name: str, index: int, total: int) -> None:
        """A stage begins; `index` counts from 0."""
        ...

    def progress(self, activity: str, done: int, total: int, note: str = "") -> None:
        """Work is under way; `note` is a word about it."""
        ...


class Silent:
    """An observer that tells nobody."""

    def say(self, line: str) -> None:
        """Nothing."""

    def stage(self, name: str, index: int, total: int) -> None:
        """Nothing."""

    def progress(self, activity: str, done: int, total: int, note: str = "") -> None:
        """Nothing."""


def about(told: Told | None, activity: str) -> Callable[[int, int], None] | None:
    """What tells of one activity, called with (done, total); None where nobody listens."""
    return None if told is None else lambda done, total: told(activity, done, total)
