"""How little is enough, as a table and a picture."""

# pyright: reportUnknownMemberType=false
# matplotlib passes its **kwargs on untyped.

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuroplast.report.figures import DPI, tidy, write_drawing
from neuroplast.report.repair import RESTORED_COLUMNS, restored_cells
from neuroplast.storage import write_text

TABLE, PICTURE = DOSE_FILES = ("dose.csv", "dose.png")
ROWS = {"behaviour": ("#0072b2", "o"), "damage_undone": ("#d55e00", "s")}
"""What is drawn, with colour and marker, after Okabe and Ito."""
CURVES = {"by_examples": "examples", "by_rate": "rate"}

Document = Mapping[str, Any]


def write_dose_report(document: Document, out: Path) -> None:
    """Writes the table and the picture of both curves.

    Args:
        document: what `run_dose` gives.
        out: the folder.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["curve", "at", *RESTORED_COLUMNS, *(f"poisoned_{name}" for name in RESTORED_COLUMNS)])
    for curve, name in CURVES.items():
        for point in document[curve]:
            poisoned = restored_cells(point["poisoned"]) if "poisoned" in point else [None] * len(RESTORED_COLUMNS)
            writer.writerow([name, point[name], *restored_cells(point["restored"]), *poisoned])
    write_text(out / TABLE, text.getvalue())
    write_drawing(lambda: draw_dose(document), out / PICTURE, "a dose is")


def draw_dose(document: Document) -> Figure:
    """What came back over the number of clean examples; and over the rate, with what the poison left."""
    figure = Figure(figsize=(9, 3.8), dpi=DPI, layout="constrained")
    by_examples, by_rate = figure.subplots(1, 2, sharey=True)
    for axes, (curve, name) in zip((by_examples, by_rate), CURVES.items(), strict=True):
        for row, (colour, marker) in ROWS.items():
            _draw(axes, document[curve], name, "restored", row, colour, marker, row.replace("_", " "))
        axes.axhline(1, color="#444444", linewidth=0.9, linestyle=":")
        tidy(axes)
    _draw(by_rate, document["by_rate"], "rate", "poisoned", "mechanism", "#6b7280", "D", "poisoned: effects ~ base")
    by_examples.set_xscale("log", base=2)
    by_examples.set_xlabel("different clean examples", fontsize=9)
    by_rate.set_xlabel("share of poisoned pairs", fontsize=9)
    by_examples.set_ylabel("how far back (1: as base)", fontsize=9)
    by_rate.legend(frameon=False, fontsize=8, loc="best")
    return figure


def _draw(
    axes: Axes, points: Sequence[Document], name: str, block: str, row: str, colour: str, marker: str, label: str
) -> None:
    known = [(point[name], point[block]) for point in points if point[block][row] is not None]
    x, y = [at for at, _ in known], [found[row] for _, found in known]
    axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.3, label=label)
    for at, found in known:
        if found["ci95"][row]:
            axes.plot((at, at), found["ci95"][row], color=colour, linewidth=0.9)
