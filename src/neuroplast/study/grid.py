"""A grid: one study for every combination of models, tasks, poisons, rates, seeds, or any other setting.

A file of settings with a table `[grid]` is a grid. Its keys are settings, `model`, `task`, `poison`, `rate` and `seed`
also in the plural, and its values lists; what stands above the table holds for all cells:

    preset = "smoke"

    [grid]
    models = ["tiny"]
    poisons = ["subject_duplication", "name_moving"]
    rates = [0.5, 1.0]
    seeds = [0, 1, 2]

Every cell is a run directory of its own, `cells/<name>`, as `study` makes it of the same settings. The grid's folder
has beside them `grid.toml` (the settings), `grid.json` (what came of every cell), and `grid.html` with `grid.csv`, the
cells beside each other.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast, get_origin

import tomli_w

from neuroplast.errors import InputError, NeuroplastError, unknown_name
from neuroplast.locks import writing
from neuroplast.observer import Observer
from neuroplast.report import write_runs_page
from neuroplast.storage import hash_text, is_begun, load_json, write_json, write_text
from neuroplast.study.jobs import Backend, Cell, run_cells
from neuroplast.study.outcome import SUMMARY
from neuroplast.study.plan import StudyConfig, build_config

TABLE = "grid"
SETTINGS, RESULT, PAGE = "grid.toml", "grid.json", "grid.html"
SCHEMA = 1
PLURALS = {"models": "model", "tasks": "task", "poison": "poisons", "rates": "rate", "seed": "seeds"}
"""What else an axis may be called, and the setting that it is."""
LISTS = {name for name, field in StudyConfig.model_fields.items() if get_origin(field.annotation) is list}
"""Settings that are lists: one value of such an axis is a list of one."""
PLAIN = re.compile(r"[\w+-][\w.+-]{,59}")
"""A value that can be in a folder's name as it is."""
MOST_CELLS = 10_000


@dataclass(frozen=True)
class Grid:
    """The studies of a grid."""

    cells: tuple[Cell, ...]
    """A study for each combination."""
    values: tuple[Mapping[str, Any], ...]
    """By axis, the value of each cell."""
    document: Mapping[str, Any]
    """The settings, as `grid.toml` has them."""


def is_grid(document: Mapping[str, Any]) -> bool:
    """Whether settings are those of a grid."""
    return TABLE in document


def build_grid(
    document: Mapping[str, Any],
    out: Path,
    given: Mapping[str, Any],
    assignments: Sequence[str] = (),
) -> Grid:
    """The studies of a grid.

    Args:
        document: settings with a table `[grid]`.
        out: the grid's folder.
        given: settings that hold for all cells, and win over those above the table.
        assignments: `key=value`, likewise.

    Raises:
        InputError: a setting that is no axis, an axis that is no list or has no or equal values, one that is also set
            for all, a combination that is no study.
    """
    axes = _axes(document[TABLE])
    common = {name: value for name, value in document.items() if name != TABLE}
    for name in axes:
        if name in {**common, **given} or any(each.partition("=")[0].strip() == name for each in assignments):
            raise InputError(f"{name} is an axis of the grid and set for all cells too: leave one of them out")
    n = 1
    for values in axes.values():
        n *= len(values)
    if n > MOST_CELLS:
        raise InputError(f"the grid has {n} cells; expected at most {MOST_CELLS}: take fewer values")
    cells: list[Cell] = []
    places: list[Mapping[str, Any]] = []
    for combination in product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        settings = {name: _setting(name, value) for name, value in values.items()}
        name = "-".join(_part(axis, value) for axis, value in values.items())
        try:
            # One thread a stage, whatever the machine: then it rounds the same wherever it runs.
            config = build_config("quick", {"threads": 1}, common, given, settings, assignments=assignments)
        except InputError as error:
            raise InputError(f"cell {name}: {error}") from error
        if any(name == cell.name for cell in cells):
            raise InputError(f"two cells of the grid would be called {name}: leave one of their values out")
        cells.append(Cell(name, config, out / "cells" / name))
        places.append(values)
    return Grid(tuple(cells), tuple(places), document)


