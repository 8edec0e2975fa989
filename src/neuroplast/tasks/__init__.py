"""Tasks by name. A new one is one file with a `TASK`, and its place in `TASKS`."""

from neuroplast.errors import unknown_name
from neuroplast.tasks import agreement, greater_than, induction, ioi, pronouns
from neuroplast.tasks.prompts import PromptSet, Record, build_prompt_set, load_records, save_records
from neuroplast.tasks.task import Split, Task

__all__ = [
    "TASKS",
    "PromptSet",
    "Record",
    "Split",
    "Task",
    "agreement",
    "build_prompt_set",
    "greater_than",
    "induction",
    "ioi",
    "load_records",
    "load_task",
    "pronouns",
    "save_records",
]

TASKS: dict[str, Task] = {each.TASK.name: each.TASK for each in (ioi, greater_than, induction, agreement, pronouns)}


def load_task(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: when there is none; the message suggests the nearest.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
