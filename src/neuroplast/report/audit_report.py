"""The files of a comparison of two checkpoints: page, table, picture and JUnit file, from its saved document alone."""

import base64
import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from neuroplast.report import style
from neuroplast.report.audit import PART_COLUMNS, build_junit, draw_audit, part_rows
from neuroplast.report.places import build_place, map_data, maps_data
from neuroplast.report.render import render
from neuroplast.storage import atomic_file, write_text

AUDIT_FILES = ("parts.csv", "audit.png", "audit.html", "junit.xml")

Document = Mapping[str, Any]


def write_audit_report(document: Document, folder: Path) -> None:
    """Writes `AUDIT_FILES` beside a comparison; of checkpoints that are the same, the picture is empty.

    Raises:
        StorageError: when the folder cannot be written.
    """
    junit = build_junit(document)
    changed = document["verdict"]["label"] != "unchanged"
    rows, figure = (part_rows(document), draw_audit(document)) if changed else ([], None)
    page = render_audit(document, figure)
    write_text(folder / "junit.xml", junit)
    write_text(folder / "audit.html", page)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([PART_COLUMNS, *rows])
    write_text(folder / "parts.csv", text.getvalue())
    with atomic_file(folder / "audit.png") as temporary:
        FigureCanvasAgg(figure or Figure()).print_png(temporary)


def render_audit(document: Document, figure: Figure | None) -> str:
    """The self-contained page.

    Args:
        document: the comparison.
        figure: its picture; None where nothing changed.
    """
    picture = None
    if figure is not None:
        drawn = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None})
        picture = "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode()
    place = build_place(document, "audit", "tuned", "the circuit’s heads")
    maps = maps_data([place])
    if "maps" in document:
        effects = {name: np.array(document["maps"][f"effects_{name}"], dtype=float) for name in ("start", "end")}
        bound = max(float(np.abs(grid).max()) for grid in effects.values()) or 1.0
        said = {"start": "before", "end": "after"}
        maps |= {
            f"audit/{name}": map_data(grid, f"Effects of all heads, {said[name]}", "effect", bound)
            for name, grid in effects.items()
        }
    stores = {"scales": {"light": style.DIVERGING, "dark": style.DIVERGING_DARK}, "places-data": maps}
    return render("audit.html.j2", document=document, picture=picture, place=place, stores=stores)
