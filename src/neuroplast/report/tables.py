"""The CSV tables of a report, at full precision; an empty field is a value that could not be computed."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from neuroplast.report.changes import TrainingPath, head_effects, node_frequency, sign_flips, training_paths
from neuroplast.report.prompts import OnPrompts, Prompt, prompt_rows
from neuroplast.report.results import RESTORATION_ROWS, Estimate, Stage, StudyResults, TrainingRow
from neuroplast.report.seeds import OverSeeds, seeds_rows
from neuroplast.report.trajectories import FollowedStage, Plasticity, plasticity_rows, trajectory_rows
from neuroplast.storage import write_text

Cell = str | float | int | None


def write_tables(results: StudyResults, folder: Path) -> None:
    """Writes the tables into `folder`: `stages.csv`, `heads_to_logits.csv`, `sign_flips.csv`, `training.csv`,
    `circuits.csv` and `circuit_nodes.csv`.
    """
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
    _write(folder / "circuits.csv", [*_POINT, *_CIRCUIT_COLUMNS], map(_circuit_row, results.points))
    _write(
        folder / "circuit_nodes.csv",
        [*_POINT, "node", "layer", "head", "position", "score", "role", "why", "frequency"],
        (row for point in results.points for row in _node_rows(point)),
    )


def write_prompt_table(prompts: Sequence[Prompt], on: dict[str, OnPrompts], folder: Path) -> None:
    """Writes `prompts.csv`, every stage on every prompt; nothing where the run does not keep its prompts."""
    if prompts:
        columns = ["stage", "prompt", "text", "answer", "foil", "template", "group"]
        _write(folder / "prompts.csv", [*columns, "logit_diff", "answer_probability"], prompt_rows(prompts, on))


def write_plasticity_tables(
    followed: Iterable[FollowedStage], found: Iterable[Plasticity], over_seeds: tuple[OverSeeds, ...], folder: Path
) -> None:
    """Writes `trajectories.csv`, `plasticity.csv` and `seeds.csv`; headers alone where there is nothing to tell."""
    estimate = ["value", "low", "high"]
    _write(
        folder / "trajectories.csv", ["stage", "step", "role", "quantity", *estimate, "why"], trajectory_rows(followed)
    )
    random = ["random_mean", "random_sd", "p"]
    _write(folder / "plasticity.csv", ["stage", "role", "quantity", *estimate, *random, "why"], plasticity_rows(found))
    _write(folder / "seeds.csv", ["of", "n_seeds", "quantity", *estimate, "why"], seeds_rows(over_seeds))


_POINT = ("stage", "epoch", "step")


def _point(stage: Stage) -> list[Cell]:
    return [stage.id, stage.epoch, stage.step]


def _stage_columns() -> list[str]:
    names = [
        "logit_diff",
        "accuracy",
        "top1",
        "similarity_effects",
        "similarity_to_equal_steps",
        "nodes_jaccard",
        "edges_jaccard",
    ]
    names += [f"{who}_{row}" for row in RESTORATION_ROWS for who in ("restoration", "control")]
    plain = ["kind", "poison", "seed", "parent", "n_prompts", "counterfactual"]
    plain += ["foil_top1", "answer_probability", "prob_diff"]
    return plain + [name + end for name in names for end in ("", "_low", "_high")]


def _stage_row(stage: Stage) -> list[Cell]:
    did, missing = stage.behaviour, Estimate(None)
    rows = {row.name: row for row in stage.restoration}
    estimates = [did.logit_diff, did.accuracy, did.top1]
    estimates += [stage.similarity, stage.similarity_to_equal_steps, stage.nodes.shared, stage.edges.shared]
    for name in RESTORATION_ROWS:
        row = rows.get(name)
        estimates += [row.recovered, row.control] if row else [missing, missing]
    plain: list[Cell] = [stage.kind, stage.poison, stage.seed, stage.parent]
    plain += [stage.n_prompts, stage.counterfactual, did.foil_top1, did.answer_probability, did.prob_diff]
    return [*_point(stage), *plain, *(cell for estimate in estimates for cell in _cells(estimate))]


_CIRCUIT_COLUMNS = (
    *("n_nodes", "n_edges", "sparsity", "minimality_passing", "random_n", "random_mean", "random_max", "random_unit"),
    *("nodes_floor", "edges_floor", "edge_circuit_jaccard"),
    *(
        name + end
        for name in (
            *("F_model", "F_circuit", "F_nothing", "faithfulness", "foil_faithfulness", "completeness_gap"),
            *("minimality_min", "stability_nodes", "stability_edges", "nodes_jaccard", "edges_jaccard"),
            *("base_circuit_faithfulness", "base_circuit_foil_faithfulness", "transfer_faithfulness"),
        )
        for end in ("", "_low", "_high")
    ),
    *("why", "methodology"),
)


def _circuit_row(stage: Stage) -> list[Cell]:
    counts: list[Cell] = [None] * 8
    judged = [Estimate(None)] * 9
    methodology = None
    if stage.circuit:
        found, criteria = stage.circuit.found, stage.circuit.criteria
        random = criteria.random
        counts = [len(found.heads), len(found.edges), found.sparsity(), criteria.passing]
        counts += [random.n, random.mean, random.largest, random.unit]
        judged = [criteria.model, criteria.circuit, criteria.nothing, criteria.faithfulness]
        judged += [criteria.foil_faithfulness, criteria.completeness_gap, criteria.minimality]
        judged += [criteria.stability, criteria.edge_stability]
        methodology = criteria.methodology
    judged += [stage.nodes.shared, stage.edges.shared, stage.base_circuit, stage.base_circuit_foil, stage.transfer]
    cells = [cell for estimate in judged for cell in _cells(estimate)]
    floors = [stage.nodes.floor, stage.edges.floor, stage.edge_circuit_jaccard]
    return [*_point(stage), *counts, *floors, *cells, stage.why_no_circuit, methodology]


def _node_rows(stage: Stage) -> Iterable[list[Cell]]:
    if stage.circuit is None:
        return
    circuit = stage.circuit.found
    frequency = node_frequency(circuit)
    for node, score in circuit.nodes.items():
        role = circuit.roles.get(node)
        name, why = (role.name, role.why) if role else (None, None)
        place = (str(node), node.layer, node.head, node.position)
        yield [*_point(stage), *place, score, name, why, frequency.get(str(node))]


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
