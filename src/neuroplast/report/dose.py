"""How little is enough, as a table and a picture."""

# pyright: reportUnknownMemberType=false
# matplotlib passes its **kwargs on untyped.

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuroplast.report.figures import DPI, tidy, write_drawing
from neuroplast.report.repair import RESTORED_COLUMNS, restored_cells
from neuroplast.storage import write_text

TABLE, PICTURE = DOSE_FILES = ("dose.csv", "dose.png")
BLOCKS = {"poisoned": ("poisoned", "#d55e00", "s"), "restored": ("retrained", "#0072b2", "o")}
"""What is drawn, with label, colour and marker, after Okabe and Ito."""
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
    """Behaviour and mechanism, poisoned and retrained, over the number of clean examples and over the rate."""
    figure = Figure(figsize=(9, 6), dpi=DPI, layout="constrained")
    rows = figure.subplots(2, 2, sharex="col", sharey="row")
    base, worst = document["base"], document["by_rate"][-1]["poisoned"]
    for column, (curve, name) in enumerate(CURVES.items()):
        points = [{"poisoned": worst} | point for point in document[curve]]
        logit_diff, mechanism = rows[0][column], rows[1][column]
        for block in BLOCKS:
            _draw(logit_diff, points, name, block, lambda found: found["logit_diff"])
            _draw(mechanism, points, name, block, _mechanism)
        logit_diff.axhline(base["logit_diff"]["value"], color="#444444", linewidth=0.9, linestyle=":", label="base")
        mechanism.axhline(1, color="#444444", linewidth=0.9, linestyle=":")
        for axes in (logit_diff, mechanism):
            axes.set_xscale("log", base=2)
            axes.set_xticks([point[name] for point in points], [f"{point[name]:g}" for point in points])
            axes.minorticks_off()
            tidy(axes)
    rows[0][0].set_ylabel("logit difference", fontsize=9)
    rows[1][0].set_ylabel("correlation of head effects with base's", fontsize=9)
    rows[1][0].set_xlabel(
        f"different clean examples, after a poison rate of {document['by_rate'][-1]['rate']:g}", fontsize=9
    )
    rows[1][1].set_xlabel(f"poison rate, then {document['retrained_on']} clean examples", fontsize=9)
    rows[0][0].legend(frameon=False, fontsize=8, loc="best")
    return figure


def _mechanism(found: Document) -> Document:
    return {"value": found["mechanism"], "ci95": found["ci95"]["mechanism"]}


def _draw(
    axes: Axes, points: Sequence[Document], name: str, block: str, number: Callable[[Document], Document]
) -> None:
    label, colour, marker = BLOCKS[block]
    known = [(point[name], found) for point in points if (found := number(point[block]))["value"] is not None]
    x, y = [at for at, _ in known], [found["value"] for _, found in known]
    axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.3, label=label)
    for at, found in known:
        if found["ci95"]:
            axes.plot((at, at), found["ci95"], color=colour, linewidth=0.9)
