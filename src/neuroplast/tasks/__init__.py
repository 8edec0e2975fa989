"""Tasks by name, or by the path of a JSONL file. A new one is one file with a `TASK`, and its place in `TASKS`."""

from neuroplast.errors import InputError, unknown_name
from neuroplast.tasks import agreement, greater_than, induction, ioi, pronouns
from neuroplast.tasks.check import check_file
from neuroplast.tasks.custom import is_custom, load_custom_task
from neuroplast.tasks.mib import load_mib_ioi
from neuroplast.tasks.prompts import PromptSet, build_prompt_set, keep_fitting
from neuroplast.tasks.records import Record, load_records, save_records
from neuroplast.tasks.task import Split, Task

__all__ = [
    "TASKS",
    "PromptSet",
    "Record",
    "Split",
    "Task",
    "agreement",
    "build_prompt_set",
    "check_file",
    "greater_than",
    "induction",
    "ioi",
    "keep_fitting",
    "load_mib_ioi",
    "load_records",
    "load_task",
    "pronouns",
    "save_records",
]

TASKS: dict[str, Task] = {each.TASK.name: each.TASK for each in (ioi, greater_than, induction, agreement, pronouns)}


def load_task(name: str) -> Task:
    """The task of that name, or of the JSONL file at that path.

    Raises:
        InputError: when there is none, the message suggesting the nearest; when the file is no task.
    """
    if is_custom(name):
        return load_custom_task(name)
    if name not in TASKS:
        raise InputError(f"{unknown_name('task', name, TASKS)}, or a file of records that ends in .jsonl")
    return TASKS[name]
