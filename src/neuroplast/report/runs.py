"""Several runs on one page: what each says of the findings, of every stage, and how alike their mechanisms are.

Runs are told apart by the names of their folders, with as much of the path as that takes. Head effects are compared
between runs of the same base weights, for elsewhere a head of one model is not that of the other; the correlation is
over all heads, of the means over prompts. For its interval the prompts are resampled, together where both runs measured
the same ones.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.errors import InputError
from neuroplast.reading import read_bytes, read_start
from neuroplast.report import style
from neuroplast.report.measured import load_measured
from neuroplast.report.page import RESTORATION_MEANING
from neuroplast.report.prompts import PROMPTS
from neuroplast.report.reading import load_results
from neuroplast.report.render import render
from neuroplast.report.results import Claim, Estimate, Stage, StudyResults
from neuroplast.report.timeline import TimelineWay, build_ways
from neuroplast.report.trajectories import Plasticity, load_followed, load_plasticity
from neuroplast.statistics import bootstrap_weights, interval, row_correlations
from neuroplast.storage import write_text

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a6a00", "#555c66")
"""One a run, after Okabe and Ito; the ninth has the first's."""
COLUMNS = ("run", "model", "task", "stage", "quantity", "value", "low", "high", "why")
MOST_PAIRED = 12
"""Runs of which all pairs are compared: their number grows with the square."""
GENERATOR = '<meta name="generator" content="neuroplast">'
"""What the first lines of every page of ours say."""


@dataclass(frozen=True)
class Run:
    """One run, read back."""

    name: str
    """What it is called on the page."""
    folder: Path
    """Where it is."""
    colour: str
    """Its colour in charts."""
    results: StudyResults
    """What it found."""
    ways: tuple[TimelineWay, ...]
    """Every measured moment of every model."""
    plasticity: tuple[Plasticity, ...]
    """How each poison broke the mechanism and how it healed."""

    @property
    def claims(self) -> dict[str, Claim]:
        """Its findings by id."""
        return {claim.id: claim for claim in self.results.claims}


@dataclass(frozen=True)
class Likeness:
    """How alike two stages' head effects are."""

    first: str
    """Run and stage."""
    second: str
    """Run and stage."""
    correlation: Estimate
    """Over all heads."""


def write_runs_page(folders: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """Compares finished runs on one page, and in one table beside it.

    Args:
        folders: run directories, two at least.
        out: the page, such as `runs.html`; the table has its name and ends in `.csv`.

    Returns:
        Paths of the page and of the table.

    Raises:
        InputError: fewer than two runs, one twice, one that is not finished, or a page that does not end in `.html`.
    """
    if out.suffix != ".html":
        raise InputError(f"--out must name a page that ends in .html, got {out}")
    resolved = [folder.resolve() for folder in folders]
    if len(resolved) < 2 or len(set(resolved)) < len(resolved):
        raise InputError(f"runs to compare: got {', '.join(map(str, folders))}; give two or more, each once")
    table = out.with_suffix(".csv")
    for path, ours in ((out, GENERATOR), (table, ",".join(COLUMNS))):
        _refuse_what_is_not_ours(path, ours)
    if any(folder in out.resolve().parents for folder in resolved):
        raise InputError(f"--out {out} lies in one of the runs: choose a page outside of them")
    runs = _load(folders)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row for run in runs for row in _rows(run))
    likeness = _likeness(runs)
    for each in likeness:
        low, high = each.correlation.interval or (None, None)
        found = (each.correlation.value, low, high, each.correlation.why)
        writer.writerow([each.first, "", "", "", f"correlation of head effects with {each.second}", *found])
    write_text(table, text.getvalue())
    write_text(out, _render(runs, likeness))
    return out, table


def _refuse_what_is_not_ours(path: Path, ours: str) -> None:
    """Refuses to write over a file that was not written by this command."""
    if path.exists() and not (path.is_file() and ours in read_start(path, 2000).decode(errors="replace")):
        raise InputError(f"{path} exists and is not a page of several runs, or its table: choose another --out")


def _load(folders: Sequence[Path]) -> tuple[Run, ...]:
    found: list[Run] = []
    for number, (folder, name) in enumerate(zip(folders, _names([each.resolve() for each in folders]), strict=True)):
        results = load_results(folder)
        followed = load_followed(folder, results)
        ways, plasticity = build_ways(folder, results, followed), load_plasticity(folder, results)
        found.append(Run(name, folder, COLOURS[number % len(COLOURS)], results, ways, plasticity))
    return tuple(found)


