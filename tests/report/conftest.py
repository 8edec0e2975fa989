"""The synthetic run that the report's tests read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from neuroplast.report import write_report
from synthetic_run import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of one seed."""
    return write_run(tmp_path / "run")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual run with its report written; shared, so never to be changed."""
    run = write_run(tmp_path_factory.mktemp("reported") / "run")
    write_report(run)
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a finished run with other contents than the usual one."""
    return lambda **options: write_run(tmp_path / "other", **options)
