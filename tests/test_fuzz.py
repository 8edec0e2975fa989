"""Whatever a file holds, its reader takes it or says in one line what is wrong; `benchmarks/fuzz.py` runs long."""

from pathlib import Path

import pytest

from fuzz_readers import READERS
from fuzzing import Tally, fuzz

INPUTS = 150


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, tmp_path: Path):
    tally = Tally()
    fuzz(READERS[name](tmp_path), INPUTS, tally)
    assert tally.fed >= INPUTS and 0 < tally.refused < tally.fed