def _names(folders: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell all of them apart."""
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]


def _rows(run: Run) -> Iterator[list[str | float | None]]:
    """Rows of the table: findings, stages, restoration and every moment of one run."""
    results = run.results

    def row(stage: str, quantity: str, found: Estimate) -> list[str | float | None]:
        low, high = found.interval or (None, None)
        return [run.name, results.model, results.task, stage, quantity, found.value, low, high, found.why]

    for claim in results.claims:
        yield row("", f"claim/{claim.id}", claim.estimate)
    for stage in results.stages:
        yield row(stage.id, "logit_diff", stage.behaviour.logit_diff)
        yield row(stage.id, "accuracy", stage.behaviour.accuracy)
        yield row(stage.id, "similarity_to_base", stage.similarity)
        yield row(stage.id, "base_circuit_faithfulness", stage.base_circuit)
        for each in stage.restoration:
            yield row(stage.id, f"restoration/{each.name}", each.recovered)
            yield row(stage.id, f"restoration/{each.name}/control", each.control)
    for way in run.plasticity:
        for (direction, what), each in way.half_way.items():
            yield row(way.back.id, f"half_way_steps/{direction}/{what}", each)
    for way in run.ways:
        for moment in way.moments:
            place = f"step {moment.at} of {way.name}, seed {way.seed}"
            yield row(moment.stage, f"logit_diff at {place}", moment.logit_diff)
            yield row(moment.stage, f"similarity_to_base at {place}", moment.similarity)


def _render(runs: tuple[Run, ...], likeness: list[Likeness]) -> str:
    stages = dict.fromkeys(stage.id for run in runs for stage in style.reading_order(run.results))
    by_run = {run.name: {stage.id: stage for stage in run.results.stages} for run in runs}
    claims = {claim.id: claim.statement for run in runs for claim in run.results.claims}
    times = dict.fromkeys((way.back.id, *place) for run in runs for way in run.plasticity for place in way.half_way)
    return render(
        "runs.html.j2",
        runs=runs,
        claims=claims,
        stages=list(stages),
        by_run=by_run,
        restored=[name for name in stages if any(_restored(by_run[run.name].get(name)) for run in runs)],
        restoration_meaning=RESTORATION_MEANING,
        times=list(times),
        half_ways={
            run.name: {(way.back.id, *place): each for way in run.plasticity for place, each in way.half_way.items()}
            for run in runs
        },
        likeness=likeness,
        is_of_all_pairs=len(runs) <= MOST_PAIRED,
        stores={
            "scales": {"light": style.DIVERGING, "dark": style.DIVERGING_DARK},
            "runs-data": [_chart(run) for run in runs],
        },
    )


def _restored(stage: Stage | None) -> bool:
    return stage is not None and bool(stage.restoration)


def _likeness(runs: Sequence[Run]) -> list[Likeness]:
    """Of the stages that two runs have in common, and of base with base; where runs are many, of the first and each."""
    found: list[Likeness] = []
    for one, other in combinations(runs, 2) if len(runs) <= MOST_PAIRED else product(runs[:1], runs[1:]):
        if one.results.weights_sha256 is None or one.results.weights_sha256 != other.results.weights_sha256:
            continue
        theirs = {stage.id: stage for stage in other.results.stages}
        for stage in style.reading_order(one.results):
            if stage.id in theirs:
                first, second = (f"{run.name}: {stage.id}" for run in (one, other))
                found.append(Likeness(first, second, _correlation(one, stage, other, theirs[stage.id])))
    return found


def _correlation(one: Run, stage: Stage, other: Run, twin: Stage) -> Estimate:
    """Of two stages' mean head effects, with an interval where both runs keep them prompt by prompt."""
    value = row_correlations(*(np.ravel(each.effects.mean)[None] for each in (stage, twin)))[0]
    if not np.isfinite(value):
        return Estimate(None, None, "all heads have the same effect")
    shape = (one.results.n_layers, one.results.n_heads, None)
    same_prompts = _prompts_of(one) == _prompts_of(other)
    drawn: list[np.ndarray] = []
    for number, (run, each) in enumerate(((one, stage), (other, twin))):
        path = run.folder / f"stages/{each.id}/effects.safetensors"
        if not path.is_file():
            return Estimate(float(value), None)
        (effects,) = load_measured(path, {"effects": shape})
        weights = bootstrap_weights(effects.shape[2], 0 if same_prompts else number)
        drawn.append(weights @ effects.reshape(-1, effects.shape[2]).T)
    low, high = interval(row_correlations(*drawn))
    return Estimate(float(value), (float(low), float(high)))


def _prompts_of(run: Run) -> bytes | None:
    path = run.folder / PROMPTS
    return read_bytes(path) if path.is_file() else None


def _chart(run: Run) -> dict[str, Any]:
    """What the page's script draws of a run: the logit difference and the likeness to base along every way."""
    return {
        "name": run.name,
        "colour": run.colour,
        "ways": [
            {
                "name": way.name,
                "seed": way.seed,
                "moments": [
                    {
                        "stage": moment.stage,
                        "step": moment.step,
                        "at": moment.at,
                        "ld": moment.logit_diff.value,
                        "similarity": moment.similarity.value,
                    }
                    for moment in way.moments
                ],
            }
            for way in run.ways
        ],
    }
