"""Kills a study at random moments, continues it, and compares what it ends with.

    python benchmarks/faults.py --kills 50

Each time a new run directory: the study is started in a process of its own, killed with SIGKILL after a random time (of
those that an undisturbed one takes, from its first file on), and started again until it ends; now and then the second
process is killed too. The `summary.json` must be that of the undisturbed study, to the byte. One that takes more than
ten times as long as the undisturbed one hangs. The processes are copies of this one (fork), so that no time goes into
importing. The last line is one JSON object, and the exit code 1 where anything differs or hangs.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

from neuroplast.study import build_config, run_study

SETTINGS = {"threads": 1, "n_prompts": 8, "resamples": 100, "save_every": 1}
AGAIN = 0.25
"""Share of the kills after which the continued study is killed as well."""
PATIENCE = 10


def start(out: Path) -> ForkProcess:
    """Starts, or continues, the study."""
    process = multiprocessing.get_context("fork").Process(
        target=run_study, args=(build_config("smoke", SETTINGS), out), daemon=True
    )
    process.start()
    return process


def await_first_file(process: ForkProcess, out: Path) -> float:
    """Waits until the study has begun to write; the moment."""
    while process.is_alive() and not (out / "manifest.json").exists():
        time.sleep(0.01)
    return time.monotonic()


def finish(out: Path, limit: float) -> bool:
    """Runs the study to its end; False where it does not end in time, or fails."""
    process = start(out)
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


def kill_after(out: Path, seconds: float) -> bool:
    """Starts the study and kills it so long after its first file; False where it had ended by then."""
    process = start(out)
    await_first_file(process, out)
    process.join(seconds)
    killed = process.is_alive()
    process.kill()
    process.join()
    if not killed and process.exitcode:
        raise SystemExit(f"the study in {out} failed by itself")
    return killed


def main() -> int:
    """Kills, continues, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="neuroplast-") as scratch:
        whole = Path(scratch) / "whole"
        process = start(whole)
        begun = await_first_file(process, whole)
        process.join()
        if process.exitcode:
            raise SystemExit("the undisturbed study failed")
        length = time.monotonic() - begun
        expected = (whole / "summary.json").read_bytes()
        kills = identical = hangs = 0
        while kills < options.kills:
            out = Path(scratch) / f"run {kills}"
            moment = rng.uniform(0, length)
            if not kill_after(out, moment):
                shutil.rmtree(out)
                continue
            kills += 1
            twice = rng.random() < AGAIN and kill_after(out, rng.uniform(0, length - moment))
            ended = finish(out, PATIENCE * length)
            same = ended and (out / "summary.json").read_bytes() == expected
            hangs, identical = hangs + (not ended), identical + same
            state = "identical" if same else "DIFFERENT" if ended else "HANGS OR FAILS"
            print(f"{kills:3}  killed after {moment:5.2f} s{', and again' if twice else ''}: {state}", flush=True)
            if same:
                shutil.rmtree(out)
    print(json.dumps({"kills": kills, "identical": identical, "hangs": hangs, "seconds_undisturbed": round(length, 1)}))
    return int(identical < kills)


if __name__ == "__main__":
    sys.exit(main())
