"""What there is to work with: named models and tasks."""

from rich.markup import escape

from neuroplast.commands.options import Json, Quiet
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


def tasks(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the tasks with their counterfactuals and poisons."""
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
