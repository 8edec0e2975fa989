"""The whole study, one or a grid of them, here or on a cluster."""

import shlex
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuroplast.commands.names import MODELS, POISONS, PRESETS, TASKS, completing
from neuroplast.commands.options import Json, Quiet
from neuroplast.errors import InputError, NeuroplastError, unknown_name
from neuroplast.observer import Observer
from neuroplast.terminal import print_grid, print_json, print_plan, print_story, stderr, stdout

if TYPE_CHECKING:
    from neuroplast.study.jobs import Backend, Cell
    from neuroplast.study.plan import StudyConfig

INLINE, RAY = "inline", "ray"


def study(
    out: Annotated[Path, typer.Option(help="Run directory; the same command continues an interrupted run.")],
    model: Annotated[
        str | None,
        typer.Option(help="tiny, smollm2-135m, a hub id, or a local folder.", autocompletion=completing(MODELS)),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="The task, or a JSONL file of your own; see `neuroplast tasks`.", autocompletion=completing(TASKS)
        ),
    ] = None,
    poison: Annotated[
        list[str] | None,
        typer.Option(help="A poison; may be given several times.", autocompletion=completing(POISONS)),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="smoke (seconds), quick (default) or paper.", autocompletion=completing(PRESETS)),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="A seed; may be given several times.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Settings in TOML, as in a run's study.toml; with a table [grid], many studies.")
    ] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, any setting.")] = None,
    backend: Annotated[
        str, typer.Option(help="inline, or ray: on a Ray cluster.", autocompletion=completing((INLINE, RAY)))
    ] = INLINE,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster that is up, such as auto; else one starts here.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Cores of the Ray cluster that starts here.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what it would take and what is there already; write nothing.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Serve the growing report on this machine alone.")] = False,
    port: Annotated[int | None, typer.Option(help="Port of --watch; by default a free one.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole study: base → tuned → poisoned → recovered, with the equal-step control and a report."""
    from neuroplast.study.grid import is_grid
    from neuroplast.study.plan import build_config, load_config

    if backend not in (INLINE, RAY):
        raise unknown_name("backend", backend, (INLINE, RAY))
    for name, value in (("address", address), ("workers", workers)):
        if value is not None and backend != RAY:
            raise InputError(f"--{name} {value} is for --backend ray: give both, or neither")
    if port is not None and not watch:
        raise InputError(f"--port {port} is for --watch: give both, or neither")
    flags = {"model": model, "task": task, "poisons": poison, "preset": preset, "seeds": seed, "device": device}
    given = {name: value for name, value in flags.items() if value}
    document = load_config(config) if config else {}
    if watch and (backend == RAY or is_grid(document)):
        raise InputError("--watch is for one study that runs inline: leave it out")
    if watch and plan:
        raise InputError("--plan runs nothing that could be watched: leave --watch out")
    chosen = _Chosen(backend, address, workers, as_json, quiet)
    if is_grid(document):
        return _run_grid(document, out, given, assignments or [], chosen, plan)
    # One thread a stage: then it rounds the same on every node.
    below = {"threads": 1} if backend == RAY else {}
    settings = build_config("quick", below, document, given, assignments=assignments or [])
    if plan:
        return _plan(_alone(settings, out), out, chosen)
    if backend == RAY:
        summary = _run_on_cluster(settings, out, chosen)
    else:
        summary = _run(settings, out, chosen, watch, port or 0)
    if as_json:
        return print_json(summary)
    print_story(summary)
    stdout.print(f"summary  {out / 'summary.json'}\nreport   {out / 'report.html'}", soft_wrap=True, markup=False)


class _Chosen:
    """Where stages run, and what is told."""

    def __init__(self, backend: str, address: str | None, workers: int | None, as_json: bool, quiet: bool) -> None:
        self.backend, self.address, self.workers = backend, address, workers
        self.as_json, self.is_quiet = as_json, quiet or as_json
        self.command = shlex.join(["neuroplast", *sys.argv[1:]])

    @contextmanager
    def connect(self, observer: Observer) -> "Generator[Backend]":
        """Gives the backend."""
        if self.backend == RAY:
            from neuroplast.study.cluster import Cluster

            with Cluster(observer, self.command, self.address, self.workers) as cluster:
                yield cluster
        else:
            from neuroplast.study.jobs import Inline

            yield Inline(observer, self.command)


def _run(settings: "StudyConfig", out: Path, chosen: _Chosen, watch: bool, port: int) -> dict[str, Any]:
    from neuroplast.progress import Progress
    from neuroplast.study.runner import run_study  # slow to import: a wrong setting is told before

    with Progress(stderr, chosen.is_quiet) as progress:
        if not watch:
            return run_study(settings, out, progress, chosen.command).summary
        from neuroplast.watch import Watch

        with Watch(out, progress, port) as watched:
            if chosen.is_quiet:
                stderr.print(f"watch it at {watched.address}")
            return run_study(settings, out, watched, chosen.command, growing=True).summary


def _run_on_cluster(settings: "StudyConfig", out: Path, chosen: _Chosen) -> dict[str, Any]:
    from neuroplast.progress import Progress
    from neuroplast.storage import load_json
    from neuroplast.study.jobs import run_cells

    with Progress(stderr, chosen.is_quiet) as progress, chosen.connect(progress) as backend:
        failed = run_cells(_alone(settings, out), backend, progress)
    for error in failed.values():
        raise error
    return load_json(out / "summary.json")


def _alone(settings: "StudyConfig", out: Path) -> "Sequence[Cell]":
    """One study as those of a grid are."""
    from neuroplast.study.jobs import Cell

    return [Cell(out.name, settings, out)]


def _plan(cells: "Sequence[Cell]", out: Path, chosen: _Chosen) -> None:
    from neuroplast.progress import Progress
    from neuroplast.study.forecast import forecast, stages_at_once

    at_once = 1
    if chosen.backend == RAY and not chosen.address:
        at_once = stages_at_once(cells[0].config, chosen.workers)
    with Progress(stderr, chosen.is_quiet) as progress:
        document = forecast(cells, out, progress, at_once=at_once).document()
    if chosen.as_json:
        print_json(document)
    else:
        print_plan(document)


def _run_grid(
    document: Mapping[str, Any],
    out: Path,
    given: Mapping[str, Any],
    assignments: list[str],
    chosen: _Chosen,
    plan: bool,
) -> None:
    from neuroplast.progress import Progress
    from neuroplast.storage import is_begun
    from neuroplast.study.grid import PAGE, RESULT, SETTINGS, build_grid, run_grid, write_grid

    grid = build_grid(document, out, given, assignments)
    if plan:
        is_begun(out, SETTINGS, "grid")
        return _plan(grid.cells, out, chosen)
    with Progress(stderr, chosen.is_quiet) as progress, chosen.connect(progress) as backend:
        result = run_grid(grid, out, backend, progress)
    if chosen.as_json:
        print_json(result)
    else:
        print_grid(result)  # first: the disk may be what the cells failed on
    write_grid(grid, out, result)
    if not chosen.as_json:
        page = f"\npage    {out / PAGE}" if (out / PAGE).is_file() else ""
        stdout.print(f"result  {out / RESULT}{page}", soft_wrap=True, markup=False)
    if n := result["n_failed"]:
        raise NeuroplastError(f"{n} of {result['n_cells']} cells failed; the same command tries them again")
