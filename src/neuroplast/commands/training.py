"""One fine-tuning, the report, and doses."""

from pathlib import Path
from typing import Annotated

import typer

from neuroplast.commands.names import POISONS, completing
from neuroplast.commands.options import Device, Dtype, Json, Memory, Model, Quiet, Task
from neuroplast.errors import InputError
from neuroplast.terminal import print_dose, print_files, print_json, stderr, stdout


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
            say=progress.say,
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
