import sys

import pytest

from left_out import without_shape_checks
from neuroplast import cli


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process; gives exit code, stdout, stderr.

    As a user's, it checks no shapes; the tests of what a command calls do.
    """

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["neuroplast", *words])
        with without_shape_checks(), pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call
