"""What there is to work with: named models and tasks, and files of one's own records."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from neuroplast.commands.names import MODELS, completing
from neuroplast.commands.options import Json, Quiet
from neuroplast.errors import InputError
from neuroplast.terminal import build_table, print_json, stdout


def models(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the named models and whether they are at hand."""
    from neuroplast.models.sources import list_models

    rows = list_models()
    if as_json:
        return print_json([vars(row) for row in rows])
    table = build_table("model", "what", "at hand", "where")
    for row in rows:
        table.add_row(row.name, row.description, "yes" if row.cached else "no", escape(row.location))
    stdout.print(table)
    stdout.print("Any Hugging Face hub id or local folder of a causal language model works as well.")


def tasks(
    check: Annotated[
        Path | None, typer.Option(help="Look at a JSONL file of your own records: all that is wrong, or what it has.")
    ] = None,
    mib: Annotated[Path | None, typer.Option(help="Write the IOI prompts of the benchmark MIB to this JSONL.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="--check: whose tokenizer they have to fit. --mib: write only those that do.",
            autocompletion=completing(MODELS),
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="--mib: train (default), validation or test.")] = None,
    counterfactual: Annotated[
        str | None, typer.Option(help="--mib: s2_io_flip (default), abc, random_names, s1_io_flip, …")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="--mib: a folder with a copy of the data set; default: the hub.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the tasks with their counterfactuals and poisons; check or write a JSONL file of records."""
    of_mib: dict[str, Any] = {"split": split, "counterfactual": counterfactual, "source": source}
    given = {name: value for name, value in of_mib.items() if value is not None}
    if check is not None and mib is not None:
        raise InputError("--check reads a file and --mib writes one: give one of them")
    if mib is None and given:
        raise InputError(f"--{next(iter(given))} is for --mib: give the file to write, or leave it out")
    if check is not None:
        return _check(check, model, as_json)
    if mib is not None:
        return _write_mib(mib, model, given, as_json)
    if model is not None:
        raise InputError("--model is for --check and --mib: give a file, or leave it out")
    _list_tasks(as_json)


def _list_tasks(as_json: bool) -> None:
    from neuroplast.tasks import TASKS

    rows = [
        {
            "name": task.name,
            "description": task.description,
            "positions": task.positions,
            "counterfactuals": task.counterfactuals,
            "poisons": task.poisons,
        }
        for task in TASKS.values()
    ]
    if as_json:
        return print_json(rows)
    table = build_table("task", "what", "positions", "counterfactuals", "poisons")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else "\n".join(value) for value in row.values()))
    stdout.print(table)
    stdout.print("A JSONL file of your own records is a task as well; `--check FILE` looks at one.")


def _check(path: Path, model: str | None, as_json: bool) -> None:
    from neuroplast.tasks.check import check_file

    tokenizer, context = (None, None) if model is None else _tokenizer_of(model)
    found = check_file(path, tokenizer, context)
    if as_json:
        print_json({"model": model} | found.document())
    else:
        for line in found.lines():
            stdout.print(line, soft_wrap=True, markup=False)
        if not found.problems:
            stdout.print(found.summary(), soft_wrap=True, markup=False)
            said = f"All fit {model}." if model else "Whether they fit a model's tokenizer: --model NAME."
            stdout.print(said, markup=False)
    if n := len(found.problems):
        raise InputError(f"{path} has {n} problem{'s' if n > 1 else ''}: mend {'them' if n > 1 else 'it'}")


def _write_mib(path: Path, model: str | None, given: dict[str, Any], as_json: bool) -> None:
    from neuroplast.tasks.mib import load_mib_ioi
    from neuroplast.tasks.prompts import keep_fitting
    from neuroplast.tasks.records import save_records

    if path.exists():
        raise InputError(f"{path} exists: choose another name, or remove it")
    records = load_mib_ioi(**given)
    kept = records if model is None else keep_fitting(_tokenizer_of(model)[0], records)
    if not kept:
        raise InputError(f"none of MIB's {len(records)} prompts fits the tokenizer of {model}: choose another model")
    save_records(path, kept)
    if as_json:
        return print_json({"file": str(path), "records": len(kept), "left_out": len(records) - len(kept)})
    left_out = f"; {len(records) - len(kept)} do not fit {model}" if model else ""
    stdout.print(f"{path}: {len(kept)} records of MIB{left_out}", soft_wrap=True, markup=False)


def _tokenizer_of(name: str) -> tuple[Any, int | None]:
    """A model's tokenizer, and the most tokens that it takes."""
    from neuroplast.models.network import context_of
    from neuroplast.models.sources import load_model

    model = load_model(name)
    return model.tokenizer, context_of(model.module)
