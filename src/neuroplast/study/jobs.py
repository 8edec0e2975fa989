"""Jobs: the stages of one or many studies as a graph, run in its order by whoever is given.

A job is one stage of one run directory, or the end of a study. It is ready when the stages that it is made from are
made. Who runs it, this process or a cluster, changes neither files nor numbers. A study that fails does not stop the
others.

Stages that several studies have in common (base, tuned and the clean controls do not know the poison, nor its rate) are
made once; the others take the files over, as links where the disk can.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from neuroplast.errors import NeuroplastError, named_line
from neuroplast.locks import allow_locks, writing
from neuroplast.observer import Observer
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


@dataclass(frozen=True, eq=False)
class Job:
    """One stage of a cell, or its end; each is its own."""

    cell: Cell
    """The study."""
    stage: str | None
    """The stage's id; None is what comes after the last."""
    like: Path | None = None
    """A run directory in which the very stage is made, so that it can be taken over."""

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

    def needs(self, stage_id: str, key: str) -> bool:
        """Whether it still has to make, or take over, such a stage."""
        return self.error is None and self.keys.get(stage_id) == key and stage_id not in self.made


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
    total = sum(len(each.stages) + 1 for each in progress)
    running: dict[Job, _Progress] = {}
    made_at: dict[str, Path] = {}
    done = 0
    allow_locks(len(cells))
    with ExitStack() as stack:
        for each in progress:
            try:
                claim_folder(each.cell.config, each.cell.out)
                stack.enter_context(writing(each.cell.out))
            except NeuroplastError as error:
                each.error = error
                observer.say(f"{each.cell.name}: {error}")
        while True:
            for mine, job in _ready(progress, made_at, running):
                try:
                    backend.submit(job)
                    running[job] = mine
                except NeuroplastError as error:
                    mine.error = error
                    observer.say(str(error))
            if not running:
                return {each.cell.name: each.error for each in progress if each.error is not None}
            observer.stage(backend.status(), done, total)
            ended = backend.wait()
            mine = running.pop(ended.job)
            done += 1
            for line in (*ended.said, *([str(ended.error)] if ended.error else ())):
                observer.say(f"{ended.job.cell.name}: {line}")
            try:
                _take(mine, ended, made_at, progress)
            except (NeuroplastError, OSError) as error:
                mine.error = _told(error)
                observer.say(f"{ended.job.cell.name}: {mine.error}")


def _begin(cell: Cell) -> _Progress:
    stages = build_plan(cell.config)
    return _Progress(cell, stages, {stage.id: stage_key(cell.config, stage) for stage in stages})


def _take(mine: _Progress, done: Done, made_at: dict[str, Path], progress: Sequence[_Progress]) -> None:
    """Notes a job that has ended."""
    stage_id = done.job.stage
    if done.error is not None or stage_id is None:
        mine.error = done.error or mine.error
        return
    key = mine.keys[stage_id]
    mine.made.append(stage_id)
    made_at.setdefault(key, mine.cell.out)
    load_manifest(mine.cell.out).gather(mine.stages)
    awaited = {own for each in progress for name, own in each.keys.items() if each.needs(name, own)}
    for each in progress:  # whoever has it made may have kept it for this one
        if each.error is None and each.keys.get(stage_id) == key and stage_id in each.made:
            spared = [name for name, own in each.keys.items() if own in awaited]
            prune_checkpoints(each.cell.out, each.cell.config, each.stages, each.made, spared=spared)


def _ready(
    progress: Sequence[_Progress], made_at: Mapping[str, Path], running: Mapping[Job, _Progress]
) -> Iterator[tuple[_Progress, Job]]:
    """Jobs that can begin; of a stage that several have in common one at a time, the first of which makes it."""
    for each in progress:
        if each.error is not None:
            continue
        for stage in each.stages:
            if stage.id in each.begun or not set(stage.needs) <= set(each.made):
                continue
            key = each.keys[stage.id]
            if any(job.stage == stage.id and other.keys[stage.id] == key for job, other in running.items()):
                continue
            each.begun.add(stage.id)
            yield each, Job(each.cell, stage.id, made_at.get(key))
        if None not in each.begun and len(each.made) == len(each.stages):
            each.begun.add(None)
            yield each, Job(each.cell, None)


def stage_key(config: StudyConfig, stage: Stage) -> str:
    """What a stage's files depend on: stages of several studies that have it in common are made once.

    Args:
        config: the study's settings.
        stage: the stage.
    """
    settings = config.model_dump()
    if stage.poison is None and stage.recipe != SHUFFLED:
        settings = {name: value for name, value in settings.items() if name not in OF_POISON}
    return json.dumps([stage.id, settings], sort_keys=True)


def _told(error: Exception) -> NeuroplastError:
    """What a machine or a model did, as one of ours."""
    return error if isinstance(error, NeuroplastError) else NeuroplastError(named_line(error))


class Worker:
    """Runs jobs in this process; keeps the last study at hand."""

    def __init__(self, observer: Observer, command: str) -> None:
        """Tells an observer how it goes; the command line is for the manifests."""
        self._observer, self._command = observer, command
        self._open: tuple[str, StageRunner] | None = None

    def run(self, config: StudyConfig, out: Path, stage_id: str | None, like: Path | None) -> NeuroplastError | None:
        """Runs a job.

        Args:
            config: the study's settings.
            out: its run directory.
            stage_id: the stage; None for what comes after the last.
            like: a run directory to take the stage from.

        Returns:
            Why it failed; None where it did not.
        """
        try:
            with threads(config.threads):
                runner = self._runner(config, out, stage_id == "base")
                if stage_id is None:
                    finish_study(runner)
                else:
                    runner.run(runner.context.stage(stage_id), like)
        except (NeuroplastError, *EXPECTED) as error:
            return _told(error)
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
        return Done(job, error=self._worker.run(job.cell.config, job.cell.out, job.stage, job.like))

    def _next(self) -> Job:
        return next((job for job in self._jobs if job.cell is self._last), self._jobs[0])
