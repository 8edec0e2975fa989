"""What a test of a whole study may leave out, because other tests have it."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import pytest

from neuroplast.study import outcome


@contextmanager
def without_shape_checks() -> Iterator[None]:
    """Switches off the shape checks, which take as long again as what they check, where another study has had them."""
    former = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", former)


@contextmanager
def without_report() -> Iterator[None]:
    """A study ends without its report, which takes seconds to draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "write_report", lambda run: run / "report.html")
        yield
