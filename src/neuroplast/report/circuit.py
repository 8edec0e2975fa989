"""A circuit's picture, and its tables of nodes and edges.

The picture is a layered graph: a column for each named position, rows from the lowest layer that occurs to the highest,
`input` below, `logits` on top. A box is a node, its colour what it does. A line is an edge: it leaves the top of what
writes and enters the bottom of what reads. A key or value is read elsewhere than the head stands, so such an edge goes
to every box of its head; its position is where the writer stands. Lines that pass a row go through its gaps, never
behind a box. More edges than can be told apart are left out, the weakest first, and the caption says how many.

The same circuit gives the same bytes.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from matplotlib.typing import LineStyleType

from neuroplast.circuits.circuit import Circuit
from neuroplast.report.circuit_layout import (
    BOX_HEIGHT,
    LEGEND_LINE,
    MARGIN,
    STYLES,
    Line,
    Plan,
    choose,
    count_of,
    ink_on,
    shorten,
    show_score,
    sign_colour,
)
from neuroplast.report.figures import DPI, write_drawing
from neuroplast.storage import write_text

CIRCUIT_FILES = ("circuit.svg", "circuit.png", "nodes.csv", "edges.csv")

CODES: Mapping[str, np.uint8] = {"M": Curve.MOVETO, "L": Curve.LINETO, "C": Curve.CURVE4}


def write_circuit_report(circuit: Circuit, folder: Path) -> None:
    """Writes `CIRCUIT_FILES` into a folder.

    Raises:
        StorageError: when the folder cannot be written.
    """
    for name in ("circuit.svg", "circuit.png"):
        write_circuit_drawing(circuit, folder / name)
    write_text(folder / "nodes.csv", _table(("node", "score", "role", "why"), _node_rows(circuit)))
    write_text(folder / "edges.csv", _table(("edge", "score", "in_circuit"), _edge_rows(circuit)))


def write_circuit_drawing(circuit: Circuit, path: Path | str) -> None:
    """Draws a circuit into an `.svg` or `.png` file.

    Raises:
        InputError: for another kind of file.
        StorageError: when it cannot be written.
    """
    write_drawing(lambda: draw_circuit(circuit), path, "a circuit is")


def draw_circuit(circuit: Circuit) -> Figure:
    """The picture; at most `MOST_NODES` boxes and `MOST_EDGES` lines."""
    drawn = choose(circuit)
    if not drawn.nodes:
        return _draw_nothing(circuit)
    plan = Plan(circuit, drawn)
    figure = Figure(figsize=(plan.width, plan.height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, plan.width)
    axes.set_ylim(0, plan.height)
    _draw_frame(axes, plan)
    _draw_edges(axes, plan)
    _draw_boxes(axes, plan)
    _draw_legend(axes, plan)
    return figure


def _draw_frame(axes: Axes, plan: Plan) -> None:
    low, high = plan.y(0) - BOX_HEIGHT / 2 - 0.14, plan.top + BOX_HEIGHT / 2 + 0.14
    for column, (left, right) in plan.spans.items():
        axes.add_patch(_rounded(left, low, right - left, high - low, "#f5f6f8", 0.08, zorder=0))
        if column is not None:
            middle = (left + right) / 2
            _write(axes, middle, low - 0.17, shorten(column, 26), 10, weight="bold", colour="#3b4252")
    for text, first, last in plan.labels:
        y = (plan.y(first) + plan.y(last)) / 2
        _write(axes, plan.left - 0.14, y, text, 8, align="right", colour="#6b7280")
    _write(axes, plan.left, high + 0.48, _title(plan.circuit), 13, align="left", weight="bold")
    _write(axes, plan.left, high + 0.2, _counts(plan), 9, align="left", colour="#4b5563")
    for number, text in enumerate(reversed(plan.caption)):
        _write(axes, plan.left, MARGIN + 0.17 * number, text, 8, align="left", colour="#4b5563")


def _draw_edges(axes: Axes, plan: Plan) -> None:
    largest = max((abs(line.score or 0.0) for line in plan.lines), default=0.0)
    for line in plan.lines:
        share = 0.2 if line.score is None or not largest else abs(line.score) / largest
        width = 0.8 + 2.4 * share
        axes.add_patch(
            PathPatch(
                _curve(line, plan),
                facecolor="none",
                edgecolor=sign_colour(line.score),
                linewidth=width,
                linestyle=_dashes(line.edge.destination.channel or "", width),
                alpha=0.5 + 0.35 * share,
                zorder=1 + share,
                capstyle="butt",
            )
        )


def _curve(line: Line, plan: Plan) -> Curve:
    way = plan.way(line)
    return Curve([p for step in way for p in step.points], [CODES[step.kind] for step in way for _ in step.points])


def _dashes(channel: str, width: float) -> LineStyleType:
    """Dashes that are as long on a thin line as on a thick one."""
    return (0, [length / width for length in STYLES[channel]]) if STYLES[channel] else "-"


def _draw_boxes(axes: Axes, plan: Plan) -> None:
    largest = max((abs(plan.circuit.nodes.get(node) or 0.0) for node in plan.boxes), default=0.0)
    seen: set[tuple[str, int]] = set()
    for node, box in plan.boxes.items():
        bar = node.kind in ("input", "logits")
        if (node.kind, box.row) in seen and bar:
            continue
        seen.add((node.kind, box.row))
        score = None if bar else plan.circuit.nodes.get(node)
        fill = plan.fill(node)
        hinders = score is not None and score > 0
        low = plan.y(box.row) - BOX_HEIGHT / 2
        shape = _rounded(box.left, low, box.right - box.left, BOX_HEIGHT, fill, 0.02 if node.kind == "mlp" else 0.08, 4)
        _outline(shape, fill, hinders)
        axes.add_patch(shape)
        ink = ink_on(fill)
        two = plan.scored and not bar
        name = node.kind if bar else str(node.at(None))
        _write(
            axes, box.middle, low + BOX_HEIGHT * (0.67 if two else 0.5), name, 8, weight="bold", colour=ink, zorder=5
        )
        if two:
            text = "–" if score is None else show_score(score, largest)
            _write(axes, box.middle, low + BOX_HEIGHT * 0.27, text, 6.5, colour=ink, zorder=5)


def _draw_legend(axes: Axes, plan: Plan) -> None:
    x, y = plan.right + 0.35, plan.top + BOX_HEIGHT / 2 - 0.05
    for key in plan.legend:
        if not key.colour:
            y -= 0.1 if key is not plan.legend[0] else 0.0
            _write(axes, x, y, key.text, 9, align="left", weight="bold")
        elif key.channel is None:
            shape = _rounded(x, y - 0.075, 0.34, 0.15, key.colour, 0.04, 4)
            _outline(shape, key.colour, key.dashed)
            axes.add_patch(shape)
        else:
            style = _dashes(key.channel, key.width)
            axes.add_line(Line2D((x, x + 0.34), (y, y), color=key.colour, linestyle=style, linewidth=key.width))
        if key.colour:
            _write(axes, x + 0.45, y, key.text, 8.5, align="left")
        y -= LEGEND_LINE


def _draw_nothing(circuit: Circuit) -> Figure:
    figure = Figure(figsize=(7, 2.2), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, 7)
    axes.set_ylim(0, 2.2)
    _write(axes, 3.5, 1.3, _title(circuit), 12, weight="bold")
    _write(axes, 3.5, 0.85, "This circuit is empty: it has no nodes and no edges.", 10, colour="#4b5563")
    return figure


def _title(circuit: Circuit) -> str:
    task, method = (circuit.provenance.get(name) for name in ("task", "method"))
    said = [part for part in (task, method) if isinstance(part, str) and part]
    return shorten(" · ".join((circuit.shape.name, *said)), 60)


def _counts(plan: Plan) -> str:
    circuit = plan.circuit
    counted = [count_of(len(circuit.nodes), "node"), count_of(len(circuit.edges), "edge")]
    if circuit.heads:
        heads = circuit.universe("heads")
        places = circuit.universe("nodes") // heads
        at = f" × {places} positions" if places > 1 else ""
        counted.append(f"{circuit.sparsity('nodes'):.2%} of {heads} heads{at}")
    return " · ".join(counted)


def _write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float,
    *,
    align: str = "center",
    weight: str = "normal",
    colour: str = "#14181f",
    zorder: float = 3,
) -> None:
    # A dollar sign would start mathematics; what is not printable has no place in an SVG.
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    axes.text(
        x, y, clean, ha=align, va="center_baseline", fontsize=size, fontweight=weight, color=colour, zorder=zorder,
        parse_math=False,
    )  # fmt: skip


def _rounded(
    left: float, low: float, width: float, height: float, fill: str, radius: float, zorder: float
) -> FancyBboxPatch:
    style = f"round,pad=0,rounding_size={radius}"
    return FancyBboxPatch(
        (left, low), width, height, boxstyle=style, facecolor=fill, edgecolor="none", linewidth=0, zorder=zorder
    )


def _outline(shape: FancyBboxPatch, fill: str, dashed: bool) -> None:
    red, green, blue = (0.7 * part for part in to_rgb(fill))
    shape.set_edgecolor("#1f2430" if dashed else (red, green, blue))
    shape.set_linewidth(1.4 if dashed else 0.9)
    shape.set_linestyle((0, (2.6, 1.5)) if dashed else "-")


def _node_rows(circuit: Circuit) -> Iterable[tuple[str, float | str, str, str]]:
    for node, score in circuit.nodes.items():
        role = circuit.roles.get(node)
        yield str(node), "" if score is None else score, role.name if role else "", role.why if role else ""


def _edge_rows(circuit: Circuit) -> Iterable[tuple[str, float | str, str]]:
    """Those of the circuit, then those outside, the strongest first."""
    for inside, scores in ((True, circuit.edges), (False, circuit.outside)):
        for edge, score in sorted(scores.items(), key=lambda item: (-abs(item[1] or 0.0), str(item[0]))):
            yield str(edge), "" if score is None else score, "yes" if inside else "no"


def _table(header: Sequence[str], rows: Iterable[Sequence[float | str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((header, *rows))
    return text.getvalue()
