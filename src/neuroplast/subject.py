"""What a command measures: a model, and the prompts that it is measured on."""

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, get_args

from neuroplast.errors import InputError, unknown_name
from neuroplast.models.network import Network
from neuroplast.models.sources import DType, load_model, weights_sha256
from neuroplast.observer import Observer
from neuroplast.statistics import MOST_SEED
from neuroplast.storage import hash_text
from neuroplast.tasks import Task, build_prompt_set, load_records, load_task
from neuroplast.tasks.prompts import PromptSet
from neuroplast.tasks.task import shortfall

MOST_PROMPTS = 1_000_000
FLAGS = {"senders": "from", "receivers": "to", "knocked_out": "knock-out", "n": "n-edges"}
"""Settings that the command line calls by another name."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and prompts. Settings that are None take what suits the task."""

    model: str = "tiny"
    """A named model, a hub id or a folder."""
    task: str = "ioi"
    """Whose prompts are measured: a task's name, or a JSONL file of records, of which those of `eval` are."""
    prompts: str | None = None
    """A JSONL file of records to measure instead of the task's own."""
    n_prompts: int | None = None
    """How many of the task's prompts; None takes `DEFAULT_PROMPTS`."""
    seed: int | None = None
    """Seed of the task's prompts; None takes 0."""
    counterfactual: str | None = None
    """Which counterfactual of the task; None takes its first."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: DType = "float32"
    """Type of the weights."""

    DEFAULT_PROMPTS = 64

    def __post_init__(self) -> None:
        for name in ("n_prompts", "seed"):
            require_whole(name, getattr(self, name))
        if self.seed is not None:
            require_between("seed", self.seed, 0, MOST_SEED)
        if self.n_prompts is not None and not 1 <= self.n_prompts <= MOST_PROMPTS:
            raise InputError(f"{self.n_prompts} prompts: a measurement needs at least 1, and at most {MOST_PROMPTS:,}")
        if self.prompts is not None:
            for name in ("n_prompts", "seed", "counterfactual"):
                if getattr(self, name) is not None:
                    raise InputError(f"setting {spelled(name)} is for the task's prompts; {self.prompts} has its own")
        if self.dtype not in get_args(DType):
            raise unknown_name("dtype", self.dtype, get_args(DType))

    def resolved(self) -> Self:
        """The same with every setting filled in."""
        task = load_task(self.task)
        if self.prompts is not None:
            return self
        defaults: dict[str, Any] = {
            "n_prompts": self.DEFAULT_PROMPTS,
            "seed": 0,
            "counterfactual": task.counterfactuals[0],
        }
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def load(self, observer: Observer) -> tuple[Network, PromptSet]:
        """The model and the prompts.

        Raises:
            InputError: when either cannot be had.
        """
        model = load_model(self.model, device=self.device, dtype=self.dtype, say=observer.say)
        prompts = self.load_prompts(model)
        if said := shortfall(prompts, self.n_prompts or 0):
            observer.say(said)
        return model, prompts

    def load_prompts(self, model: Network) -> PromptSet:
        """The prompts.

        Args:
            model: whose tokenizer reads them.
        """
        task = load_task(self.task)
        if self.prompts is not None:
            return build_prompt_set(model.tokenizer, task.name, load_records(Path(self.prompts)))
        assert self.n_prompts is not None and self.seed is not None  # resolved
        return task.prompts(
            model, self.n_prompts, self.seed, split=task.measured_split, counterfactual=self.counterfactual
        )

    def provenance(self, model: Network, prompts: PromptSet) -> dict[str, Any]:
        """What the results depend on, as JSON has it."""
        return {
            "schema": 1,
            "settings": {name: value for name, value in asdict(self).items() if value is not None},
            "weights_sha256": weights_sha256(model),
            "prompts_sha256": hash_text(json.dumps([record.row() for record in prompts.records])),
        } | task_provenance(load_task(self.task))


def spelled(name: str) -> str:
    """A setting as Python and as the command line call it."""
    return f"{name!r} (--{FLAGS.get(name, name.replace('_', '-'))})"


def require_whole(name: str, value: object) -> None:
    """Checks that a setting is a whole number, where it is given.

    Raises:
        InputError: when it is something else.
    """
    if value is not None and type(value) is not int:
        raise InputError(f"{name} must be a whole number, got {value!r}")


def require_between(name: str, value: object, least: int, most: int | None = None) -> None:
    """Checks that a setting is a whole number in a range.

    Raises:
        InputError: when it is something else.
    """
    require_whole(name, value)
    if not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise InputError(f"{name} must be at most {most}, got {value}")


def task_provenance(task: Task) -> dict[str, str]:
    """The hash of the records of a task that is a file; nothing of another."""
    return {} if task.sha256 is None else {"task_sha256": task.sha256}


def versions() -> dict[str, str]:
    """The versions that results were made with."""
    return {name: version(name) for name in ("neuroplast", "torch", "transformers")}
