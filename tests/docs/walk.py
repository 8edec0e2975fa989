"""Walks through the steps of a page in one process, without the shape checks of the tests, which take as long again.

Reads a list of `[page, code, is_python]` as JSON from stdin, and writes a list of `[exit status, what was printed]`.
Snippets of one page share their names.
"""

import json
import shlex
import sys
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

from neuroplast import cli

names: dict[str, dict[str, Any]] = defaultdict(dict)


def run(page: str, code: str, is_python: bool) -> tuple[int, str]:
    """Runs a snippet, or a command of `neuroplast`."""
    printed = StringIO()
    status = 0
    with redirect_stdout(printed), redirect_stderr(printed):
        if is_python:
            exec(compile(code, page, "exec"), names[page])
        else:
            sys.argv = shlex.split(code)
            try:
                cli.main()
            except SystemExit as end:
                status = int(end.code or 0)
    return status, printed.getvalue()


if __name__ == "__main__":
    json.dump([run(*step) for step in json.load(sys.stdin)], sys.stdout)
