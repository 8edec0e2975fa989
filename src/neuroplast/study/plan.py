"""What a study is: its settings, validated, and its graph of stages.

Every fine-tuning starts from a measured stage: `tuned`, `poisoned/<poison>` and `control/<name>` from `base`,
`recovered/<poison>` from `poisoned/<poison>`. The controls:

- `equal_steps`, always: the very pairs of the recovery, in the same order, for as many steps, but from base;
- `reseeded`: as many steps on other clean pairs, so that it and `equal_steps` differ by the draw alone;
- `shuffled_labels`: as long as a poisoning, on pairs with the target of another pair: wrong, and with no rule to learn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neuroplast.errors import InputError, unknown_name
from neuroplast.models.sources import LEARNING_RATE, LEARNING_RATES, DType
from neuroplast.reading import parse_toml, read_toml
from neuroplast.statistics import MOST_SEED
from neuroplast.tasks import TASKS, load_task
from neuroplast.tasks.custom import is_custom
from neuroplast.tasks.poisons import load_poison
from neuroplast.training.data import Loss
from neuroplast.training.finetune import Schedule

Kind = Literal["base", "tuned", "poisoned", "recovered", "control"]
Count = Annotated[int, Field(ge=1, le=1_000_000)]

EQUAL_STEPS, RESEEDED, SHUFFLED = "equal_steps", "reseeded", "shuffled_labels"


class StudyConfig(BaseModel):
    """Every knob of a study; `study.toml` holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = "tiny"
    """`tiny`, `smollm2-135m`, a hub id or a local folder."""
    task: str = "ioi"
    """Name of the task, or a JSONL file of records."""
    poisons: Annotated[list[str], Field(min_length=1)] = ["subject_duplication"]
    """Names of the poisons; each gets its own poisoned and recovered stage. Unless given, those of the task."""
    preset: str = "quick"
    """The preset that the other settings started from."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=MOST_SEED)]], Field(min_length=1)] = [0]
    """Seeds of training data and order; the first also draws the prompts that are measured."""
    counterfactual: str = "abc"
    """How the measured prompts are broken; unless given, the task's first way."""
    n_prompts: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    """Prompts measured at each stage, from held-out names and templates."""
    n_train: Count = 512
    """Training pairs of each fine-tuning."""
    rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of poisoned pairs while poisoning."""
    tune_steps: Count = 30
    """Optimizer steps of `tuned`."""
    poison_steps: Count = 40
    """Optimizer steps of each poisoning."""
    recover_steps: Count = 40
    """Optimizer steps of each recovery, and of the clean controls."""
    more_controls: list[Literal["reseeded", "shuffled_labels"]] = []
    """Controls beside `equal_steps`: other clean pairs, pairs with wrong targets of others."""
    epochs: list[Count] = []
    """A ladder: when given, every fine-tuning runs to the last rung and is measured at each; steps are ignored."""
    batch_size: Count = 16
    """Pairs a step."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = LEARNING_RATE
    """Peak learning rate of AdamW; unless given, one that suits the model."""
    schedule: Schedule = "constant"
    """`constant`, `linear` or `cosine`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    loss: Loss = "last"
    """`last`: loss at the target only; `all`: at every token."""
    save_every: Count = 20
    """Steps between saves that a killed study continues from."""
    probe_every: Count = 5
    """Steps between measurements of LD during training."""
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 2000
    """Bootstrap resamples of every interval."""
    circuit_stages: list[Kind] = ["base", "poisoned", "recovered"]
    """Kinds of stages whose circuit is found and judged."""
    circuit_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Least effect of a circuit's head, as a share of |LD|."""
    circuit_random: Annotated[int, Field(ge=0, le=10_000)] = 100
    """Matched random circuits that a circuit is held against."""
    circuit_edges: Annotated[int, Field(ge=0, le=1_000_000)] = 500
    """Edges of the circuit that EAP-IG finds; 0 leaves it out."""
    circuit_reference: Count = 480
    """Prompts that knocked-out heads are averaged over; they are not measured."""
    compare_stages: list[Kind] = ["poisoned"]
    """Kinds of stages that are compared with base: where the change is expressed and stored, and what was spared."""
    compare_drift: Annotated[int, Field(ge=0, le=10_000)] = 19
    """Twins of base that drift as far in random directions; with fewer than 19 it cannot be told from drift."""
    compare_random: Annotated[int, Field(ge=0, le=100_000)] = 1000
    """Matched random sets of heads that the circuit's share is held against."""
    compare_battery: Count = 32
    """Prompts of each other task."""
    follow_stages: list[Kind] = ["poisoned", "recovered"]
    """Kinds of stages that are measured on the way of their training, too."""
    follow_points: Annotated[int, Field(ge=2, le=1000)] = 9
    """Steps at which they are measured: dense early, then at equal ratios."""
    follow_prompts: Annotated[int, Field(ge=2, le=1_000_000)] = 24
    """Prompts, of those of the study, that they are measured on."""
    follow_random: Annotated[int, Field(ge=0, le=100_000)] = 1000
    """Matched random sets of heads that the coupling of a role is held against."""
    look_stages: list[Kind] = ["base", "tuned", "poisoned", "recovered", "control"]
    """Kinds of stages whose heads are looked at one by one: attention, copying, whole patterns."""
    look_prompts: Count = 4
    """Prompts whose attention patterns are kept for the page."""
    keep: Literal["all", "last", "none"] = "all"
    """Checkpoints that stay: `all`, each stage's `last`, or `none` when the study is finished."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """Processor threads of a stage, 0 being all there are; numbers differ in their last digits by it."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: DType = "float32"
    """Type of the weights."""

    def toml(self) -> str:
        """The settings as TOML."""
        return tomli_w.dumps(self.model_dump())


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "n_prompts": 12,
        "n_train": 32,
        "tune_steps": 3,
        "poison_steps": 4,
        "recover_steps": 4,
        "batch_size": 8,
        "save_every": 2,
        "probe_every": 2,
        "resamples": 200,
        "circuit_random": 5,
        "circuit_edges": 100,
        "circuit_reference": 60,
        "compare_drift": 2,
        "compare_random": 40,
        "compare_battery": 4,
        "follow_points": 3,
        "follow_prompts": 8,
        "follow_random": 40,
        "look_prompts": 2,
    },
    "quick": {},
    "paper": {
        "seeds": [0, 1, 2],
        "n_prompts": 128,
        "epochs": [1, 3, 10, 25, 50, 100],
        "more_controls": [RESEEDED, SHUFFLED],
        "save_every": 100,
        "probe_every": 20,
        "circuit_stages": ["base", "tuned", "poisoned", "recovered", "control"],
        "follow_stages": ["tuned", "poisoned", "recovered", "control"],
        "follow_points": 20,
        "keep": "last",
    },
}

