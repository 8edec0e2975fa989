"""Feeds every reader of the package with damaged files, and tells what it made of them.

    python benchmarks/fuzz.py --inputs 100000 [--reader NAME ...] [--start 0]

A line a reader; the last line is JSON. A crash is anything that is raised and is no error of the library, an error of
several lines, or an input that takes longer than ten seconds. Its shrunk input is printed as Python spells it, so that
it can be made a test, and the exit code is 1. What is fed is in `tests/fuzz_readers.py`, how it is damaged in
`tests/fuzzing.py`.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz_readers import READERS
from fuzzing import Hung, Tally, fuzz

BATCH = 5000
"""Inputs that Hypothesis draws at a time: it remembers all of a batch, to draw each once."""

MEMORY = "/dev/shm"
"""Where files are written fastest."""


def fuzz_reader(name: str, inputs: int, start: int) -> tuple[Tally, str | None]:
    """Feeds one reader until it has had so many inputs, or crashes.

    Returns:
        What was fed; and the crash, where there was one.
    """
    tally, batch = Tally(), 0
    with tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as folder:
        reader = READERS[name](Path(folder))
        while tally.fed < inputs:
            try:
                fuzz(reader, min(BATCH, inputs - tally.fed), tally, start + batch)
            except (Exception, Hung):  # noqa: BLE001 - whatever it is, it is what is looked for
                return tally, f"{tally.last!r}\n{traceback.format_exc(limit=-3)}"
            batch += 1
    return tally, None


def main() -> None:
    """Prints what was found."""
    parser = argparse.ArgumentParser(description="Feeds every reader with damaged files.")
    parser.add_argument("--inputs", type=int, default=100_000, help="of each reader")
    parser.add_argument("--reader", choices=sorted(READERS), action="append", help="only this one; may be repeated")
    parser.add_argument("--start", type=int, default=0, help="of the draws")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, int]] = {}
    crashes = 0
    for name in asked.reader or READERS:
        begun = time.perf_counter()
        tally, crash = fuzz_reader(name, asked.inputs, asked.start)
        crashes += crash is not None
        found[name] = {"inputs": tally.fed, "distinct": len(tally.distinct), "refused": tally.refused}
        seconds = time.perf_counter() - begun
        print(
            f"{name:12} {tally.fed:8} inputs, {len(tally.distinct):8} distinct, {tally.refused:8} refused, "
            f"{'CRASH' if crash else '0 crashes'}, {seconds:.0f} s",
            flush=True,
        )
        if crash:
            print(crash, flush=True)
    fed = sum(each["inputs"] for each in found.values())
    print(json.dumps({"inputs": fed, "crashes": crashes, "readers": found}))
    sys.exit(1 if crashes else 0)


if __name__ == "__main__":
    main()
