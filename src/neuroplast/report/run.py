"""The report of a run: reads it, writes the tables and the figures, and fills the page."""

import base64
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuroplast.links import require_inside
from neuroplast.reading import read_bytes
from neuroplast.report import style
from neuroplast.report.audit import draw_audit
from neuroplast.report.circuit import draw_circuit
from neuroplast.report.documents import Document
from neuroplast.report.figures import write_both, write_figures
from neuroplast.report.looks import load_looks
from neuroplast.report.page import Content, drawing_of, render_page, shown_circuits
from neuroplast.report.paper import write_paper_tables
from neuroplast.report.places import load_places
from neuroplast.report.prompts import load_prompts
from neuroplast.report.reading import load_results
from neuroplast.report.results import StudyResults
from neuroplast.report.seeds import load_over_seeds
from neuroplast.report.tables import write_plasticity_tables, write_prompt_table, write_tables
from neuroplast.report.timeline import build_ways
from neuroplast.report.trajectories import FollowedStage, load_followed, load_plasticity, write_trajectory_figures
from neuroplast.storage import write_text


def write_report(run: Path) -> Path:
    """Writes the page, the figures and the tables of a finished run, replacing earlier ones.

    Only saved results are read; the same results give the same bytes.

    Args:
        run: the run directory.

    Returns:
        Path of the page, `run/report.html`.

    Raises:
        InputError: when the directory is no finished run, or holds a link that leads out of it.
        StorageError: when it cannot be written to.
    """
    require_inside(run, "run directory")
    results = load_results(run)
    followed = load_followed(run, results)
    content, compared = _read(run, results, followed)
    write_tables(results, run / "tables")
    write_prompt_table(content.prompts, content.on_prompts, run / "tables")
    write_paper_tables(run, results)
    ways = load_plasticity(run, results)
    write_plasticity_tables(followed.values(), ways, content.over_seeds, run / "tables")
    write_figures(results, run / "figures")
    _write_drawings(results, run / "figures")
    _write_comparisons(compared, run / "figures")
    drawn = write_trajectory_figures(ways, run / "figures")
    pictures = tuple((each, _data_address(drawn[each.back.id])) for each in ways)
    return _write_page(run, replace(content, ways=pictures))


def write_growing_page(run: Path, summary: Mapping[str, Any], n_stages: int) -> Path:
    """Writes the page of a study that is still running, without tables and figures.

    Args:
        run: the run directory.
        summary: what `summary.json` would hold if the study ended with the stages that are measured.
        n_stages: stages of the whole study.

    Returns:
        Path of the page, `run/report.html`; the finished study's replaces it.
    """
    known = [claim for claim in summary["claims"] if claim["value"] is not None]
    results = load_results(run, Document("summary", {**summary, "claims": known}))
    content, _ = _read(run, results, load_followed(run, results))
    return _write_page(run, replace(content, missing=n_stages - len(results.stages)))


def _read(
    run: Path, results: StudyResults, followed: Mapping[str, FollowedStage]
) -> tuple[Content, dict[str, Mapping[str, Any]]]:
    """What a page shows, but for the pictures; and the comparisons that can be drawn, by stage."""
    order = style.reading_order(results)
    prompts, on_prompts = load_prompts(run, order)
    places, not_compared, compared = load_places(run, order, has_circuit=order[0].circuit is not None)
    content = Content(
        results=results,
        circuits=shown_circuits(results),
        over_seeds=load_over_seeds(run),
        timeline=build_ways(run, results, followed),
        looks=load_looks(run, order),
        prompts=prompts,
        on_prompts=on_prompts,
        places=places,
        not_compared=not_compared,
    )
    return content, compared


def _write_page(run: Path, content: Content) -> Path:
    page = run / "report.html"
    write_text(page, render_page(content))
    return page


def _write_comparisons(documents: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Draws the comparison of every stage that was compared with base."""
    for stage, document in documents.items():
        write_both(draw_audit(document), folder / f"comparison-{stage.replace('/', '-')}")


def _write_drawings(results: StudyResults, folder: Path) -> None:
    """Draws the circuit of every final stage that has one."""
    for stage in results.stages:
        if stage.circuit:
            circuit = stage.circuit.found
            named = replace(circuit, shape=replace(circuit.shape, name=f"{stage.id} · {circuit.shape.name}"))
            write_both(draw_circuit(named), folder / drawing_of(stage))


def _data_address(path: Path) -> str:
    """An SVG inside an image runs no script and asks for nothing, whatever its texts say."""
    return "data:image/svg+xml;base64," + base64.b64encode(read_bytes(path)).decode()
