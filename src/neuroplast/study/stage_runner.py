"""Makes the files of a stage, in order, and makes nothing that is there.

A stage's files appear in this order, each whole or not at all: `trajectory/` while it is trained, `checkpoint/`,
`effects.safetensors`, its circuits, `measures.json`, `trajectory.json`, `heads.json`, `comparison.json`. All that a
file depends on is the settings and the files before it, so a stage that was interrupted, or whose files were damaged,
ends with the same numbers.
"""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.circuits.evaluate import estimate_document
from neuroplast.errors import StorageError
from neuroplast.locks import FOREVER, PATIENCE, writing
from neuroplast.models.network import Network
from neuroplast.models.sources import weights_sha256
from neuroplast.plasticity.restoration import similarity
from neuroplast.report.looks import HEADS, PATTERNS
from neuroplast.storage import Parts, write_json, write_jsonl
from neuroplast.study.artefacts import Artefacts, pairs_file
from neuroplast.study.circuits import NO_CIRCUIT, CircuitStudy, load_circuits, summary_document
from neuroplast.study.context import Context
from neuroplast.study.following import TRAJECTORY, FollowStudy
from neuroplast.study.heads import choose_heads, run_look
from neuroplast.study.measure import (
    amplification_document,
    behaviour_document,
    comparison_document,
    heads_document,
    load_measured,
    restoration_document,
    run_measurement,
    similarity_document,
)
from neuroplast.study.plan import Point, Stage
from neuroplast.study.remaining import remaining
from neuroplast.study.summary import TO_EQUAL_STEPS
from neuroplast.training.data import build_examples
from neuroplast.training.finetune import FinetuneConfig, finetune
from neuroplast.training.saves import load_note, save_checkpoint
from neuroplast.training.train import behaviour_probe

SCHEMA = 1


