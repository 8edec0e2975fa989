"""A grid of 12 cells on `tiny`: inline, on a local Ray cluster of 2 workers, and again with a worker killed on the way.

    python benchmarks/grid.py

The summaries of all cells must be the same, to the byte. Times are those of the whole command, with its start. The last
line is one JSON object; the exit code is 1 where a summary differs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

GRID = """
preset = "quick"
n_prompts = 32
circuit_stages = ["base"]
circuit_random = 20
compare_stages = []

[grid]
models = ["tiny"]
poisons = ["subject_duplication", "name_moving"]
rates = [0.5, 1.0]
seeds = [0, 1, 2]
"""


def run(folder: Path, name: str, *more: str, kill: bool = False) -> tuple[float, dict[str, bytes]]:
    """Runs the grid, with a worker killed on its way if asked; seconds, and the summary of each cell."""
    settings, out = folder / "grid.toml", folder / name
    settings.write_text(GRID)
    command = [sys.executable, "-m", "neuroplast", "study", "--config", str(settings), "--out", str(out), *more]
    started = time.monotonic()
    process = subprocess.Popen([*command, "--quiet"], stdout=subprocess.DEVNULL)
    while kill and process.poll() is None:
        time.sleep(0.2)
        made = len(list(out.glob("cells/*/stages/recovered")))
        if made and (worker := at_work(process.pid)):
            os.kill(worker, signal.SIGKILL)
            print(f"killed the worker {worker}", flush=True)
            kill = False
    if process.wait():
        raise SystemExit(f"{name} failed")
    if kill:
        raise SystemExit("no worker was found to kill")
    seconds = time.monotonic() - started
    cells = sorted((out / "cells").iterdir())
    return seconds, {cell.name: (cell / "summary.json").read_bytes() for cell in cells}


def at_work(driver: int) -> int | None:
    """A worker process that runs a stage."""
    for child in psutil.Process(driver).children(recursive=True):
        try:
            if "ray::" in "".join(child.cmdline()) and "recovered" in "".join(child.cmdline()):
                return child.pid
        except psutil.Error:
            continue
    return None


def main() -> int:
    """Runs, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="of the two timed runs")
    options = parser.parse_args()
    on_ray = ("--backend", "ray", "--workers", str(options.workers))
    ratios: list[float] = []
    identical = True
    with tempfile.TemporaryDirectory(prefix="neuroplast-") as scratch:
        for repeat in range(options.repeats):
            inline, expected = run(Path(scratch), f"inline{repeat}")
            cluster, found = run(Path(scratch), f"ray{repeat}", *on_ray)
            ratios.append(cluster / inline)
            identical &= found == expected
            print(f"inline {inline:.1f} s, {options.workers} workers {cluster:.1f} s: {ratios[-1]:.2f}", flush=True)
        _, found = run(Path(scratch), "killed", *on_ray, kill=True)
        after_kill = found == expected
        print(f"{len(expected)} cells; with a worker killed: {'identical' if after_kill else 'DIFFERENT'}")
    document = {"cells": len(expected), "identical": identical, "identical_after_kill": after_kill, "ratios": ratios}
    print(json.dumps(document))
    return int(not (identical and after_kill))


if __name__ == "__main__":
    sys.exit(main())
