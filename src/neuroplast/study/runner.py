"""Runs a study, stage by stage, and continues one that was interrupted.

A stage's files appear in this order, each whole or not at all: `trajectory/` while it is trained, `checkpoint/`,
`effects.safetensors`, its circuits, `measures.json`, `trajectory.json`, `heads.json`, `comparison.json`. What exists is
not made again, so the same command after a kill does only what is missing, and the numbers are those of an undisturbed
run: all that a file depends on is the settings and the files before it.
"""

import shutil
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.evaluate import estimate_document
from neuroplast.errors import InputError, StorageError
from neuroplast.memory import show_size
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model, weights_sha256
from neuroplast.observer import Observer, Silent
from neuroplast.plasticity.restoration import similarity
from neuroplast.report import write_growing_page, write_report
from neuroplast.report.looks import HEADS, PATTERNS
from neuroplast.statistics import bootstrap_weights
from neuroplast.storage import (
    Parts,
    is_begun,
    load_json,
    make_folder,
    nearest_folder,
    write_json,
    write_jsonl,
    write_text,
)
from neuroplast.study.circuits import NO_CIRCUIT, Circuits, CircuitStudy, load_circuits, summary_document
from neuroplast.study.claims import build_claims
from neuroplast.study.following import PLASTICITY, TRAJECTORY, FollowStudy
from neuroplast.study.heads import choose_heads, run_look
from neuroplast.study.manifest import MANIFEST, open_manifest
from neuroplast.study.measure import (
    Measured,
    amplification_document,
    behaviour_document,
    comparison_document,
    heads_document,
    load_measured,
    restoration_document,
    run_measurement,
    similarity_document,
)
from neuroplast.study.over_seeds import Numbers, numbers_of, poisons_document, seeds_document
from neuroplast.study.plan import EQUAL_STEPS, RESEEDED, SHUFFLED, Point, Stage, StudyConfig, build_plan
from neuroplast.study.summary import TO_EQUAL_STEPS, load_measures, summary_entry
from neuroplast.tasks import load_task
from neuroplast.tasks.custom import is_custom
from neuroplast.tasks.poisons import Pair
from neuroplast.tasks.prompts import PromptSet
from neuroplast.tasks.records import save_records
from neuroplast.tasks.task import shortfall
from neuroplast.training.data import build_examples
from neuroplast.training.finetune import FinetuneConfig, finetune, save_checkpoint
from neuroplast.training.train import behaviour_probe

SCHEMA = 1
COMPARISON = "comparison.json"


@dataclass(frozen=True)
class StudyResult:
    """Where a finished study lies, and its summary."""

    folder: Path
    """The run directory."""
    report: Path
    """The page."""
    summary: dict[str, Any]
    """The document in `summary.json`."""


def run_study(
    config: StudyConfig,
    out: str | Path,
    observer: Observer | None = None,
    command: str = "",
    *,
    growing: bool = False,
) -> StudyResult:
    """Runs, or continues, a study.

    Args:
        config: the settings.
        out: the run directory; new, empty, or of the same study.
        observer: is told how it goes; by default nobody is.
        command: the command line, for the manifest.
        growing: writes the report after every stage, with what there is by then.

    Raises:
        InputError: `out` holds something else, the model cannot be had, or too little disk space is free.
        TrainingDivergedError: a fine-tuning's loss stopped being a number.
        StorageError: the disk refused.
    """
    _claim_folder(config, Path(out))
    return _Run(config, Path(out), observer or Silent(), command).run(growing)


