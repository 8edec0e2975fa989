"""Jobs: the stages of one or many studies as a graph, run in its order by whoever is given.

A job is one stage of one run directory, or the end of a study. It is ready when the stages that it is made from are
made. Who runs it, this process or a cluster, changes neither files nor numbers. A study that fails does not stop the
others.

Stages that several studies have in common (base, tuned and the clean controls do not know the poison, nor its rate) are
made once; the others take the files over, as links where the disk can.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from neuroplast.errors import NeuroplastError, first_line
from neuroplast.locks import writing
from neuroplast.observer import Observer
from neuroplast.storage import FORMER, LOCK, PARTIAL
from neuroplast.study.artefacts import pairs_file
from neuroplast.study.manifest import load_manifest
from neuroplast.study.outcome import finish_study
from neuroplast.study.plan import SHUFFLED, Stage, StudyConfig, build_plan
from neuroplast.study.pruning import prune_checkpoints
from neuroplast.study.runner import begin_study, claim_folder, open_study, threads
from neuroplast.study.stage_runner import StageRunner

OF_POISON = ("poisons", "rate", "poison_steps")
"""Settings that a stage which was never poisoned does not depend on."""
FINISH = "summary and report"
EXPECTED = (RuntimeError, OSError, MemoryError)
"""What a machine or a model can do to a stage; anything else is a fault of this program."""


@dataclass(frozen=True)
class Cell:
    """One study of those that run together."""

    name: str
    """What it is called."""
    config: StudyConfig
    """Its settings."""
    out: Path
    """Its run directory."""


@dataclass(frozen=True)
class Job:
    """One stage of a cell, or its end."""

    cell: Cell
    """The study."""
    stage: str | None
    """The stage's id; None is what comes after the last."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.cell.name}: {self.stage or FINISH}"


@dataclass(frozen=True)
class Done:
    """A job that has ended."""

    job: Job
    """Which."""
    said: Sequence[str] = ()
    """What was found on the way."""
    error: NeuroplastError | None = None
    """Why it failed."""


class Backend(Protocol):
    """Who runs jobs."""

    def submit(self, job: Job) -> None:
        """Takes a job that is ready."""
        ...

    def status(self) -> str:
        """What it is about, in a few words."""
        ...

    def wait(self) -> Done:
        """The next job that ends."""
        ...


@dataclass
class _Progress:
    """How far one cell is."""

    cell: Cell
    stages: tuple[Stage, ...]
    keys: Mapping[str, str]
    made: list[str] = field(default_factory=list[str])
    begun: set[str | None] = field(default_factory=set[str | None])
    error: NeuroplastError | None = None
    finished: bool = False


def run_cells(cells: Sequence[Cell], backend: Backend, observer: Observer) -> dict[str, NeuroplastError]:
    """Runs, or continues, several studies.

    Args:
        cells: the studies, each with a run directory of its own.
        backend: who runs the jobs.
        observer: is told how it goes.

    Returns:
        By name, the cells that failed, and why.
    """
    progress = [_begin(cell) for cell in cells]
    shared = _shared(progress)
    total = sum(len(each.stages) + 1 for each in progress)
    running: list[Job] = []
    done = 0
    with ExitStack() as stack:
        for each in progress:
            try:
                claim_folder(each.cell.config, each.cell.out)
                stack.enter_context(writing(each.cell.out))
            except NeuroplastError as error:
                each.error = error
                observer.say(f"{each.cell.name}: {error}")
        while True:
            for job in _ready(progress, shared):
                backend.submit(job)
                running.append(job)
            if not running:
                return {each.cell.name: each.error for each in progress if each.error is not None}
            observer.stage(backend.status(), done, total)
            ended = backend.wait()
            running.remove(ended.job)
            done += 1
            for line in (*ended.said, *([str(ended.error)] if ended.error else ())):
                observer.say(f"{ended.job.cell.name}: {line}")
            (mine,) = (each for each in progress if each.cell == ended.job.cell)
            _take(mine, ended)
            if ended.error is None and ended.job.stage is not None:
                for other in shared.get(mine.keys[ended.job.stage], ()):
                    if other is not mine:
                        _adopt(mine.cell.out, other.cell.out, ended.job.stage)
                prune_checkpoints(mine.cell.out, mine.cell.config, mine.stages, mine.made)


def _begin(cell: Cell) -> _Progress:
    stages = build_plan(cell.config)
    return _Progress(cell, stages, {stage.id: _key(cell.config, stage) for stage in stages})


def _take(progress: _Progress, done: Done) -> None:
    if done.error is not None:
        progress.error = done.error
    elif done.job.stage is None:
        progress.finished = True
    else:
        progress.made.append(done.job.stage)
        load_manifest(progress.cell.out).gather(progress.stages)


