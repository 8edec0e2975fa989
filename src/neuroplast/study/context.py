"""A study as its stages see it: settings, prompts, and what the stages before them left."""

from collections.abc import Sequence
from pathlib import Path

from neuroplast.circuits.circuit import Circuit
from neuroplast.errors import InputError, StorageError
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model
from neuroplast.observer import Observer
from neuroplast.statistics import Weights, bootstrap_weights
from neuroplast.study.circuits import Circuits, load_circuits
from neuroplast.study.measure import Measured, load_measured
from neuroplast.study.plan import EQUAL_STEPS, RESEEDED, SHUFFLED, Point, Stage, StudyConfig, build_plan
from neuroplast.tasks import load_task
from neuroplast.tasks.poisons import Pair
from neuroplast.tasks.prompts import PromptSet
from neuroplast.tasks.task import shortfall

COMPARISON = "comparison.json"


class Context:
    """What all stages of a study share."""

    def __init__(self, config: StudyConfig, out: Path, observer: Observer, base: Network) -> None:
        """Draws the prompts.

        Args:
            config: the settings.
            out: the run directory.
            observer: is told how it goes.
            base: base's model, whose tokenizer makes the prompts; it is not kept.

        Raises:
            InputError: when the task and the tokenizer do not fit.
        """
        self.config, self.out, self.observer = config, out, observer
        self.task = load_task(config.task)
        self.stages: tuple[Stage, ...] = build_plan(config)
        self.prompts: PromptSet = self._build_prompts(base)
        self.reference: PromptSet = self._build_reference(base)
        self.weights: Weights = bootstrap_weights(len(self.prompts), config.seeds[0], config.resamples)

    @property
    def followed(self) -> list[Stage]:
        """The stages that are measured on the way of their training."""
        return [stage for stage in self.stages if stage.kind in self.config.follow_stages and stage.parent is not None]

    @property
    def compared(self) -> list[Stage]:
        """The stages that are compared with base."""
        return [stage for stage in self.stages if stage.kind in self.config.compare_stages and stage.parent is not None]

    def stage(self, stage_id: str) -> Stage:
        """A stage by its id."""
        (stage,) = (stage for stage in self.stages if stage.id == stage_id)
        return stage

    def folder(self, of: Stage | Point) -> Path:
        """Where a stage or a point of it lies."""
        return self.out / of.folder

    def point_of(self, stage_id: str, step: int) -> Path:
        """The folder of a stage at a step: the control's ladder has the recovery's rungs."""
        (point,) = (point for point in self.stage(stage_id).points if point.step == step)
        return self.folder(point)

    def comparison(self, stage: Stage) -> Path:
        """The file that holds a stage against base."""
        return self.folder(stage) / COMPARISON

    def measured(self, stage_id: str) -> Measured:
        """What was measured of a stage at its end."""
        return load_measured(self.folder(self.stage(stage_id)) / "effects.safetensors")

    def circuits_of(self, stage_id: str) -> Circuits | None:
        """A stage's circuits at its end; None where none were looked for."""
        return load_circuits(self.folder(self.stage(stage_id)))

    def circuit_of_base(self) -> Circuit | None:
        """The base's circuit; None where it has none, or none was looked for."""
        of_base = self.circuits_of("base")
        return of_base.nodes if of_base else None

    def load(self, source: str | Path) -> Network:
        """Loads a model; see `load_network`."""
        return load_network(self.config, source, self.observer)

    def build_pairs(self, stage: Stage, model: Network) -> Sequence[Pair]:
        """What a stage is trained on."""
        # The same number gives the same prompts: a control is to differ from its stage in one thing only.
        draws = {"tuned": 1, "poisoned": 2, SHUFFLED: 2, "recovered": 3, EQUAL_STEPS: 3, RESEEDED: 4}
        seed = stage.seed * 10 + draws[stage.recipe]
        if stage.recipe == SHUFFLED:
            return self.task.shuffled_pairs(model, self.config.n_train, seed, rate=self.config.rate)
        poison = stage.poison if stage.kind == "poisoned" else None
        return self.task.pairs(model, self.config.n_train, seed, poison=poison, rate=self.config.rate)

    def _build_prompts(self, model: Network) -> PromptSet:
        config, n = self.config, self.config.n_prompts
        prompts = self.task.prompts(model, n, config.seeds[0], split="eval", counterfactual=config.counterfactual)
        if said := shortfall(prompts, n):
            self.observer.say(said)
        if (most := self.task.most_examples) is not None and most < config.n_train:
            self.observer.say(
                f"{self.task.name} has {most} examples to train on, which are repeated: n_train asks for more"
            )
        return prompts

    def _build_reference(self, model: Network) -> PromptSet:
        """Prompts that knocked-out heads are averaged over; see `Task.reference` for whether any is measured."""
        return self.task.reference(
            model,
            self.prompts,
            self.config.circuit_reference,
            self.config.seeds[0],
            split="eval",
            counterfactual=self.config.counterfactual,
        )


def load_network(config: StudyConfig, source: str | Path, observer: Observer) -> Network:
    """Loads a model as a study's settings ask for it.

    Args:
        config: the settings.
        source: the model that the study is of, or a checkpoint of the run.
        observer: is told of downloads and conversions.

    Raises:
        InputError: when the study's model cannot be had.
        StorageError: when a checkpoint of the run is damaged.
    """
    try:
        network = load_model(source, device=config.device, dtype=config.dtype, say=observer.say)
        network.name = config.model  # a run's files are the same wherever it lies
        return network
    except InputError as error:
        if source == config.model:
            raise
        raise StorageError(f"{error}; it is this run's own: remove it, then run the same command again") from error
