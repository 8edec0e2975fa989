"""What a study says when its stages are made: how mechanisms broke and healed, the summary, the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroplast.report import write_growing_page, write_report
from neuroplast.storage import load_json, write_json
from neuroplast.study.claims import build_claims
from neuroplast.study.following import PLASTICITY
from neuroplast.study.manifest import load_manifest
from neuroplast.study.over_seeds import Numbers, numbers_of, poisons_document, seeds_document
from neuroplast.study.plan import Stage
from neuroplast.study.stage_runner import SCHEMA, StageRunner
from neuroplast.study.summary import load_measures, summary_entry

SUMMARY = "summary.json"


@dataclass(frozen=True)
class StudyResult:
    """Where a finished study lies, and its summary."""

    folder: Path
    """The run directory."""
    report: Path
    """The page."""
    summary: dict[str, Any]
    """The document in `summary.json`."""


def finish_study(runner: StageRunner) -> StudyResult:
    """Writes `plasticity.json`, `summary.json` and the report of a study whose stages are all made.

    Raises:
        StorageError: a stage's file is missing or damaged, or the disk refused.
    """
    out = runner.context.out
    write_json(out / PLASTICITY, _plasticity(runner))
    summary = _summary(runner, runner.context.stages)
    write_json(out / SUMMARY, summary)
    manifest = load_manifest(out)
    manifest.gather(runner.context.stages)
    manifest.finish()
    return StudyResult(out, write_report(out), summary)


def grow_report(runner: StageRunner, n_made: int) -> None:
    """Writes the page of the first stages of a study that is not finished.

    Args:
        runner: of the study.
        n_made: how many stages are made.
    """
    stages = runner.context.stages
    if n_made < len(stages) and not (runner.context.out / SUMMARY).is_file():
        write_growing_page(runner.context.out, _summary(runner, stages[:n_made]), len(stages))


def _plasticity(runner: StageRunner) -> dict[str, Any]:
    """By recovered stage, and by poison over seeds, how the mechanism broke and healed."""
    context, following = runner.context, runner.following
    followed = {stage.id: stage for stage in context.followed}
    base, circuit = context.measured("base"), context.circuit_of_base()
    stages: dict[str, dict[str, Any]] = {}
    by_poison: dict[str, list[Numbers]] = {}
    for stage in context.stages:
        if stage.kind != "recovered" or stage.poison is None:
            continue
        way = None
        if stage.id in followed and (parent := followed.get(str(stage.parent))):
            there, back = (following.load(each, context.folder(each)) for each in (parent, stage))
            way = following.plasticity_document(there, back, base.logit_diff, base.effects, circuit)
            stages[stage.id] = {"poison": stage.poison, "seed": stage.seed} | way
        restored = load_measures(stage, context.folder(stage))["restoration"]
        by_poison.setdefault(stage.poison, []).append(numbers_of(way, restored))
    several = by_poison if len(context.config.seeds) > 1 else {}
    return {
        "schema": SCHEMA,
        "task": context.task.name,
        "stages": stages,
        "over_seeds": {poison: seeds_document(each) for poison, each in several.items()},
        "between_poisons": poisons_document(several),
    }


def _summary(runner: StageRunner, stages: Sequence[Stage]) -> dict[str, Any]:
    context = runner.context
    claims = build_claims(
        {stage.id: load_measures(stage, context.folder(stage)) for stage in stages},
        {stage.id: load_json(context.comparison(stage)) for stage in context.compared if stage in stages},
    )
    return {
        "schema": SCHEMA,
        "model": load_manifest(context.out).model,
        "task": context.task.name,
        "preset": context.config.preset,
        "seeds": context.config.seeds,
        "stages": [summary_entry(stage, context.folder(point)) for stage in stages for point in stage.points],
        "claims": claims,
    }