def _ready(progress: Sequence[_Progress], shared: dict[str, list[_Progress]]) -> Iterator[Job]:
    """Jobs that can begin; of a stage that several have in common, one at a time."""
    for each in progress:
        if each.error is not None or each.finished:
            continue
        for stage in each.stages:
            if stage.id in each.begun or not set(stage.needs) <= set(each.made):
                continue
            others = shared.get(each.keys[stage.id], ())
            if any(_is_making(other, stage.id) for other in others if other is not each):
                continue
            each.begun.add(stage.id)
            yield Job(each.cell, stage.id)
        if None not in each.begun and len(each.made) == len(each.stages):
            each.begun.add(None)
            yield Job(each.cell, None)


def _is_making(progress: _Progress, stage_id: str) -> bool:
    return progress.error is None and stage_id in progress.begun and stage_id not in progress.made


def _shared(progress: Sequence[_Progress]) -> dict[str, list[_Progress]]:
    """The cells that have a stage in common, by what it depends on."""
    found: dict[str, list[_Progress]] = {}
    for each in progress:
        for stage in each.stages:
            found.setdefault(each.keys[stage.id], []).append(each)
    return {key: cells for key, cells in found.items() if len(cells) > 1}


def _key(config: StudyConfig, stage: Stage) -> str:
    """Everything that a stage's files depend on."""
    settings = config.model_dump()
    if stage.poison is None and stage.recipe != SHUFFLED:
        settings = {name: value for name, value in settings.items() if name not in OF_POISON}
    return json.dumps([stage.id, settings], sort_keys=True)


def stage_key(config: StudyConfig, stage: Stage) -> str:
    """What a stage's files depend on: stages of several studies that have it in common are made once.

    Args:
        config: the study's settings.
        stage: the stage.
    """
    return _key(config, stage)


def _adopt(source: Path, target: Path, stage_id: str) -> None:
    """Takes over a stage that was made for another run; one that is begun already stays as it is."""
    into = target / "stages" / stage_id
    if into.is_dir() and any(entry.name != LOCK for entry in into.iterdir()):
        return
    temporary = into.with_name(into.name + PARTIAL)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(
        source / "stages" / stage_id,
        temporary,
        copy_function=_link,
        ignore=shutil.ignore_patterns(LOCK, f"*{PARTIAL}", f"*{FORMER}"),
    )
    pairs = pairs_file(source, stage_id)
    if pairs.is_file() and not pairs_file(target, stage_id).is_file():
        pairs_file(target, stage_id).parent.mkdir(exist_ok=True)
        _link(pairs, pairs_file(target, stage_id))
    shutil.rmtree(into, ignore_errors=True)
    temporary.rename(into)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for a file, which nobody changes in place; a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class Worker:
    """Runs jobs in this process; keeps the last study at hand."""

    def __init__(self, observer: Observer, command: str) -> None:
        """Tells an observer how it goes; the command line is for the manifests."""
        self._observer, self._command = observer, command
        self._open: tuple[str, StageRunner] | None = None

    def run(self, config: StudyConfig, out: Path, stage_id: str | None) -> NeuroplastError | None:
        """Runs a job.

        Args:
            config: the study's settings.
            out: its run directory.
            stage_id: the stage; None for what comes after the last.

        Returns:
            Why it failed; None where it did not.
        """
        try:
            with threads(config.threads):
                runner = self._runner(config, out, stage_id == "base")
                if stage_id is None:
                    finish_study(runner)
                else:
                    runner.run(runner.context.stage(stage_id))
        except NeuroplastError as error:
            return error
        except EXPECTED as error:
            return NeuroplastError(f"{type(error).__name__}: {first_line(error)}")
        return None

    def _runner(self, config: StudyConfig, out: Path, is_first: bool) -> StageRunner:
        if self._open is None or self._open[0] != str(out) or is_first:
            self._open = None
            begun = begin_study(config, out, self._observer, self._command) if is_first else None
            self._open = str(out), begun or open_study(config, out, self._observer)
        return self._open[1]


class Inline:
    """Runs jobs one after the other, in this process."""

    def __init__(self, observer: Observer, command: str) -> None:
        """Tells an observer how it goes; the command line is for the manifests."""
        self._worker = Worker(observer, command)
        self._jobs: list[Job] = []
        self._last: Cell | None = None

    def submit(self, job: Job) -> None:
        """Puts a job last."""
        self._jobs.append(job)

    def status(self) -> str:
        """The next job."""
        return self._next().name

    def wait(self) -> Done:
        """Runs the next job, of the study that is at hand if there is one."""
        job = self._next()
        self._jobs.remove(job)
        self._last = job.cell
        return Done(job, error=self._worker.run(job.cell.config, job.cell.out, job.stage))

    def _next(self) -> Job:
        return next((job for job in self._jobs if job.cell is self._last), self._jobs[0])