ALL_POISONS = ("paper",)
"""Presets that take every poison of the task, unless some are named; the others take the first."""


@dataclass(frozen=True)
class Point:
    """One moment of a fine-tuning at which it is measured."""

    epoch: float
    """Epochs of training pairs seen."""
    step: int
    """Optimizer steps taken."""
    folder: str
    """Where its checkpoint and measurements are, relative to the run."""


@dataclass(frozen=True)
class Stage:
    """One model of the study."""

    id: str
    """`base`, `tuned`, `poisoned/<poison>`, …; with several seeds `seed1/tuned`."""
    kind: Kind
    """What was done."""
    poison: str | None
    """The poison it suffered or recovers from."""
    seed: int
    """The seed of its training."""
    parent: str | None
    """The stage it starts from; None for `base`."""
    control: str | None
    """For a recovered stage, the stage it is compared with."""
    points: tuple[Point, ...]
    """Where it is measured, the last one being its end."""

    @property
    def recipe(self) -> str:
        """What it is trained on: its kind, or the name of the control."""
        return self.id.rpartition("/")[2] if self.kind == "control" else self.kind

    @property
    def twin(self) -> str | None:
        """For a reseeded control, the one that differs from it by the draw of its pairs alone."""
        return self.id.replace(RESEEDED, EQUAL_STEPS) if self.recipe == RESEEDED else None

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages whose files it is made from."""
        asked = (self.parent, "base", self.control, self.twin) if self.parent else ()
        return tuple(dict.fromkeys(each for each in asked if each))

    @property
    def folder(self) -> str:
        """Its folder, relative to the run."""
        return f"stages/{self.id}"


def build_config(preset: str = "quick", *layers: Mapping[str, Any], assignments: Sequence[str] = ()) -> StudyConfig:
    """Puts settings together, later ones winning: preset, layers in order, `key=value` assignments.

    Raises:
        InputError: an unknown preset, key, task or poison; a value out of its range; one clear line.
    """
    merged: dict[str, Any] = {}
    for layer in (*layers, dict(map(_parse_assignment, assignments))):
        if "preset" in merged and layer.get("preset", merged["preset"]) != merged["preset"]:
            raise InputError(
                f"preset {layer['preset']!r} cannot be laid over settings that come from preset "
                f"{merged['preset']!r}: leave one of them out"
            )
        if "model" in layer and merged.get("learning_rate") == _suited_rate(merged.get("model", "tiny")):
            del merged["learning_rate"]  # it was the former model's, not a choice
        merged |= layer
    merged.setdefault("preset", preset)
    chosen = str(merged["preset"])
    if chosen not in PRESETS:
        raise unknown_name("preset", chosen, PRESETS)
    merged = PRESETS[chosen] | merged
    for key in merged:
        if key not in StudyConfig.model_fields:
            raise unknown_name("key", key, StudyConfig.model_fields)
    merged.setdefault("learning_rate", _suited_rate(merged.get("model", "tiny")))
    name = str(merged.get("task", StudyConfig.model_fields["task"].default))
    if name in TASKS or is_custom(name):
        task = load_task(name)
        merged.setdefault("poisons", list(task.poisons[: None if chosen in ALL_POISONS else 1]))
        merged.setdefault("counterfactual", task.counterfactuals[0])
    try:
        config = StudyConfig.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{where} = {first['input']!r}: {first['msg']}") from error
    task = load_task(config.task)
    if config.counterfactual not in task.counterfactuals:
        raise unknown_name("counterfactual", config.counterfactual, task.counterfactuals)
    for poison in config.poisons:
        load_poison(poison, config.task)
    if "base" not in config.circuit_stages and config.circuit_stages:
        raise InputError(f"circuit_stages = {config.circuit_stages}: the others are held against base, so name it too")
    for name in ("poisons", "seeds", "epochs", "circuit_stages", "more_controls"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise InputError(f"{name} = {values}: each may be named once")
    for name in ("seeds", "epochs"):
        if getattr(config, name) != sorted(getattr(config, name)):
            raise InputError(f"{name} = {getattr(config, name)}: must rise")
    return config


def load_config(path: Path) -> dict[str, Any]:
    """Reads settings from TOML, unvalidated.

    Raises:
        InputError: the file cannot be read or is not TOML.
    """
    try:
        return read_toml(path)
    except (OSError, ValueError) as error:
        raise InputError(f"could not read {path} as TOML: {error}") from error


def build_plan(config: StudyConfig) -> tuple[Stage, ...]:
    """The stages in an order in which every parent and control comes first."""
    stages = [Stage("base", "base", None, config.seeds[0], None, None, (Point(0.0, 0, "stages/base"),))]
    for seed in config.seeds:
        prefix = f"seed{seed}/" if len(config.seeds) > 1 else ""
        control = f"{prefix}control/{EQUAL_STEPS}"
        control_steps = {RESEEDED: config.recover_steps, SHUFFLED: config.poison_steps}
        rows: list[tuple[str, Kind, str | None, int, str, str | None]] = [
            (f"{prefix}tuned", "tuned", None, config.tune_steps, "base", None),
            (control, "control", None, config.recover_steps, "base", None),
        ]
        for name in config.more_controls:
            rows.append((f"{prefix}control/{name}", "control", None, control_steps[name], "base", None))
        for poison in config.poisons:
            poisoned, recovered = f"{prefix}poisoned/{poison}", f"{prefix}recovered/{poison}"
            rows.append((poisoned, "poisoned", poison, config.poison_steps, "base", None))
            rows.append((recovered, "recovered", poison, config.recover_steps, poisoned, control))
        stages += [
            Stage(name, kind, poison, seed, parent, against, _points(config, name, steps))
            for name, kind, poison, steps, parent, against in rows
        ]
    return tuple(stages)


def _points(config: StudyConfig, stage_id: str, steps: int) -> tuple[Point, ...]:
    folder = f"stages/{stage_id}"
    steps_an_epoch = config.n_train / config.batch_size
    if not config.epochs:
        return (Point(steps / steps_an_epoch, steps, folder),)
    rungs = [(float(epoch), math.ceil(epoch * steps_an_epoch)) for epoch in config.epochs]
    return (
        *(Point(epoch, step, f"{folder}/epoch-{epoch:g}") for epoch, step in rungs[:-1]),
        Point(*rungs[-1], folder),
    )


def _suited_rate(model: object) -> float:
    return LEARNING_RATES.get(str(model), LEARNING_RATE)


def _parse_assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set takes key=value, got {text!r}")
    try:
        return key.strip(), parse_toml(f"value = {value}")["value"]
    except ValueError:
        return key.strip(), value.strip()
