"""The frontier of a repair: how far each mended model is back, against what it cost; as a table and a picture."""

# pyright: reportUnknownMemberType=false
# matplotlib passes its **kwargs on untyped.

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from neuroplast.report.figures import DPI, tidy, write_drawing
from neuroplast.storage import write_text

TABLE, PICTURE = REPAIR_FILES = ("frontier.csv", "frontier.png")
LOOKS = {"graft": ("#0072b2", "o"), "masked": ("#d55e00", "s"), "full": ("#009e73", "D")}
"""Colour and marker of each strategy, after Okabe and Ito."""
COSTS = ("parameters", "parameters_share", "n_parts", "steps", "examples")
ROWS = ("kept", "behaviour", "mechanism", "damage_undone")

RESTORED_COLUMNS = ("score", "logit_diff", "accuracy", *(row + end for row in ROWS for end in ("", "_low", "_high")))
"""What a table says of how far a model is back."""

Document = Mapping[str, Any]


def restored_cells(found: Document) -> list[float | None]:
    """The cells of `RESTORED_COLUMNS`."""
    estimates = [cell for row in ROWS for cell in (found[row], *(found["ci95"][row] or (None, None)))]
    return [found["score"], found["logit_diff"]["value"], found["accuracy"]["value"], *estimates]


def write_repair_report(document: Document, out: Path) -> None:
    """Writes the table and the picture of what was tried.

    Args:
        document: what `run_repair` gives.
        out: the folder.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["strategy", *COSTS, *RESTORED_COLUMNS])
    for each in document["frontier"]:
        writer.writerow([each["strategy"], *(each["cost"][name] for name in COSTS), *restored_cells(each["restored"])])
    write_text(out / TABLE, text.getvalue())
    write_drawing(lambda: draw_frontier(document), out / PICTURE, "a frontier is")


def draw_frontier(document: Document) -> Figure:
    """The score of everything that was tried, over the weights that were changed and over the steps of training."""
    figure = Figure(figsize=(9, 3.8), dpi=DPI, layout="constrained")
    by_weights, by_steps = figure.subplots(1, 2, sharey=True)
    for strategy, (colour, marker) in LOOKS.items():
        tried = [each for each in document["frontier"] if each["strategy"] == strategy]
        tried = [each for each in tried if each["restored"]["score"] is not None]
        if not tried:
            continue
        scores = [each["restored"]["score"] for each in tried]
        for axes, cost in ((by_weights, "parameters_share"), (by_steps, "steps")):
            over = [each["cost"][cost] for each in tried]
            axes.plot(over, scores, color=colour, marker=marker, markersize=5, linewidth=1.2, label=strategy)
    if document["cost"] is not None:
        chosen = next(each for each in document["frontier"] if each["cost"] == document["cost"])
        for axes, cost in ((by_weights, "parameters_share"), (by_steps, "steps")):
            place = ([chosen["cost"][cost]], [chosen["restored"]["score"]])
            axes.plot(*place, marker="o", markersize=13, markerfacecolor="none", color="#222222", linestyle="")
    for axes in (by_weights, by_steps):
        axes.axhline(document["target"], color="#444444", linewidth=0.9, linestyle=":")
        tidy(axes)
    by_weights.set_xscale("log")
    by_weights.set_xlabel("share of the weights that changed", fontsize=9)
    by_steps.set_xlabel("optimiser steps", fontsize=9)
    by_weights.set_ylabel("how far back (1: as base)", fontsize=9)
    if document["frontier"]:
        by_weights.legend(frameon=False, fontsize=8, loc="best")
    return figure
