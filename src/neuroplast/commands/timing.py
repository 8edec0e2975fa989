"""What everything takes on this machine."""

import os
from pathlib import Path
from typing import Annotated

import typer

from neuroplast.commands.names import ROWS, completing
from neuroplast.commands.options import Device, Json, Model, Quiet
from neuroplast.errors import InputError
from neuroplast.storage import nearest_folder
from neuroplast.terminal import print_bench, print_json, stderr, stdout


def bench(
    model: Model = "tiny",
    prompts: Annotated[int, typer.Option(help="Prompts of a row; some rows take fewer.")] = 64,
    repeats: Annotated[int, typer.Option(help="Rounds; the rows that take long are in the first alone.")] = 3,
    row: Annotated[
        list[str] | None,
        typer.Option(
            help="A row, such as heads-to-logits; several times. Default: all.", autocompletion=completing(ROWS)
        ),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time the same by other means, too.")] = True,
    out: Annotated[Path | None, typer.Option(help="A file for the table as JSON, to compare with later.")] = None,
    against: Annotated[Path | None, typer.Option(help="An earlier such file: how the times compare with it.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time everything on this machine: against the arithmetic that it needs, and against TransformerLens."""
    if out is not None and out.is_dir():
        raise InputError(f"--out {out} is a folder; expected a file, such as {out / 'bench.json'}")
    if out is not None and not os.access(nearest_folder(out.parent), os.W_OK):
        raise InputError(f"--out {out} cannot be written there; choose another")
    from neuroplast.bench import BenchConfig, run_bench
    from neuroplast.bench.document import compare, load_document
    from neuroplast.progress import Progress
    from neuroplast.storage import write_json

    config = BenchConfig(
        model=model, prompts=prompts, repeats=repeats, rows=tuple(row or ()), peers=peers, device=device
    )
    then = None if against is None else load_document(against)
    with Progress(stderr, quiet or as_json) as progress:
        document = run_bench(config, progress)
    if out is not None:
        write_json(out, document)
    if then is not None:
        document["against"] = compare(document, then, str(against))
    (print_json if as_json else print_bench)(document)
    if out is not None and not as_json:
        stdout.print(f"table  {out}", soft_wrap=True, markup=False)
