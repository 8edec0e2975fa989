"""Runs jobs on a Ray cluster: this machine's, or one that is up already, whose nodes share the folder of the runs.

Each job is a Ray task that says what it needs: processor cores (the setting `threads`), a GPU where the study asks for
one, and memory, by the size of the model. A task whose worker is lost is tried again, elsewhere if need be, and goes on
from the stage's last save. What goes through Ray is text: the settings, the folder, the stage's name, and a line about
how it went.
"""

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from neuroplast import errors
from neuroplast.errors import InputError, NeuroplastError, first_line, named_line
from neuroplast.memory import reuse_freed_memory, show_size
from neuroplast.observer import Observer, Silent
from neuroplast.study.jobs import FINISH, Done, Job, Worker
from neuroplast.study.plan import StudyConfig

RETRIES = 3
"""Times that a task is tried again after its worker was lost."""
STORE = 100 * 2**20
"""Bytes of a local cluster's object store: only lines of text go through it."""
ANSWER = 10.0
"""Seconds in which the head of a cluster has to answer."""
LOOK = 1.0
"""Seconds between looks at what runs."""
WEIGHTS_HELD, BESIDE = 5, 2**30
"""A stage holds its weights so many times over (a model, its gradients, two moments, a copy), and so much beside."""


class _Lines(Silent):
    """Collects what a worker would say."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Keeps the line."""
        self.lines.append(line)


@lru_cache(maxsize=1)
def _worker(command: str) -> tuple[Worker, _Lines]:
    """This process's worker; it outlives a task, so that the next one finds the model's library loaded."""
    reuse_freed_memory()
    lines = _Lines()
    return Worker(lines, command), lines


def run_job(
    settings: str, out: str, stage_id: str | None, like: str | None, command: str, folder: str
) -> tuple[list[str], list[str]]:
    """Runs a job in a worker's process; see `Worker.run`.

    Args:
        settings: of the study, as JSON.
        out: its run directory.
        stage_id: the stage; None for what comes after the last.
        like: a run directory to take the stage from.
        command: the command line, for the manifest.
        folder: where the driver is: models and tasks may be paths relative to it.

    Returns:
        What was said; the kind and the message of the error that it failed with, or nothing.
    """
    with suppress(OSError):  # a node without it has models of the hub, say
        os.chdir(folder)
    worker, lines = _worker(command)
    error = worker.run(StudyConfig.model_validate_json(settings), Path(out), stage_id, Path(like) if like else None)
    said, lines.lines = lines.lines, []
    return said, [] if error is None else [type(error).__name__, str(error)]


class Cluster:
    """A backend that hands jobs to Ray; connected while it is entered."""

    def __init__(
        self, observer: Observer, command: str, address: str | None = None, workers: int | None = None
    ) -> None:
        """Knows where the cluster is.

        Args:
            observer: is told what has to wait.
            command: the command line, for the manifests.
            address: of a cluster that is up, such as `auto` or `10.0.0.1:6379`; None starts one on this machine.
            workers: processor cores that a cluster on this machine may use; None is all.

        Raises:
            InputError: Ray is not installed, or both an address and workers are given.
        """
        if address and workers:
            raise InputError(f"--workers {workers} is for a cluster on this machine: leave it out with --address")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Else Ray warns of how a later version will hide the GPUs from a task that asks for none.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise InputError("--backend ray needs the ray package: pip install 'neuroplast[ray]'") from error
        self._ray: Any = ray
        self._observer, self._command = observer, command
        self._address, self._workers = address, workers
        self._running: dict[Any, Job] = {}
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        if self._address:
            _require_answer(self._address)
        local = {"num_cpus": self._workers, "include_dashboard": False, "object_store_memory": STORE}
        try:
            self._ray.init(
                address=self._address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if self._address else local),
            )
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            where = f"at {self._address!r}" if self._address else "on this machine"
            raise InputError(f"no Ray cluster {where}: {first_line(error)}") from error
        self._task = self._ray.remote(run_job)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()

    def submit(self, job: Job) -> None:
        """Hands a job over; one that no node can take waits for a node that can, which is said."""
        config = job.cell.config
        if config.device not in ("cpu", "cuda", "cuda:0"):  # a task sees no other GPU than its own
            raise InputError(f"{job.name}: device {config.device!r} is one of many; use cuda, and each stage takes one")
        needs = resources(config, job.cell.out)
        self._tell_what_waits(job, needs)
        options = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "memory": needs["memory"]}
        task = self._task.options(name=job.name, max_retries=RETRIES, **options).remote(
            config.model_dump_json(),
            str(job.cell.out.resolve()),
            job.stage,
            str(job.like.resolve()) if job.like else None,
            self._command,
            str(Path.cwd()),
        )
        self._running[task] = job

    def status(self) -> str:
        """The job that was handed over first, and how many more were."""
        first, *others = (job.name for job in self._running.values())
        return f"{first}, and {len(others)} more" if others else first

    def wait(self) -> Done:
        """The next job that ends."""
        ready: Sequence[Any] = ()
        while not ready:
            ready, _ = self._ray.wait(list(self._running), timeout=LOOK)
        job = self._running.pop(ready[0])
        try:
            said, failed = self._ray.get(ready[0])
        except self._ray.exceptions.RayError as lost:
            # What a program error says stands behind Ray's own; a worker that was lost has none.
            cause = getattr(lost, "cause", None)
            why = named_line(cause) if cause else first_line(lost)
            return Done(job, error=NeuroplastError(f"{job.stage or FINISH} could not be run: {why}"))
        error = getattr(errors, failed[0], NeuroplastError)(failed[1]) if failed else None
        return Done(job, said, error)

    def _tell_what_waits(self, job: Job, needs: dict[str, int]) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
            return
        words = f"{needs['CPU']} cores, {needs['GPU']} GPUs and {show_size(needs['memory'])} of memory"
        if not self._address:
            raise InputError(f"{job.name} needs {words}, which this machine does not have; give it --address")
        if words not in self._told:
            self._told.add(words)
            self._observer.say(f"{job.name} needs {words}, which no node has: it waits for one")


def _require_answer(address: str) -> None:
    """Knocks: Ray itself would try for minutes."""
    where = urlsplit(address if "//" in address else f"//{address}")
    try:
        if address not in ("auto", "local"):
            socket.create_connection((where.hostname, where.port or 0), timeout=ANSWER).close()
    except (OSError, ValueError) as error:
        raise InputError(f"no Ray cluster at {address!r}: {error}; expected auto, or HOST:PORT of its head") from error


def resources(config: StudyConfig, out: Path) -> dict[str, int]:
    """What a stage needs, in Ray's words.

    Args:
        config: the study's settings.
        out: its run directory; base's checkpoint, or the model's own folder, tells the memory.
    """
    sizes = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (out / "stages/base/checkpoint", Path(config.model))
    ]
    return {
        "CPU": max(config.threads, 1),
        "GPU": int(config.device.startswith("cuda")),
        "memory": WEIGHTS_HELD * max(sizes) + BESIDE,
    }