class StageRunner:
    """Makes the stages of one study."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.circuits = CircuitStudy(context.config, context.prompts, context.reference, context.observer)
        self.following = FollowStudy(context.config, context.prompts, context.observer)

    def run(self, stage: Stage, like: Path | None = None) -> bool:
        """Makes what is missing of a stage, and what is damaged again.

        Args:
            stage: its parent, control and base are whole.
            like: a run directory of which the very stage is taken over where nothing of it is there yet.

        Returns:
            Whether anything was made.

        Raises:
            InputError: when another process still writes it.
            TrainingDivergedError: the fine-tuning's loss stopped being a number.
            StorageError: the disk refused.
        """
        context = self.context
        folder = context.folder(stage)
        with writing(folder, wait=PATIENCE):
            artefacts = Artefacts(context.out, stage.id)
            if like is not None:
                artefacts.adopt(Artefacts(like, stage.id))
            if not artefacts.is_noted and stage.parent is not None and not self._is_of_parent(stage):
                artefacts.forget()
            if damage := artefacts.check({each: Artefacts(context.out, each).digest for each in stage.needs}):
                context.observer.say(damage)
            elif remaining(context.config, stage, context.out).state == "made":
                artefacts.note()
                return False
            if not self._make(stage, artefacts):
                context.observer.say(f"{folder} holds what was made from another file: the whole stage is made again")
                artefacts.forget()
                self._make(stage, artefacts)
            return True

    def _is_of_parent(self, stage: Stage) -> bool:
        """Whether a training that nothing is noted of began from the parent that there is now."""
        path = self.context.folder(stage) / "training.json"
        if not path.is_file() or stage.parent is None:
            return True
        return load_note(path).get("start_sha256") == weights_sha256(self._load_stage(stage.parent))

    def _make(self, stage: Stage, artefacts: Artefacts) -> bool:
        """Makes what is missing; False where something that was made again is not what it was."""
        context = self.context
        steps = [
            lambda: self._train(stage),
            *(lambda point=point: self._measure(stage, point) for point in stage.points),
        ]
        if stage in context.followed:
            steps.append(lambda: self._follow(stage))
        if stage.kind in context.config.look_stages:
            steps.append(lambda: self._look(stage))
        if stage in context.compared:
            steps.append(lambda: self._compare(stage))
        for step in steps:
            started, self.following.seconds = time.monotonic(), 0.0
            step()
            if not artefacts.note(time.monotonic() - started, self.following.seconds):
                return False
        return True

    def _load_stage(self, stage_id: str) -> Network:
        """The model of another stage; a checkpoint that was removed on purpose is made again."""
        context = self.context
        stage = context.stage(stage_id)
        folder = context.folder(stage)
        if not (folder / "checkpoint").is_dir():
            # Another of its children may be at it, which takes as long as a training.
            with writing(folder, wait=FOREVER):
                artefacts = Artefacts(context.out, stage_id)
                artefacts.check({each: Artefacts(context.out, each).digest for each in stage.needs})
                self._train(stage)
                if not artefacts.note():
                    raise StorageError(
                        f"{folder / 'checkpoint'} was removed (keep = {context.config.keep}), and made again it is not "
                        f"what it was; remove {folder}, then run the same command again"
                    )
        return context.load(folder / "checkpoint")

    def _train(self, stage: Stage) -> None:
        context, config = self.context, self.context.config
        folder = context.folder(stage)
        rungs = [context.folder(point) for point in stage.points[:-1]]
        pairs_path = pairs_file(context.out, stage.id)
        is_trained = (folder / "checkpoint").is_dir() and all(
            (rung / "checkpoint").is_dir() or (rung / "measures.json").is_file() for rung in rungs
        )
        if is_trained:
            shutil.rmtree(folder / "resume", ignore_errors=True)
        if is_trained and (stage.parent is None or pairs_path.is_file()):
            return
        if stage.parent is None:
            return save_checkpoint(context.load(config.model), folder / "checkpoint")
        model = self._load_stage(stage.parent)
        pairs = context.build_pairs(stage, model)
        write_jsonl(pairs_path, map(asdict, pairs))
        if is_trained:
            return
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
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
            keep={point.step: rung / "checkpoint" for point, rung in zip(stage.points[:-1], rungs, strict=True)},
            probe=behaviour_probe(context.prompts),
            visit=self.following.visit(stage, folder, context.circuit_of_base()),
            progress=lambda done, total, loss: context.observer.progress(
                "fine-tuning", done, total, f"loss {loss:.3f}"
            ),
            say=context.observer.say,
        )

    def _measure(self, stage: Stage, point: Point) -> None:
        context = self.context
        folder = context.folder(point)
        if (folder / "measures.json").is_file():
            return
        effects = folder / "effects.safetensors"
        own, of_base = stage.kind in context.config.circuit_stages, context.circuit_of_base()
        if effects.is_file() and not own and of_base is None:
            return write_json(folder / "measures.json", self._measures(stage, point))
        model = context.load(folder / "checkpoint")
        sha256 = weights_sha256(model)
        if not effects.is_file():
            metadata = {
                "stage": stage.id,
                "step": str(point.step),
                "weights_sha256": sha256,
                "sign": "LD(patched) - LD(clean); negative: the head helps",
                "position": "end",
                "counterfactual": context.config.counterfactual,
            }
            run_measurement(
                model,
                context.prompts,
                effects,
                metadata,
                lambda done, total: context.observer.progress("path patching", done, total),
            )
        if own or of_base is not None:
            clean = stage.kind in ("recovered", "control")
            self.circuits.measure(
                folder,
                model,
                None if stage.kind == "base" else of_base,
                (lambda: self._load_stage("base")) if clean else None,
                sha256,
                own=own,
            )
        write_json(folder / "measures.json", self._measures(stage, point))

    def _follow(self, stage: Stage) -> None:
        """Writes the means of what was measured on the way."""
        context = self.context
        folder = context.folder(stage)
        found = self.following.load(stage, folder)
        effects = context.measured("base").effects
        document = self.following.trajectory_document(found, effects, context.circuit_of_base())
        write_json(folder / TRAJECTORY, {"schema": SCHEMA, "stage": stage.id} | document)

    def _look(self, stage: Stage) -> None:
        """Writes what single heads do."""
        context = self.context
        folder = context.folder(stage)
        if all((folder / name).is_file() for name in (PATTERNS, HEADS)):
            return
        own = context.circuits_of(stage.id)
        circuits = [context.circuit_of_base(), own.nodes if own else None]
        heads = choose_heads(circuits, context.measured(stage.id).effects)
        model = context.load(folder / "checkpoint")
        run_look(model, context.prompts, heads, context.config.look_prompts, context.weights, folder)

    def _compare(self, stage: Stage) -> None:
        context = self.context
        if context.comparison(stage).is_file():
            return
        nodes = context.circuit_of_base()
        document = comparison_document(
            context.config,
            self._load_stage("base"),
            context.load(context.folder(stage) / "checkpoint"),
            context.prompts,
            None if nodes is None else nodes.heads,
            parts := Parts(context.folder(stage) / "comparing"),
            context.observer,
        )
        about = {"schema": SCHEMA, "stage": stage.id, "task": context.task.name}
        write_json(context.comparison(stage), about | document)
        parts.remove()

    def _measures(self, stage: Stage, point: Point) -> dict[str, Any]:
        context = self.context
        measured = load_measured(context.folder(point) / "effects.safetensors")
        base = context.measured("base")
        circuits, of_base = load_circuits(context.folder(point)), context.circuits_of("base")
        groups = [record.group for record in context.prompts.records]
        rows = {name: np.flatnonzero([group == name for group in groups]) for name in sorted(set(groups))}
        document: dict[str, Any] = {
            "id": stage.id,
            "kind": stage.kind,
            "poison": stage.poison,
            "seed": stage.seed,
            "epoch": point.epoch,
            "step": point.step,
            "parent": stage.parent,
            "n_prompts": len(context.prompts),
            "counterfactual": context.config.counterfactual,
            "behaviour": behaviour_document(measured, rows, context.weights),
            "heads_to_logits": heads_document(measured, context.weights),
            "similarity_to_base": similarity_document(measured, base, context.weights, circuits, of_base),
            "circuit": summary_document(circuits) if circuits else None,
            "base_circuit": circuits.criteria.get("base_circuit") if circuits else None,
            "restoration": None,
        }
        if stage.kind == "recovered" and stage.parent and stage.control:
            control = context.point_of(stage.control, point.step)
            document["restoration"] = restoration_document(
                base,
                context.measured(stage.parent),
                measured,
                load_measured(control / "effects.safetensors"),
                context.weights,
                context.config.seeds[0],
                {"base": of_base, "recovered": circuits, "control": load_circuits(control)},
            )
        if stage.twin is not None:
            twin = load_measured(context.point_of(stage.twin, point.step) / "effects.safetensors")
            found = similarity(measured.sample, twin.sample, context.weights)
            document[TO_EQUAL_STEPS] = estimate_document(found)
        if stage.kind == "tuned":
            document["amplification"] = amplification_document(measured, base, of_base, context.config, context.weights)
        if document["circuit"] is None:
            why = circuits.criteria["why"].get("circuit") if circuits else None
            document["why"] = {"circuit": why or NO_CIRCUIT}
        return document
