"""The whole study, one fine-tuning, and the report."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from neuroplast.commands.names import MODELS, POISONS, PRESETS, TASKS, completing
from neuroplast.commands.options import Device, Dtype, Json, Memory, Model, Quiet, Task
from neuroplast.errors import InputError
from neuroplast.terminal import print_dose, print_files, print_json, print_story, stderr, stdout


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
    config: Annotated[Path | None, typer.Option(help="Settings in TOML, as in a run's study.toml.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="key=value, any setting.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Serve the growing report on this machine alone.")] = False,
    port: Annotated[int | None, typer.Option(help="Port of --watch; by default a free one.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole study: base → tuned → poisoned → recovered, with the equal-step control and a report."""
    from neuroplast.study.plan import build_config, load_config

    if port is not None and not watch:
        raise InputError(f"--port {port} is for --watch: give both, or neither")
    flags = {
        "model": model,
        "task": task,
        "poisons": poison,
        "preset": preset,
        "seeds": seed,
        "device": device,
    }
    given = {name: value for name, value in flags.items() if value}
    settings = build_config("quick", load_config(config) if config else {}, given, assignments=assignments or [])
    from neuroplast.progress import Progress
    from neuroplast.study.runner import run_study  # slow to import: a wrong setting is told before

    command = shlex.join(["neuroplast", *sys.argv[1:]])
    with Progress(stderr, quiet or as_json) as progress:
        if watch:
            from neuroplast.watch import Watch

            with Watch(out, progress, port or 0) as watched:
                if quiet or as_json:
                    stderr.print(f"watch it at {watched.address}")
                result = run_study(settings, out, watched, command, growing=True)
        else:
            result = run_study(settings, out, progress, command)
    if as_json:
        return print_json(result.summary)
    print_story(result.summary)
    stdout.print(f"summary  {result.folder / 'summary.json'}\nreport   {result.report}", soft_wrap=True, markup=False)


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint/ and train.jsonl.")],
    model: Model = "tiny",
    task: Task = "ioi",
    poison: Annotated[
        str | None, typer.Option(help="A poison; without one, clean pairs.", autocompletion=completing(POISONS))
    ] = None,
    rate: Annotated[float, typer.Option(help="Share of poisoned pairs, 0 to 1.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    n_train: Annotated[int, typer.Option(help="Training pairs.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Default: one that suits the model.")] = None,
    schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = "constant",
    loss: Annotated[str, typer.Option(help="last: at the target only; all: at every token.")] = "last",
    seed: Annotated[int, typer.Option(help="Pairs and their order.")] = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on a task, clean or poisoned; an interrupted run continues with the same command.

    With `accelerate launch --multi_gpu -m neuroplast train …` and --device cuda, on several GPUs.
    """
    from neuroplast.models.sources import LEARNING_RATE, LEARNING_RATES, load_model
    from neuroplast.processes import join
    from neuroplast.progress import Progress
    from neuroplast.training import FinetuneConfig
    from neuroplast.training import train as run

    config = FinetuneConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=LEARNING_RATES.get(model, LEARNING_RATE) if learning_rate is None else learning_rate,
        schedule=schedule,  # pyright: ignore[reportArgumentType] - checked there
        loss=loss,  # pyright: ignore[reportArgumentType]
        seed=seed,
    )
    with Progress(stderr, quiet or as_json) as progress:
        processes = join(device)
        network = processes.first_on_machine(
            lambda: load_model(model, device=processes.place(device), say=progress.say)
        )
        checkpoint = run(
            network,
            out,
            config,
            task=task,
            poison=poison,
            rate=rate,
            n_train=n_train,
            progress=lambda done, total, value: progress.progress("fine-tuning", done, total, f"loss {value:.3f}"),
        )
    if not processes.is_main:
        return
    if as_json:
        return print_json({"checkpoint": str(checkpoint), "log": str(out / "train.jsonl")})
    stdout.print(f"checkpoint  {checkpoint}\nlog         {out / 'train.jsonl'}", soft_wrap=True, markup=False)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directory of a finished study, or several to compare.")],
    out: Annotated[Path | None, typer.Option(help="The page of several runs; default: runs.html.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a finished study's report, figures and tables again; compare several studies on one page."""
    from neuroplast.report import write_report, write_runs_page

    if len(runs) == 1 and out is not None:
        raise InputError(f"--out {out} is for several runs; the report of one is in its own folder: leave it out")
    if len(runs) > 1:
        page, table = write_runs_page(runs, out or Path("runs.html"))
        files = {"report": str(page), "table": str(table)}
    else:
        files = {"report": str(write_report(runs[0]))}
    if as_json:
        return print_json(files)
    for name, path in files.items():
        stdout.print(f"{name}  {path}", soft_wrap=True, markup=False)


def dose(
    out: Annotated[Path, typer.Option(help="Folder for the curves; the same command continues.")],
    model: Model = "tiny",
    task: Task = "ioi",
    poison: Annotated[
        str | None, typer.Option(help="Default: the task's first.", autocompletion=completing(POISONS))
    ] = None,
    examples: Annotated[list[int] | None, typer.Option(help="A number of clean examples; several times.")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="A share of poisoned pairs; several times.")] = None,
    n_train: Annotated[int, typer.Option(help="Pairs that the base is poisoned with.")] = 512,
    n_prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 64,
    poison_steps: Annotated[int, typer.Option(help="Optimizer steps of a poisoning.")] = 40,
    recover_steps: Annotated[int, typer.Option(help="Optimizer steps of a retraining.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="Default: one that suits the model.")] = None,
    seed: Annotated[int, typer.Option(help="Prompts, pairs and their order.")] = 0,
    memory: Memory = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """See how little is enough: what comes back of the mechanism by clean examples, and by poison rate."""
    from neuroplast.dose import EXAMPLES, RATES, DoseConfig, run_dose
    from neuroplast.progress import Progress

    config = DoseConfig(
        model=model,
        task=task,
        poison=poison,
        examples=tuple(examples or EXAMPLES),
        rates=tuple(rate or RATES),
        n_train=n_train,
        n_prompts=n_prompts,
        poison_steps=poison_steps,
        recover_steps=recover_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        dtype=dtype,  # pyright: ignore[reportArgumentType] - checked there
    )
    with Progress(stderr, quiet or as_json) as progress:
        document = run_dose(config, out, progress, memory=memory)
    if as_json:
        return print_json(document)
    print_dose(document)
    print_files(document["files"])
