"""Kills a study at random moments, continues it with the same command, and compares what it ends with.

    python benchmarks/faults.py --kills 50

Each time a new run directory: the command is started, killed with SIGKILL after a random time (of those an undisturbed
run takes, from its first file on), and started again until it ends; now and then the second run is killed too. The
`summary.json` must be that of the undisturbed run, to the byte. A run that takes longer than five times as long as the
undisturbed one hangs. The last line is one JSON object, and the exit code 1 where anything differs or hangs.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = (sys.executable, "-m", "neuroplast", "study", "--model", "tiny", "--preset", "smoke", "--quiet")
SETTINGS = ("threads=1", "n_prompts=8", "resamples=100", "save_every=1")
AGAIN = 0.25
"""Share of the kills after which the continued run is killed as well."""


def start(out: Path) -> subprocess.Popen[bytes]:
    """Starts, or continues, the study."""
    given = [word for setting in SETTINGS for word in ("--set", setting)]
    return subprocess.Popen([*COMMAND, "--out", str(out), *given], stdout=subprocess.DEVNULL)


def finish(out: Path, limit: float) -> bool:
    """Runs the study to its end; False where it does not end in time."""
    process = start(out)
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def kill_after(out: Path, seconds: float) -> bool:
    """Starts the study and kills it so long after its first file; False where it had ended by then."""
    process = start(out)
    while process.poll() is None and not (out / "manifest.json").exists():
        time.sleep(0.02)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def main() -> int:
    """Kills, continues, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="neuroplast-") as scratch:
        whole = Path(scratch) / "whole"
        started = time.monotonic()
        process = start(whole)
        while process.poll() is None and not (whole / "manifest.json").exists():
            time.sleep(0.02)
        begun = time.monotonic()
        if process.wait():
            raise SystemExit("the undisturbed study failed")
        length, limit = time.monotonic() - begun, 5 * (time.monotonic() - started)
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
            ended = finish(out, limit)
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