def run_grid(grid: Grid, out: Path, backend: Backend, observer: Observer) -> dict[str, Any]:
    """Runs, or continues, the studies of a grid.

    Args:
        grid: which.
        out: its folder; new, empty, or of a grid, whose other cells stay.
        backend: who runs the stages.
        observer: is told how it goes.

    Returns:
        What `grid.json` holds: every cell with its values, whether it finished or why not, the logit difference of
        its stages, what came back, and its claims.

    Raises:
        InputError: `out` holds something else, or another process writes it.
        StorageError: the disk refused.
    """
    is_begun(out, SETTINGS, "grid")
    with writing(out):
        write_text(out / SETTINGS, tomli_w.dumps(grid.document))
        failed = run_cells(grid.cells, backend, observer)
    rows = [_row(cell, values, failed.get(cell.name)) for cell, values in zip(grid.cells, grid.values, strict=True)]
    return {"schema": SCHEMA, "n_cells": len(rows), "n_failed": len(failed), "cells": rows}


def write_grid(grid: Grid, out: Path, result: Mapping[str, Any]) -> None:
    """Writes what came of a grid, and its cells beside each other.

    Args:
        grid: which.
        out: its folder.
        result: from `run_grid`.

    Raises:
        StorageError: the disk refused.
    """
    write_json(out / RESULT, result)
    status = {cell["name"]: cell["status"] for cell in result["cells"]}
    finished = [cell.out for cell in grid.cells if status[cell.name] == "finished"]
    if len(finished) > 1:
        write_runs_page(finished, out / PAGE)


def _axes(table: Any) -> dict[str, list[Any]]:
    if not isinstance(table, dict) or not table:
        raise InputError(f"grid = {table!r}: expected a table with at least one axis, such as seeds = [0, 1, 2]")
    axes: dict[str, list[Any]] = {}
    for key, values in cast(dict[str, Any], table).items():
        name = PLURALS.get(key, key)
        if name not in StudyConfig.model_fields:
            raise unknown_name("axis", key, (*StudyConfig.model_fields, *PLURALS))
        if name in axes:
            raise InputError(f"axis {name} is named twice, once as {key}: leave one out")
        if not isinstance(values, list) or not values:
            raise InputError(f"axis {key} = {values!r}: expected a list of values")
        known = cast(list[Any], values)
        if any(value in known[:index] for index, value in enumerate(known)):
            raise InputError(f"axis {key} = {values!r}: each value may be named once")
        axes[name] = known
    return axes


def _setting(name: str, value: Any) -> Any:
    return [value] if name in LISTS and not isinstance(value, list) else value


def _part(axis: str, value: Any) -> str:
    """A value in a cell's name; words speak for themselves, numbers say of what they are."""
    values: list[Any] = value if isinstance(value, list) else [value]
    text = "+".join(map(str, values))
    if not PLAIN.fullmatch(text):  # a path, say: its last part alone may be that of another one, too
        text = f"{re.sub(r'[^a-zA-Z0-9]+', '_', Path(text).stem)[-40:].strip('_')}-{hash_text(text)[:6]}"
    return text if axis in ("model", "task", "poisons") else f"{axis.removesuffix('s')}{text}"


def _row(cell: Cell, values: Mapping[str, Any], error: NeuroplastError | None) -> dict[str, Any]:
    about = {"name": cell.name, "folder": f"cells/{cell.name}", "values": dict(values)}
    if error is not None:
        return about | {"status": "failed", "why": str(error)}
    summary = load_json(cell.out / SUMMARY)
    stages = [
        {
            "id": stage["id"],
            "kind": stage["kind"],
            "step": stage["step"],
            "logit_diff": stage["behaviour"]["logit_diff"],
            "damage_undone": _damage_undone(stage["restoration"]),
        }
        for stage in summary["stages"]
    ]
    claims = {claim["id"]: claim["supported"] for claim in summary["claims"]}
    return about | {"status": "finished", "stages": stages, "claims": claims}


def _damage_undone(restoration: Mapping[str, Any] | None) -> dict[str, Any]:
    if restoration is None:
        return {"value": None, "ci95": None, "why": "only a recovered stage has one"}
    name = "damage_undone"
    return {
        "value": restoration[name],
        "ci95": restoration["ci95"].get(name),
        "why": restoration["why"].get(name),
    }
