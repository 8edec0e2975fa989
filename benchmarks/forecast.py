"""How near is the forecast of a study to the study?

    python benchmarks/forecast.py --model tiny --preset smoke

Makes the plan of a study (`neuroplast study --plan`), runs it, and sets forecast beside actual: seconds by stage and by
activity, bytes on the disk, and memory. What a stage spends on an activity is read off a clock that is set around the
functions that do it; the rest of a stage (loading models, summing up, hashing and writing) is the difference.
`--stages base` leaves the others out, and the report. The last line is one JSON object.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import neuroplast as npl
from neuroplast.memory import reuse_freed_memory, show_size
from neuroplast.observer import Silent
from neuroplast.study import StudyConfig, circuits, following, runner, stage_runner
from neuroplast.study.costs import (
    ACTIVITIES,
    COMPARING,
    DISCOVERY,
    EDGES,
    FOLLOWING,
    JUDGING,
    LOOKING,
    MEASURING,
    REPORT,
    REST,
    TRAINING,
)
from neuroplast.study.forecast import forecast
from neuroplast.study.jobs import Cell

ENDING = "then"
TIMED = (
    (stage_runner, "finetune", TRAINING),
    (following, "measure_point", FOLLOWING),
    (stage_runner, "run_measurement", MEASURING),
    (circuits, "discover", DISCOVERY),
    (circuits, "discover_edges", EDGES),
    (circuits, "edge_faithfulness", EDGES),
    (circuits, "evaluate", JUDGING),
    (circuits, "inside_document", JUDGING),
    (stage_runner, "comparison_document", COMPARING),
    (stage_runner, "run_look", LOOKING),
    (runner, "finish_study", REPORT),
)
"""Functions, where a study finds them, and the activity that they are."""


class Clock(Silent):
    """An observer that knows the stage; time goes to the innermost activity under way."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._stage, self._under_way, self._since = ENDING, [REST], time.perf_counter()
        for module, name, activity in TIMED:
            setattr(module, name, self._timed(getattr(module, name), activity))

    def stage(self, name: str, index: int, total: int) -> None:
        """A stage begins."""
        self.turn()
        self._stage = name

    def turn(self) -> None:
        """Books the time since the last turn."""
        now = time.perf_counter()
        self.seconds[self._stage, self._under_way[-1]] += now - self._since
        self._since = now

    def _timed(self, work: Callable[..., Any], activity: str) -> Callable[..., Any]:
        @wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            if activity == REPORT:
                self._stage = ENDING
            self._under_way.append(activity)
            try:
                return work(*args, **kwargs)
            finally:
                self.turn()
                self._under_way.pop()

        return timed


def run_some(config: StudyConfig, out: Path, clock: Clock, wanted: list[str]) -> None:
    """Runs a study, or some of its stages, in their order and without the report."""
    if not wanted:
        runner.run_study(config, out, clock)
        return clock.turn()
    with runner.threads(config.threads):
        begun = runner.begin_study(config, out, clock)
        for index, stage in enumerate(begun.context.stages):
            if stage.id in wanted:
                clock.stage(stage.id, index, len(begun.context.stages))
                begun.run(stage)
    clock.turn()


def print_ratios(title: str, forecasts: dict[str, float], actual: dict[str, float]) -> dict[str, float]:
    """Prints and gives forecast ÷ actual."""
    print(f"\n{title:30} {'forecast':>9} {'actual':>9}   forecast ÷ actual")
    ratios: dict[str, float] = {}
    for name, seconds in actual.items():
        ratios[name] = round(forecasts.get(name, 0.0) / seconds, 3)
        print(f"{name:30} {forecasts.get(name, 0.0):8.1f}s {seconds:8.1f}s   {ratios[name]:.2f}")
    return ratios


def main() -> None:
    """Parses the arguments and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--set", action="append", default=[], dest="assignments", help="key=value, any setting")
    parser.add_argument("--stages", nargs="*", default=[], help="run only these, each after what it is made from")
    given = parser.parse_args()
    reuse_freed_memory()
    config = npl.build_config(given.preset, {"model": given.model}, assignments=given.assignments)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        (study,) = (found := forecast([Cell("run", config, out)], out)).studies
        clock = Clock()
        run_some(config, out, clock, given.stages)
        disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    planned = {(each.left.stage.id, name): time.likely for each in study.stages for name, time in each.seconds.items()}
    planned |= {(ENDING, name): time.likely for name, time in study.ending.items()}
    planned = {key: seconds for key, seconds in planned.items() if not given.stages or key[0] in given.stages}
    actual = {key: seconds for key, seconds in clock.seconds.items() if not given.stages or key[0] in given.stages}

    def along(pairs: dict[tuple[str, str], float], axis: int, names: list[str]) -> dict[str, float]:
        sums = {name: sum(seconds for key, seconds in pairs.items() if key[axis] == name) for name in names}
        return {name: seconds for name, seconds in sums.items() if seconds}

    stages = [*(each.left.stage.id for each in study.stages), ENDING]
    by_stage = print_ratios("stage", along(planned, 0, stages), along(actual, 0, stages))
    by_activity = print_ratios("activity", along(planned, 1, [*ACTIVITIES]), along(actual, 1, [*ACTIVITIES]))
    total = sum(planned.values()) / sum(actual.values())
    print(f"\n{'together':30} {sum(planned.values()):8.1f}s {sum(actual.values()):8.1f}s   {total:.2f}")
    print(f"memory: forecast {show_size(found.memory)}, actual {show_size(peak)}")
    if not given.stages:
        print(f"disk: forecast {show_size(study.disk)}, actual {show_size(disk)}")
    document = {
        "model": given.model,
        "preset": given.preset,
        "settings": given.assignments,
        "stages": given.stages,
        "seconds": round(sum(actual.values()), 1),
        "forecast_to_actual": {"together": round(total, 3), "by_stage": by_stage, "by_activity": by_activity},
        "calibration": {name: float(f"{value:.3g}") for name, value in vars(study.speed).items()},
        "memory": round(found.memory / peak, 3),
        "disk": None if given.stages else round(study.disk / disk, 3),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
