"""What a study, or a grid of them, will take, before it runs: time, memory, disk, and what is there already.

A forecast writes nothing and takes no lock. It loads the model for a short calibration (`calibration.py`), looks which
files are there (`remaining.py`), and counts (`costs.py`).
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuroplast.machine import cpus
from neuroplast.observer import Observer, Silent
from neuroplast.storage import nearest_folder
from neuroplast.study.calibration import Speed, calibrate
from neuroplast.study.costs import (
    REST,
    Range,
    checkpoint_bytes,
    kept_checkpoints,
    peak_memory,
    report_bytes,
    report_seconds,
    stage_bytes,
    stage_seconds,
    total,
)
from neuroplast.study.jobs import Cell, stage_key
from neuroplast.study.outcome import SUMMARY
from neuroplast.study.plan import StudyConfig, build_plan
from neuroplast.study.pruning import checkpoints_at_once
from neuroplast.study.remaining import Remaining, remaining
from neuroplast.study.runner import claim_folder, threads

SCHEMA = 1
SHARED = "shared"
NOTES = (
    "Times are ranges: steps and prompts are counted and timed on this machine; how long circuits, their judgement and "
    "comparisons take hangs on what is found, so for those stand constants, and a factor of two either way.",
    "What is there is taken for whole: a damaged file is found, and made again, when the study goes on.",
)


@dataclass(frozen=True)
class StageForecast:
    """What one stage will take."""

    left: Remaining
    """What there is to make."""
    state: str
    """`made`, `partly` and `nothing` there, or `shared`: another study of the grid makes it."""
    seconds: Mapping[str, Range]
    """By activity."""
    disk: int
    """Bytes when it is finished."""
    there: int
    """Bytes that are there."""

    def document(self) -> dict[str, Any]:
        """The stage as JSON."""
        left, is_asked = self.left, self.state not in ("made", SHARED)
        return {
            "id": left.stage.id,
            "state": self.state,
            "steps": left.stage.points[-1].step,
            "steps_left": left.steps if is_asked else 0,
            "to_make": [name for name in self.seconds if name != REST] or list(self.seconds),
            "seconds": asdict(total(self.seconds.values())),
            "by_activity": {name: asdict(each) for name, each in self.seconds.items()},
            "disk_bytes": self.disk,
            "disk_there_bytes": self.there,
        }


@dataclass(frozen=True)
class StudyForecast:
    """What one study will take."""

    cell: Cell
    """The study."""
    speed: Speed
    """Of its model."""
    stages: tuple[StageForecast, ...]
    """Its stages."""
    ending: Mapping[str, Range]
    """What comes before the first and after the last, by activity."""
    page: int
    """Bytes of the page, its figures and tables, that are still to be written."""

    @property
    def seconds(self) -> Range:
        """Everything together."""
        return total([*(each for stage in self.stages for each in stage.seconds.values()), *self.ending.values()])

    @property
    def longest(self) -> float:
        """Seconds of the longest chain of stages that wait for each other, the end included."""
        ends: dict[str, float] = {}
        for each in self.stages:
            before = max((ends[name] for name in each.left.stage.needs), default=0.0)
            ends[each.left.stage.id] = before + total(each.seconds.values()).likely
        return max(ends.values()) + total(self.ending.values()).likely

    @property
    def memory(self) -> int:
        """Bytes that one process of it holds at most."""
        return peak_memory(self.cell.config, self.speed)

    @property
    def disk(self) -> int:
        """Bytes of the finished run."""
        return sum(stage.disk for stage in self.stages) + self.page

    @property
    def growth(self) -> int:
        """Bytes that are to come and stay."""
        stages = (stage for stage in self.stages if stage.state != "made")
        return sum(max(0, stage.disk - stage.there) for stage in stages) + (self.page if self.ending else 0)

    @property
    def passing(self) -> int:
        """Bytes of checkpoints and saves that are to come and are removed again, as many as lie there together."""
        config, stages = self.cell.config, build_plan(self.cell.config)
        if all(each.state in ("made", SHARED) for each in self.stages):
            return 0
        missing = sum(
            not (self.cell.out / path).is_dir() for stage in stages for path in kept_checkpoints(stage, config)
        )
        at_once = checkpoints_at_once(config, stages, self.cell.out)
        return max(0, at_once - missing) * checkpoint_bytes(self.speed)


@dataclass(frozen=True)
class Forecast:
    """What several studies will take together."""

    out: Path
    """Their folder."""
    studies: tuple[StudyForecast, ...]
    """Each study."""
    at_once: int
    """Stages that run at the same time."""

    @property
    def seconds(self) -> Range:
        """Of everything, one stage after the other."""
        return total(study.seconds for study in self.studies)

    @property
    def elapsed(self) -> Range:
        """With as many stages at once as run: roughly, since some wait for each other."""
        spent = self.seconds
        longest = max(study.longest for study in self.studies)
        share = max(spent.likely / self.at_once, longest) / spent.likely if spent.likely else 1.0
        return Range(spent.low * share, spent.likely * share, spent.high * share)

    @property
    def memory(self) -> int:
        """Bytes that all processes together hold at most: those of the largest models at once."""
        largest = sorted((study.memory for study in self.studies for _ in study.stages), reverse=True)
        return sum(largest[: self.at_once])

    @property
    def room(self) -> int:
        """Bytes that the disk must have free."""
        passing = sorted((study.passing for study in self.studies), reverse=True)
        return sum(study.growth for study in self.studies) + sum(passing[: self.at_once])

    def document(self) -> dict[str, Any]:
        """The forecast as JSON."""
        counts = Counter(stage.state for study in self.studies for stage in study.stages)
        return {
            "schema": SCHEMA,
            "out": str(self.out),
            "studies": [_study_document(study) for study in self.studies],
            "totals": {
                "n_studies": len(self.studies),
                "n_stages": counts.total(),
                "by_state": {state: counts[state] for state in ("made", "partly", "nothing", SHARED)},
                "seconds": asdict(self.seconds),
                "at_once": self.at_once,
                "elapsed_seconds": asdict(self.elapsed),
                "memory_bytes": self.memory,
                "disk_bytes": sum(study.disk for study in self.studies),
                "disk_needed_bytes": self.room,
                "disk_free_bytes": shutil.disk_usage(nearest_folder(self.out)).free,
            },
            "notes": list(NOTES),
        }


def forecast(cells: Sequence[Cell], out: Path, observer: Observer | None = None, *, at_once: int = 1) -> Forecast:
    """What studies will take; writes nothing.

    Args:
        cells: the studies, each with a run directory, which need not be there.
        out: the folder that they lie in; of one study, its run directory.
        observer: is told what is done.
        at_once: stages that run at the same time.

    Raises:
        InputError: a run directory holds something else, a model cannot be had, or a task does not fit it.
        StorageError: a note of what is there is damaged.
    """
    observer = observer or Silent()
    for cell in cells:
        claim_folder(cell.config, cell.out)
    speeds: dict[tuple[object, ...], Speed] = {}
    makers: dict[str, Cell] = {}
    studies: list[StudyForecast] = []
    for cell in cells:
        if (kind := _kind(cell.config)) not in speeds:
            most = max(each.config.n_prompts for each in cells if _kind(each.config) == kind)
            with threads(cell.config.threads):
                speeds[kind] = calibrate(cell.config, most, observer)
        studies.append(_study(cell, speeds[kind], makers))
    return Forecast(out, tuple(studies), at_once)


def stages_at_once(config: StudyConfig, workers: int | None) -> int:
    """How many stages a cluster on this machine runs at the same time.

    Args:
        config: of one of the studies.
        workers: processor cores that it may use; None is all.
    """
    return max(1, (workers or cpus()) // max(config.threads, 1))


def _kind(config: StudyConfig) -> tuple[object, ...]:
    """What speed depends on."""
    return config.model, config.task, config.counterfactual, config.device, config.dtype, config.threads, config.loss


def _study(cell: Cell, speed: Speed, makers: dict[str, Cell]) -> StudyForecast:
    config, stages = cell.config, build_plan(cell.config)
    found: list[StageForecast] = []
    for stage in stages:
        left = remaining(config, stage, cell.out)
        is_maker = makers.setdefault(stage_key(config, stage), cell) is cell
        state = left.state if is_maker or left.state != "nothing" else SHARED
        seconds = {} if state in ("made", SHARED) else stage_seconds(left, config, speed)
        is_counted = is_maker or state == "partly"
        disk = sum(stage_bytes(stage, config, speed)) if is_counted else 0
        found.append(StageForecast(left, state, seconds, disk, _size(cell.out / stage.folder) if is_counted else 0))
    is_finished = (cell.out / SUMMARY).is_file() and all(each.state == "made" for each in found)
    ending = report_seconds(config, len(stages), speed)
    return StudyForecast(cell, speed, tuple(found), {} if is_finished else ending, report_bytes(config, stages))


def _study_document(study: StudyForecast) -> dict[str, Any]:
    config = study.cell.config
    return {
        "name": study.cell.name,
        "folder": str(study.cell.out),
        "model": config.model,
        "task": config.task,
        "keep": config.keep,
        "calibration": asdict(study.speed),
        "stages": [stage.document() for stage in study.stages],
        "ending": {name: asdict(each) for name, each in study.ending.items()},
        "seconds": asdict(study.seconds),
        "memory_bytes": study.memory,
        "disk_bytes": study.disk,
    }


def _size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
