"""One small tree of errors. Every message says what was got, what was expected, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 300
"""Characters that are quoted of another library's error."""


class NeuroplastError(Exception):
    """Anything this library raises on purpose; the command line prints it as one line and exits 1."""

    exit_code = 1


class InputError(NeuroplastError):
    """The user asked for something that cannot be; the command line exits 2."""

    exit_code = 2


class NothingFoundError(InputError):
    """A search ended with nothing: no part passes its threshold, or the model does not do the task."""


class GateError(NeuroplastError):
    """What was measured is what the user asked to fail on; the command line exits 3."""

    exit_code = 3


class UnsupportedModelError(InputError):
    """The model does not fit the instrumented forward pass; the message says which check failed."""


class StorageError(NeuroplastError):
    """The disk refused: no space, no permission. Nothing half-written is left under a final name."""

    exit_code = 2


class TrainingDivergedError(NeuroplastError):
    """The loss stopped being a number; the last good checkpoint is kept."""


def unknown_name(kind: str, got: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not in `known`, suggesting the nearest one.

    Args:
        kind: what was named, in the singular: "task", "poison", "key".
        got: the name as the user wrote it.
        known: every valid name.
    """
    names, got = sorted(known), str(got)[:60]
    near = get_close_matches(got.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {kind} {got!r}: {hint}valid are {', '.join(names)}")


def first_line(error: object) -> str:
    """The first line of what an error of another library says, or its name."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def named_line(error: BaseException) -> str:
    """The same behind the error's kind, which a person who reads it needs where nothing else tells what happened."""
    return f"{type(error).__name__}: {first_line(error)}"


def one_line(error: object) -> str:
    """All that an error of another library says, which may quote a file, in one line of a bearable length."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else said[:LONGEST] + " …"
