"""A copy of the test's process, for what changes a process or ends it: nothing is imported again."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from left_out import without_shape_checks


def run_forked(work: Callable[[], object], folder: Path) -> tuple[int, str, str]:
    """Does something in a copy of this process, without shape checks and with Python's usual warnings.

    Args:
        work: what is done.
        folder: where what it prints is kept.

    Returns:
        The exit status, and what was printed to stdout and stderr.
    """
    out, err = folder / "forked.out", folder / "forked.err"
    if pid := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
    status = 1
    try:
        warnings.resetwarnings()
        with (
            out.open("w", encoding="utf-8") as printed,
            err.open("w", encoding="utf-8") as said,
            redirect_stdout(printed),
            redirect_stderr(said),
            without_shape_checks(),
        ):
            status = _status(work)
    finally:
        os._exit(status)


def die_in(home: Any, name: str, count: int, work: Callable[[], object]) -> None:
    """Does something in a copy of this process, which kills itself at the n-th call of a function.

    Args:
        home: whose function.
        name: its name.
        count: n.
        work: what is done; it has to come so far.
    """
    if pid := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        return
    former, left = getattr(home, name), [count]

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return former(*args, **kwargs)

    setattr(home, name, dying)
    try:
        work()
    finally:
        os._exit(1)


def _status(work: Callable[[], object]) -> int:
    """How a process that does nothing else would end."""
    try:
        work()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 - told as an interpreter would, for the copy must not go on with the tests
        traceback.print_exc()
        return 1
    return 0
