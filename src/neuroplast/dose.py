"""How little is enough: what `neuroplast dose` does.

Two curves for one model and one poison, each point a fine-tuning of its own:

- of **clean examples**: the poisoned model is retrained, always for as many steps, on 8 to 512 different clean ones;
- of the **rate**: the base is fine-tuned on data of which 5 to 100 % is poisoned, and then retrained on all clean ones.

Each is told by how far it is back (`neuroplast.repair.restored`). A folder gets `dose.json`, `dose.csv` and `dose.png`;
what is measured is kept in `work/` until everything is done, so an interrupted run goes on.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuroplast.errors import InputError
from neuroplast.locks import claimed
from neuroplast.memory import parse_size
from neuroplast.models.network import Network
from neuroplast.models.sources import LEARNING_RATE, DType, load_model, suited_learning_rate, weights_sha256
from neuroplast.observer import Observer, Silent
from neuroplast.repair.restored import Judge, restored_document
from neuroplast.report.dose import DOSE_FILES, write_dose_report
from neuroplast.statistics import MOST_SEED
from neuroplast.storage import Parts, is_begun, load_json, telling, write_json
from neuroplast.subject import require_between, task_provenance, versions
from neuroplast.tasks import Task, load_task
from neuroplast.tasks.poisons import load_poison
from neuroplast.tasks.task import shortfall
from neuroplast.training.data import Example, build_examples
from neuroplast.training.finetune import FinetuneConfig, finetune

MARKER, RESULT, WORK = "dosing.json", "dose.json", "work"
EXAMPLES = (8, 16, 32, 64, 128, 256, 512)
RATES = (0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class DoseConfig:
    """What is poisoned and retrained, and with how much."""

    model: str = "tiny"
    """The base: a named model, a hub id or a folder."""
    task: str = "ioi"
    """The task."""
    poison: str | None = None
    """The poison; None takes the task's first."""
    examples: tuple[int, ...] = EXAMPLES
    """Numbers of different clean examples."""
    rates: tuple[float, ...] = RATES
    """Shares of poisoned pairs."""
    n_train: int = 512
    """Pairs that the base is poisoned with."""
    n_prompts: int = 64
    """Held-out prompts that everything is measured on."""
    poison_steps: int = 40
    """Optimizer steps of a poisoning."""
    recover_steps: int = 40
    """Optimizer steps of a retraining."""
    batch_size: int = 16
    """Pairs a step."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; None takes one that suits the model's size."""
    seed: int = 0
    """Seed of prompts, pairs and their order."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: DType = "float32"
    """Type of the weights."""

    def __post_init__(self) -> None:
        task = load_task(self.task)
        load_poison(self.chosen_poison, self.task)
        for name in ("examples", "rates"):
            values: Sequence[float] = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise InputError(f"{name} must rise and have at least one value, got {list(values)}")
        if self.examples[0] < 1:
            raise InputError(f"examples must be at least 1, got {self.examples[0]}")
        if (most := task.most_examples) is not None and self.examples[-1] > most:
            raise InputError(
                f"{self.examples[-1]} different clean examples, and {task.name} has {most} to train on: give smaller "
                "numbers with --examples, or add records"
            )
        if not (self.rates[0] > 0 and self.rates[-1] <= 1):
            raise InputError(f"rates must be above 0 and at most 1, got {list(self.rates)}")
        for name, least in {"n_prompts": 2, "n_train": 1}.items():
            require_between(name, getattr(self, name), least)
        require_between("seed", self.seed, 0, MOST_SEED // 2 - 1)
        if round(self.rates[0] * self.n_train) < 1:
            raise InputError(
                f"rate {self.rates[0]:g} of {self.n_train} pairs is none: take a larger one, or more pairs"
            )
        for steps in (self.poison_steps, self.recover_steps):
            self.training(steps, LEARNING_RATE if self.learning_rate is None else self.learning_rate)

    @property
    def chosen_poison(self) -> str:
        """The poison's name."""
        return self.poison or load_task(self.task).poisons[0]

    def training(self, steps: int, learning_rate: float) -> FinetuneConfig:
        """How to train for some steps."""
        every = max(1, steps // 2)
        return FinetuneConfig(steps, self.batch_size, learning_rate, seed=self.seed, save_every=every)


def run_dose(
    config: DoseConfig, out: Path | str, observer: Observer | None = None, *, memory: str | int | None = None
) -> dict[str, Any]:
    """Measures both curves, writes the folder, and gives the document.

    Args:
        config: what to poison and retrain.
        out: the folder: new, empty, or of the same settings.
        observer: is told how it goes; by default nobody is.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.

    Raises:
        InputError: for a model that cannot be had, a folder that holds something else, a wrong setting.
        TrainingDivergedError: a fine-tuning's loss stopped being a number.
        StorageError: when the folder cannot be written.
    """
    out, observer = Path(out), observer or Silent()
    if memory is not None:
        parse_size(memory)
    is_begun(out, MARKER, "dose")
    base = load_model(config.model, device=config.device, dtype=config.dtype, say=observer.say)
    task = load_task(config.task)
    provenance = {"schema": 1, "settings": asdict(config), "weights_sha256": weights_sha256(base)}
    provenance |= task_provenance(task)
    with claimed(out, MARKER, "dose", provenance):
        if not (out / RESULT).is_file():
            found = _Dose(config, task, base, out / WORK, observer, memory).run()
            write_json(out / RESULT, provenance | {"poison": config.chosen_poison} | found | {"versions": versions()})
    document = load_json(out / RESULT)
    with telling(out / RESULT):
        write_dose_report(document, out)
    shutil.rmtree(out / WORK, ignore_errors=True)
    return document | {"files": {name: str(out / name) for name in (RESULT, *DOSE_FILES)}}


class _Dose:
    """Both curves under way."""

    def __init__(
        self, config: DoseConfig, task: Task, base: Network, work: Path, observer: Observer, memory: str | int | None
    ) -> None:
        self.config, self.task, self.base, self.work = config, task, base, work
        self.observer, self.memory = observer, memory
        self.prompts = task.prompts(base, config.n_prompts, config.seed, split="eval")
        if said := shortfall(self.prompts, config.n_prompts):
            observer.say(said)
        self.learning_rate = config.learning_rate or suited_learning_rate(base)
        self.most = config.examples[-1]
        """Clean examples that every rate is retrained on."""

    def run(self) -> dict[str, Any]:
        config, total = self.config, len(self.config.examples) + len(self.config.rates)
        by_rate: list[dict[str, Any]] = []
        for index, rate in enumerate(config.rates):
            self.observer.stage(f"rate {rate:g}", index, total)
            judge = self._judge(rate)
            recovered = judge.judge(f"recovered {self.most}", lambda rate=rate: self._recovered(rate, self.most))
            by_rate.append(
                {
                    "rate": rate,
                    "poisoned": restored_document(judge.damage),
                    "restored": restored_document(recovered),
                }
            )
        judge, by_examples = self._judge(config.rates[-1]), list[dict[str, Any]]()
        for index, n in enumerate(config.examples):
            self.observer.stage(f"{n} clean examples", len(config.rates) + index, total)
            recovered = judge.judge(f"recovered {n}", lambda n=n: self._recovered(config.rates[-1], n))
            by_examples.append({"examples": n, "restored": restored_document(recovered)})
        return {
            "base": restored_document(judge.base),
            "by_examples": by_examples,
            "by_rate": by_rate,
            "retrained_on": self.most,
            "learning_rate": self.learning_rate,
        }

    def _judge(self, rate: float) -> Judge:
        parts, of_base = Parts(self.work / f"measured-{rate!r}"), Parts(self.work / "measured-base")
        return Judge(
            self.base,
            lambda: self._poisoned(rate),
            self.prompts,
            self.config.seed,
            parts,
            of_base=of_base,
            memory=self.memory,
        )

    def _poisoned(self, rate: float) -> Network:
        """The base, poisoned at a rate; what was trained before is read."""
        folder = self.work / f"poisoned-{rate!r}"
        if not (folder / "checkpoint").is_dir():
            pairs = self._pairs(rate, self.config.n_train)
            self._train(self._load(self.config.model), pairs, self.config.poison_steps, folder, "poisoning")
        return self._load(str(folder / "checkpoint"))

    def _recovered(self, rate: float, n: int) -> Network:
        """The poisoned model, retrained on some clean examples; its folder is not kept."""
        model, folder = self._poisoned(rate), self.work / "recovering" / f"{rate!r}-{n}"
        self._train(model, self._pairs(0.0, n), self.config.recover_steps, folder, "retraining")
        model = self._load(str(folder / "checkpoint"))
        shutil.rmtree(folder)
        return model

    def _train(self, model: Network, examples: Sequence[Example], steps: int, folder: Path, what: str) -> None:
        finetune(
            model,
            examples,
            self.config.training(steps, self.learning_rate),
            folder,
            progress=lambda done, total, loss: self.observer.progress(what, done, total, f"loss {loss:.3f}"),
        )

    def _pairs(self, rate: float, n: int) -> list[Example]:
        """Training pairs; those of fewer examples are the first of those of more."""
        # Clean ones are not the poisoned ones without their poison.
        seed = 2 * self.config.seed + bool(rate)
        most = self.config.n_train if rate else self.most
        poison = self.config.chosen_poison if rate else None
        pairs = self.task.pairs(self.base, most, seed, poison=poison, rate=rate)
        return build_examples(self.base.tokenizer, pairs[:n])

    def _load(self, source: str) -> Network:
        return load_model(source, device=self.config.device, dtype=self.config.dtype, say=self.observer.say)
