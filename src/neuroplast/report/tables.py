"""The CSV tables of a report, at full precision; an empty field is a value that could not be computed."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from neuroplast.report.changes import TrainingPath, head_effects, sign_flips, training_paths
from neuroplast.report.results import RESTORATION_ROWS, Estimate, Stage, StudyResults, TrainingRow
from neuroplast.storage import write_text

Cell = str | float | int | None


def write_tables(results: StudyResults, folder: Path) -> None:
    """Writes `stages.csv`, `heads_to_logits.csv`, `sign_flips.csv` and `training.csv` into `folder`."""
    _write(folder / "stages.csv", [*_POINT, *_stage_columns()], map(_stage_row, results.points))
    _write(
        folder / "heads_to_logits.csv",
        [*_POINT, "head", "mean", "low", "high"],
        ([*_point(s), name, *_cells(effect)] for s in results.points for name, effect in head_effects(s)),
    )
    _write(
        folder / "sign_flips.csv",
        ["stage", "head", "base_mean", "base_low", "base_high", "mean", "low", "high"],
        (
            [stage.id, flip.head, *_cells(flip.base), *_cells(flip.effect)]
            for stage in results.stages
            for flip in sign_flips(stage, results.base_of(stage))
        ),
    )
    _write(
        folder / "training.csv",
        ["stage", "step", "step_from_base", "epoch", "loss", "learning_rate", "logit_diff", "accuracy"],
        (_training_row(path, row) for path in training_paths(results) for row in path.rows),
    )


_POINT = ("stage", "epoch", "step")


def _point(stage: Stage) -> list[Cell]:
    return [stage.id, stage.epoch, stage.step]


def _stage_columns() -> list[str]:
    names = ["logit_diff", "accuracy", "top1", "similarity_effects", "nodes_jaccard", "edges_jaccard"]
    names += [f"{who}_{row}" for row in RESTORATION_ROWS for who in ("restoration", "control")]
    plain = ["kind", "poison", "seed", "parent", "n_prompts", "counterfactual"]
    plain += ["foil_top1", "answer_probability"]
    return plain + [name + end for name in names for end in ("", "_low", "_high")]


def _stage_row(stage: Stage) -> list[Cell]:
    did, missing = stage.behaviour, Estimate(None)
    rows = {row.name: row for row in stage.restoration}
    estimates = [did.logit_diff, did.accuracy, did.top1]
    estimates += [stage.similarity, stage.nodes_jaccard, stage.edges_jaccard]
    for name in RESTORATION_ROWS:
        row = rows.get(name)
        estimates += [row.recovered, row.control] if row else [missing, missing]
    plain: list[Cell] = [stage.kind, stage.poison, stage.seed, stage.parent]
    plain += [stage.n_prompts, stage.counterfactual, did.foil_top1, did.answer_probability]
    return [*_point(stage), *plain, *(cell for estimate in estimates for cell in _cells(estimate))]


def _training_row(path: TrainingPath, row: TrainingRow) -> list[Cell]:
    logged = (row.epoch, row.loss, row.learning_rate, row.logit_diff, row.accuracy)
    return [path.stage.id, row.step, path.start + row.step, *logged]


def _cells(estimate: Estimate) -> tuple[float | None, float | None, float | None]:
    low, high = estimate.interval or (None, None)
    return estimate.value, low, high


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