class _Run:
    def __init__(self, config: StudyConfig, out: Path, observer: Observer, command: str) -> None:
        self.config, self.out, self.observer = config, out, observer
        self.task = load_task(config.task)
        self.stages = build_plan(config)
        base = self._load(config.model)
        self.prompts = self._build_prompts(base)
        self.weights = bootstrap_weights(len(self.prompts), config.seeds[0], config.resamples)
        self.circuits = CircuitStudy(config, self.prompts, self._build_reference(base), observer)
        self.following = FollowStudy(config, self.prompts, observer)
        self.names = {split: len(self.task.names(base.tokenizer, split)) for split in ("all", "train", "eval")}
        observer.say(
            f"{self.names['all']} words can be the answer and are one token for {config.model}: "
            f"{self.names['train']} to train on, {self.names['eval']} to measure on"
        )
        self._require_space(base)
        make_folder(out)
        self.model = {
            "name": config.model,
            "architecture": base.architecture,
            "n_layers": base.n_layers,
            "n_heads": base.n_heads,
            "weights_sha256": weights_sha256(base),
        }
        self.manifest = open_manifest(
            config,
            out,
            self.model,
            source=base.source,
            command=command,
            names=self.names,
            task_sha256=self.task.sha256,
        )
        if not (out / "study.toml").exists():
            write_text(out / "study.toml", config.toml())
        save_records(out / "prompts" / "measured.jsonl", self.prompts.records)
        if not (out / "stages/base/checkpoint").is_dir():
            save_checkpoint(base, out / "stages/base/checkpoint")

    def run(self, growing: bool) -> StudyResult:
        for index, stage in enumerate(self.stages):
            self.observer.stage(stage.id, index, len(self.stages))
            started = time.monotonic()
            self.following.seconds = 0.0
            is_new = self._run_stage(stage)
            if is_new or not self.manifest.has(stage):
                self.manifest.note_stage(stage, time.monotonic() - started, self.following.seconds)
            if growing and is_new and index + 1 < len(self.stages) and not (self.out / "summary.json").is_file():
                write_growing_page(self.out, self._summary(self.stages[: index + 1]), len(self.stages))
        write_json(self.out / PLASTICITY, self._plasticity())
        summary = self._summary(self.stages)
        write_json(self.out / "summary.json", summary)
        self.manifest.finish()
        return StudyResult(self.out, write_report(self.out), summary)

    def _run_stage(self, stage: Stage) -> bool:
        wanted = [self.out / point.folder / "measures.json" for point in stage.points]
        wanted += [self._comparison(stage)] if stage in self._compared() else []
        wanted += [self.out / stage.folder / TRAJECTORY] if stage in self._followed() else []
        if stage.kind in self.config.look_stages:
            wanted += [self.out / stage.folder / name for name in (PATTERNS, HEADS)]
        if all(path.is_file() for path in wanted):
            return False
        if stage.parent is not None:
            self._train(stage)
        for point in stage.points:
            self._measure(stage, point)
        if stage in self._followed():
            self._follow(stage)
        if stage.kind in self.config.look_stages:
            self._look(stage)
        if stage in self._compared():
            self._compare(stage)
        return True

    def _train(self, stage: Stage) -> None:
        folder = self.out / stage.folder
        if (folder / "checkpoint").is_dir():
            shutil.rmtree(folder / "resume", ignore_errors=True)
            return
        model = self._load(self.out / f"stages/{stage.parent}/checkpoint")
        pairs = self._build_pairs(stage, model)
        write_jsonl(self.out / "prompts" / f"{stage.id.replace('/', '-')}.jsonl", map(asdict, pairs))
        config = self.config
        training = FinetuneConfig(
            steps=stage.points[-1].step,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            loss=config.loss,
            seed=stage.seed,
            save_every=config.save_every,
            probe_every=config.probe_every,
        )
        finetune(
            model,
            build_examples(model.tokenizer, pairs),
            training,
            folder,
            keep={point.step: self.out / point.folder / "checkpoint" for point in stage.points[:-1]},
            probe=behaviour_probe(self.prompts),
            visit=self.following.visit(stage, folder, self._nodes_of_base()),
            progress=lambda done, total, loss: self.observer.progress("fine-tuning", done, total, f"loss {loss:.3f}"),
        )

    def _measure(self, stage: Stage, point: Point) -> None:
        folder = self.out / point.folder
        if (folder / "measures.json").is_file():
            return
        effects = folder / "effects.safetensors"
        own, of_base = stage.kind in self.config.circuit_stages, self._nodes_of_base()
        if effects.is_file() and not own and of_base is None:
            return write_json(folder / "measures.json", self._measures(stage, point))
        model = self._load(folder / "checkpoint")
        sha256 = weights_sha256(model)
        if not effects.is_file():
            metadata = {
                "stage": stage.id,
                "step": str(point.step),
                "weights_sha256": sha256,
                "sign": "LD(patched) - LD(clean); negative: the head helps",
                "position": "end",
                "counterfactual": self.config.counterfactual,
            }
            run_measurement(
                model,
                self.prompts,
                effects,
                metadata,
                lambda done, total: self.observer.progress("path patching", done, total),
            )
        if own or of_base is not None:
            clean = stage.kind in ("recovered", "control")
            self.circuits.measure(
                folder,
                model,
                None if stage.kind == "base" else of_base,
                (lambda: self._load(self.out / "stages/base/checkpoint")) if clean else None,
                sha256,
                own=own,
            )
        write_json(folder / "measures.json", self._measures(stage, point))

    def _followed(self) -> list[Stage]:
        """The stages that are measured on the way of their training."""
        return [stage for stage in self.stages if stage.kind in self.config.follow_stages and stage.parent is not None]

    def _follow(self, stage: Stage) -> None:
        """Writes the means of what was measured on the way."""
        folder = self.out / stage.folder
        found = self.following.load(stage, folder)
        document = self.following.trajectory_document(found, self._measured("base").effects, self._nodes_of_base())
        write_json(folder / TRAJECTORY, {"schema": SCHEMA, "stage": stage.id} | document)

    def _look(self, stage: Stage) -> None:
        """Writes what single heads do."""
        folder = self.out / stage.folder
        if all((folder / name).is_file() for name in (PATTERNS, HEADS)):
            return
        own = self._circuits_of(stage.id)
        circuits = [self._nodes_of_base(), own.nodes if own else None]
        heads = choose_heads(circuits, self._measured(stage.id).effects)
        model = self._load(folder / "checkpoint")
        run_look(model, self.prompts, heads, self.config.look_prompts, self.weights, folder)

    def _plasticity(self) -> dict[str, Any]:
        """By recovered stage, and by poison over seeds, how the mechanism broke and healed."""
        followed = {stage.id: stage for stage in self._followed()}
        base, circuit = self._measured("base"), self._nodes_of_base()
        stages: dict[str, dict[str, Any]] = {}
        by_poison: dict[str, list[Numbers]] = {}
        for stage in self.stages:
            if stage.kind != "recovered" or stage.poison is None:
                continue
            way = None
            if stage.id in followed and (parent := followed.get(str(stage.parent))):
                there, back = (self.following.load(each, self.out / each.folder) for each in (parent, stage))
                way = self.following.plasticity_document(there, back, base.logit_diff, base.effects, circuit)
                stages[stage.id] = {"poison": stage.poison, "seed": stage.seed} | way
            restored = load_measures(stage, self.out / stage.folder)["restoration"]
            by_poison.setdefault(stage.poison, []).append(numbers_of(way, restored))
        several = by_poison if len(self.config.seeds) > 1 else {}
        return {
            "schema": SCHEMA,
            "task": self.task.name,
            "stages": stages,
            "over_seeds": {poison: seeds_document(each) for poison, each in several.items()},
            "between_poisons": poisons_document(several),
        }

    def _compared(self) -> list[Stage]:
        """The stages that are compared with base."""
        return [stage for stage in self.stages if stage.kind in self.config.compare_stages and stage.parent is not None]

    def _comparison(self, stage: Stage) -> Path:
        return self.out / stage.folder / COMPARISON

    def _compare(self, stage: Stage) -> None:
        if self._comparison(stage).is_file():
            return
        base, model = (self._load(self.out / f"stages/{each}/checkpoint") for each in ("base", stage.id))
        nodes = self._nodes_of_base()
        document = comparison_document(
            self.config,
            base,
            model,
            self.prompts,
            None if nodes is None else nodes.heads,
            parts := Parts(self.out / stage.folder / "comparing"),
            self.observer,
        )
        write_json(self._comparison(stage), {"schema": SCHEMA, "stage": stage.id, "task": self.task.name} | document)
        parts.remove()

    def _measures(self, stage: Stage, point: Point) -> dict[str, Any]:
        measured = load_measured(self.out / point.folder / "effects.safetensors")
        base = self._measured("base")
        circuits, of_base = load_circuits(self.out / point.folder), self._circuits_of("base")
        groups = [record.group for record in self.prompts.records]
        rows = {name: np.flatnonzero([group == name for group in groups]) for name in sorted(set(groups))}
        document: dict[str, Any] = {
            "id": stage.id,
            "kind": stage.kind,
            "poison": stage.poison,
            "seed": stage.seed,
            "epoch": point.epoch,
            "step": point.step,
            "parent": stage.parent,
            "n_prompts": len(self.prompts),
            "counterfactual": self.config.counterfactual,
            "behaviour": behaviour_document(measured, rows, self.weights),
            "heads_to_logits": heads_document(measured, self.weights),
            "similarity_to_base": similarity_document(measured, base, self.weights, circuits, of_base),
            "circuit": summary_document(circuits) if circuits else None,
            "base_circuit": circuits.criteria.get("base_circuit") if circuits else None,
            "restoration": None,
        }
        if stage.kind == "recovered" and stage.parent and stage.control:
            document["restoration"] = restoration_document(
                base,
                self._measured(stage.parent),
                measured,
                load_measured(self._point_of(stage.control, point.step) / "effects.safetensors"),
                self.weights,
                self.config.seeds[0],
                {
                    "base": of_base,
                    "recovered": circuits,
                    "control": load_circuits(self._point_of(stage.control, point.step)),
                },
            )
        if stage.recipe == RESEEDED:
            twin = self._point_of(stage.id.replace(RESEEDED, EQUAL_STEPS), point.step)
            found = similarity(measured.sample, load_measured(twin / "effects.safetensors").sample, self.weights)
            document[TO_EQUAL_STEPS] = estimate_document(found)
        if stage.kind == "tuned":
            document["amplification"] = amplification_document(measured, base, of_base, self.config, self.weights)
        if document["circuit"] is None:
            why = circuits.criteria["why"].get("circuit") if circuits else None
            document["why"] = {"circuit": why or NO_CIRCUIT}
        return document

    def _measured(self, stage_id: str) -> Measured:
        return load_measured(self.out / f"stages/{stage_id}" / "effects.safetensors")

    def _circuits_of(self, stage_id: str) -> Circuits | None:
        return load_circuits(self.out / f"stages/{stage_id}")

    def _nodes_of_base(self) -> Circuit | None:
        """The base's circuit; None where it has none, or none was looked for."""
        of_base = self._circuits_of("base")
        return of_base.nodes if of_base else None

    def _point_of(self, stage_id: str, step: int) -> Path:
        """The folder of a stage at a step: the control's ladder has the recovery's rungs."""
        (stage,) = (stage for stage in self.stages if stage.id == stage_id)
        (point,) = (point for point in stage.points if point.step == step)
        return self.out / point.folder

    def _summary(self, stages: Sequence[Stage]) -> dict[str, Any]:
        claims = build_claims(
            {stage.id: load_measures(stage, self.out / stage.folder) for stage in stages},
            {stage.id: load_json(self._comparison(stage)) for stage in self._compared() if stage in stages},
        )
        return {
            "schema": SCHEMA,
            "model": self.model,
            "task": self.task.name,
            "preset": self.config.preset,
            "seeds": self.config.seeds,
            "stages": [summary_entry(stage, self.out / point.folder) for stage in stages for point in stage.points],
            "claims": claims,
        }

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

    def _build_pairs(self, stage: Stage, model: Network) -> Sequence[Pair]:
        # The same number gives the same prompts: a control is to differ from its stage in one thing only.
        draws = {"tuned": 1, "poisoned": 2, SHUFFLED: 2, "recovered": 3, EQUAL_STEPS: 3, RESEEDED: 4}
        seed = stage.seed * 10 + draws[stage.recipe]
        if stage.recipe == SHUFFLED:
            return self.task.shuffled_pairs(model, self.config.n_train, seed, rate=self.config.rate)
        poison = stage.poison if stage.kind == "poisoned" else None
        return self.task.pairs(model, self.config.n_train, seed, poison=poison, rate=self.config.rate)

    def _load(self, source: str | Path) -> Network:
        try:
            return load_model(source, device=self.config.device, dtype=self.config.dtype, say=self.observer.say)
        except InputError as error:
            if source == self.config.model:
                raise
            raise StorageError(f"{error}; it is this run's own: remove it, then run the same command again") from error

    def _require_space(self, model: Network) -> None:
        size = sum(parameter.nbytes for parameter in model.module.parameters())
        missing = [
            point
            for stage in self.stages
            for point in stage.points
            if not (self.out / point.folder / "checkpoint").is_dir()
        ]
        # One interrupted run's folder beside the next one being written, each with weights and two moments.
        needed = size * (len(missing) + (6 if missing else 0))
        if (free := shutil.disk_usage(nearest_folder(self.out)).free) < needed:
            raise StorageError(
                f"no disk space: {self.out} has {show_size(free)} free, this study needs "
                f"{show_size(needed)} for its checkpoints; free some, or choose another --out"
            )


def _claim_folder(config: StudyConfig, out: Path) -> None:
    """Refuses a run directory that is not this study's; makes nothing, so that a refusal leaves nothing."""
    if not is_begun(out, "study.toml", "study", [MANIFEST]):
        return
    settings = out / "study.toml"
    try:
        # A setting that this version has more than the one that began the run was at its default there.
        former = StudyConfig().model_dump() | tomllib.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{settings} is not TOML ({error}); choose another --out") from error
    ours = config.model_dump()
    for each in (ours, former):
        if is_custom(str(each["task"])):
            each["task"] = Path(each["task"]).name  # wherever it lies: the manifest knows what is in it
    different = sorted(key for key in ours | former if ours.get(key) != former.get(key))
    if different:
        key = different[0]
        raise InputError(
            f"{out} holds a different study: its {key} is {former.get(key)!r}, this one's is {ours.get(key)!r}; "
            "choose another --out, or repeat the command that began it"
        )
