"""The figures of a report, drawn by matplotlib without a display and without global state."""

# pyright: reportUnknownMemberType=false
# matplotlib passes its **kwargs on untyped.

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.typing import LineStyleType

from neuroplast.errors import InputError
from neuroplast.report import style
from neuroplast.report.changes import largest_effect, training_paths
from neuroplast.report.results import Estimate, StudyResults
from neuroplast.storage import atomic_file

DPI = 150
LINESTYLES: dict[str, LineStyleType] = {
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (9, 3)),
    "longdashdot": (0, (9, 3, 1, 3)),
}
"""What the names in `style.DASHES` are in matplotlib."""


def write_figures(results: StudyResults, folder: Path) -> None:
    """Writes head_effects, logit_diff_over_training and logit_diff_by_stage into `folder`, as `.png` and `.svg`."""
    drawings: dict[str, Callable[[StudyResults], Figure]] = {
        "head_effects": draw_head_effects,
        "logit_diff_over_training": draw_training,
        "logit_diff_by_stage": draw_stages,
    }
    for name, draw in drawings.items():
        write_both(draw(results), folder / name)


def write_both(figure: Figure, path: Path) -> None:
    """Writes a figure into `<path>.svg` and `<path>.png`, laid out once; as `write_drawing`."""
    for kind in (".svg", ".png"):
        write_drawing(lambda: figure, path.with_name(path.name + kind), "a figure is")
        figure.set_layout_engine("none")


def write_drawing(draw: Callable[[], Figure], path: Path | str, what: str) -> None:
    """Draws into an `.svg` or `.png` file; the same figure gives the same bytes.

    Args:
        draw: makes the figure.
        path: the file.
        what: what is drawn, for an error: "a circuit is".

    Raises:
        InputError: for another kind of file.
        StorageError: when it cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise InputError(f"{what} drawn as .svg or .png, got {path.name!r}")
    figure = draw()
    with atomic_file(path) as temporary:
        if kind == ".png":
            FigureCanvasAgg(figure).print_png(temporary)
        else:
            with matplotlib.rc_context({"svg.hashsalt": "neuroplast"}):
                FigureCanvasSVG(figure).print_svg(temporary, metadata={"Date": None})


def draw_head_effects(results: StudyResults) -> Figure:
    """Head effects of all final stages as heat maps on one colour scale that is symmetric around zero."""
    stages = style.reading_order(results)
    rows, columns = style.grid(len(stages))
    height = min(max(0.13 * results.n_layers, 1.6), 6.0)
    figure = Figure(figsize=(1.9 * columns + 1.2, (height + 0.8) * rows + 0.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    colours = LinearSegmentedColormap.from_list("help_hinder", style.DIVERGING)
    bound = largest_effect(results)
    image = None
    for panel, stage in zip(panels.flat, stages, strict=False):
        image = panel.imshow(stage.effects.mean, cmap=colours, vmin=-bound, vmax=bound, origin="lower", aspect="auto")
        panel.set_title("\n".join(map(_plain, style.lines_of(stage))), fontsize=8)
        panel.tick_params(labelsize=7, length=2)
        panel.locator_params(integer=True)
    for panel in panels.flat[len(stages) :]:
        panel.set_axis_off()
    if image is not None:
        bar = figure.colorbar(image, ax=panels, shrink=0.9, pad=0.02)
        bar.set_label(style.SIGN_NOTE.replace("; ", "\n"), fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.supxlabel("head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    return figure


def draw_training(results: StudyResults) -> Figure:
    """Logit difference over steps from base, each stage continuing the one it was trained from."""
    figure = Figure(figsize=(9, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#444444", linewidth=0.9)
    labelled: set[str] = set()
    for path in training_paths(results):
        stage = path.stage
        colour, label = (
            style.KIND_COLOURS[stage.kind],
            " ".join(filter(None, (stage.kind, stage.poison))).replace("_", " "),
        )
        line = LINESTYLES[style.dash_of(stage, results)]
        if path.curve:
            axes.plot(*zip(*path.curve, strict=True), color=colour, linestyle=line, linewidth=1.6)
        _point(axes, path.end, stage.behaviour.logit_diff, colour)
        if label not in labelled:
            axes.plot([], [], color=colour, linestyle=line, marker="o", markersize=4, label=_plain(label))
            labelled.add(label)
    for stage in results.stages:
        if stage.kind == "base":
            _point(axes, 0, stage.behaviour.logit_diff, style.KIND_COLOURS["base"])
    axes.set_xlabel("optimiser steps from base")
    axes.set_ylabel("logit difference")
    tidy(axes)
    if labelled:
        axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def draw_stages(results: StudyResults) -> Figure:
    """Logit difference of every final stage with its interval."""
    stages = style.reading_order(results)
    figure = Figure(figsize=(7, 0.34 * len(stages) + 1.1), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#444444", linewidth=0.9)
    for row, stage in enumerate(stages):
        logit_diff, colour = stage.behaviour.logit_diff, style.KIND_COLOURS[stage.kind]
        if logit_diff.interval:
            axes.plot(logit_diff.interval, (row, row), color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot([logit_diff.known], [row], marker="o", markersize=6, color=colour)
    axes.set_yticks(range(len(stages)), [_plain(stage.id) for stage in stages], fontsize=8)
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.set_xlabel("logit difference (mean and 95 % bootstrap interval over prompts)", fontsize=9)
    tidy(axes)
    return figure


def _point(axes: Axes, step: int, logit_diff: Estimate, colour: str) -> None:
    if logit_diff.interval:
        axes.plot((step, step), logit_diff.interval, color=colour, linewidth=1.2)
    axes.plot([step], [logit_diff.known], marker="o", markersize=5, color=colour)


def tidy(axes: Axes) -> None:
    """The look that all line plots share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _plain(text: str) -> str:
    """A dollar sign would start mathematics in matplotlib."""
    return text.replace("$", r"\$")
