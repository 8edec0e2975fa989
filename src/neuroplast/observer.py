"""Who is told how a long run goes: the command line draws bars, a program may listen or not."""

from typing import Protocol


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
