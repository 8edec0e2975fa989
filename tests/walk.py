"""Walks through the steps of pages, as their reader does: snippets of one page share their names."""

import shlex
import sys
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from neuroplast import cli


def walk(steps: list[tuple[str, str, bool]]) -> list[tuple[int, str]]:
    """Runs each page's code and whether it is Python; gives the exit status and what was printed, of each."""
    names: dict[str, dict[str, Any]] = defaultdict(dict)
    return [_run(code, page, is_python, names[page]) for page, code, is_python in steps]


def _run(code: str, page: str, is_python: bool, names: dict[str, Any]) -> tuple[int, str]:
    """Runs a snippet, or a command of `neuroplast`."""
    printed = StringIO()
    status = 0
    with redirect_stdout(printed), redirect_stderr(printed):
        if is_python:
            exec(compile(code, page, "exec"), names)
        else:
            sys.argv = shlex.split(code)
            try:
                cli.main()
            except SystemExit as end:
                status = int(end.code or 0)
    return status, printed.getvalue()
