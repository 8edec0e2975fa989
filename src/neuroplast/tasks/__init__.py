"""Tasks by name. A new one is one file with a `TASK`, and its place in `TASKS`."""

from neuroplast.errors import unknown_name
from neuroplast.tasks import greater_than, ioi
from neuroplast.tasks.prompts import PromptSet, Record, build_prompt_set, load_records, save_records
from neuroplast.tasks.task import Split, Task

__all__ = [
    "TASKS",
    "PromptSet",
    "Record",
    "Split",
    "Task",
    "build_prompt_set",
    "greater_than",
    "ioi",
    "load_records",
    "load_task",
    "save_records",
]

TASKS: dict[str, Task] = {task.name: task for task in (ioi.TASK, greater_than.TASK)}


def load_task(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: when there is none; the message suggests the nearest.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
