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
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from matplotlib.typing import LineStyleType

from neuroplast.circuits.circuit import Circuit, order_of
from neuroplast.components import Edge, Node
from neuroplast.errors import InputError
from neuroplast.report.figures import DPI
from neuroplast.report.style import DIVERGING
from neuroplast.storage import atomic_file, write_text

CIRCUIT_FILES = ("circuit.svg", "circuit.png", "nodes.csv", "edges.csv")
MOST_NODES = 80
"""Most boxes in a picture."""
MOST_EDGES = 160
"""Most lines in a picture."""

ROLE_COLOURS: Mapping[str, str] = {
    "name mover": "#0072b2",
    "backup name mover": "#7cc4ee",
    "negative name mover": "#d55e00",
    "writes for the answer": "#56789c",
    "writes against the answer": "#b5713f",
    "s-inhibition": "#cc79a7",
    "induction": "#009e73",
    "duplicate token": "#e69f00",
    "previous token": "#f0e442",
}
"""After Okabe and Ito; by a role's name in small letters."""
OTHER_COLOURS = ("#882255", "#44aa99", "#332288", "#999933", "#aa4499", "#117733", "#661100", "#6699cc")
"""After Tol: of roles that have no colour of their own, in order of name."""
NO_ROLE = "#c9cdd3"
ENDS = "#3b4252"
"""Input and logits."""
UNCLASSIFIED = "unclassified"
HELPS, HINDERS, NO_SCORE = DIVERGING[1], DIVERGING[-2], "#8a919c"
STYLES: Mapping[str, Sequence[float]] = {"q": (), "k": (5.5, 2.2), "v": (1.3, 1.7), "": ()}
"""By what an edge is read through (an MLP and the logits have no channel), dashes and gaps in points; none is solid."""

# All lengths are inches.
BOX_HEIGHT, GAP, MARGIN, CLEAR = 0.34, 0.26, 0.3, 0.04
LABELS, LEGEND, LEGEND_LINE, LEAST_WIDTH = 0.75, 2.95, 0.23, 7.0
BOXES_A_LINE = {False: 12, True: 6}
"""Most boxes side by side in one column, by whether there are several columns."""
PITCHES, IDEAL_HEIGHT = (0.66, 0.95), 10.0
"""Least and largest distance of two rows, and how tall all rows shall be if that allows it."""
_SHARES = np.linspace(0, 1, 129)
_CURVE_Y, _CURVE_X = 1.5 * _SHARES - 1.5 * _SHARES**2 + _SHARES**3, 3 * _SHARES**2 - 2 * _SHARES**3
"""A line's curve between two rows, as shares of its height and of its width: it begins and ends upright."""


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
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise InputError(f"a circuit is drawn as .svg or .png, got {path.name!r}")
    figure = draw_circuit(circuit)
    with atomic_file(path) as temporary:
        if kind == ".png":
            FigureCanvasAgg(figure).print_png(temporary)
        else:
            with matplotlib.rc_context({"svg.hashsalt": "neuroplast"}):
                FigureCanvasSVG(figure).print_svg(temporary, metadata={"Date": None})


def draw_circuit(circuit: Circuit) -> Figure:
    """The picture; at most `MOST_NODES` boxes and `MOST_EDGES` lines."""
    drawn = _choose(circuit)
    if not drawn.nodes:
        return _draw_nothing(circuit)
    plan = _Plan(circuit, drawn)
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


@dataclass(frozen=True)
class _Drawn:
    """What of a circuit is drawn."""

    nodes: tuple[Node, ...]
    """Boxes, in the order of the forward pass."""
    edges: tuple[tuple[Edge, float | None], ...]
    """The strongest edges, the weakest of them first."""
    lines: tuple[tuple[Edge, Node, Node], ...]
    """Their lines, in the same order: edge, box that it leaves, box that it enters."""


def _choose(circuit: Circuit) -> _Drawn:
    """All nodes and the strongest edges; of a circuit with too many nodes, the strongest edges and what they join."""
    ranked = sorted(circuit.edges.items(), key=lambda item: (-abs(item[1] or 0.0), str(item[0])))
    boxes = list(circuit.nodes)
    by_part: dict[Node, list[Node]] = defaultdict(list)
    for node in boxes:
        by_part[node.at(None)].append(node)
    joined = [
        (edge, score, _boxes_of(edge.source, by_part), _boxes_of(edge.destination, by_part)) for edge, score in ranked
    ]
    few = len({*boxes, *(box for _, _, *ends in joined for end in ends for box in end)}) <= MOST_NODES
    shown: set[Node] = set(boxes) if few else set()
    edges: list[tuple[Edge, float | None]] = []
    lines: list[tuple[Edge, Node, Node]] = []
    for edge, score, sources, destinations in joined:
        more = [(edge, source, destination) for source in sources for destination in destinations]
        if len(lines) + len(more) > MOST_EDGES or len(shown | {*sources, *destinations}) > MOST_NODES:
            break
        edges.append((edge, score))
        lines += more
        shown |= {*sources, *destinations}
    if not few and not edges:
        strongest = sorted(boxes, key=lambda node: (-abs(circuit.nodes[node] or 0.0), order_of(node)))
        shown = set(strongest[:MOST_NODES])
    return _Drawn(tuple(sorted(shown, key=order_of)), tuple(reversed(edges)), tuple(reversed(lines)))


def _boxes_of(end: Node, by_part: Mapping[Node, Sequence[Node]]) -> tuple[Node, ...]:
    """The boxes at one end of an edge."""
    part = Node(end.kind, end.layer, end.head)
    boxes = by_part.get(part, ())
    exact = part.at(end.position)
    if end.channel in ("k", "v"):
        # Read where the writer stands; the head stands where it attends from.
        return tuple(boxes) or (part,)
    return (exact,) if exact in boxes or not boxes or end.kind in ("input", "logits") else tuple(boxes)


@dataclass
class _Box:
    """A node's place."""

    node: Node
    left: float
    right: float
    row: int
    leaving: list["_Line"] = field(default_factory=list["_Line"])
    entering: list["_Line"] = field(default_factory=list["_Line"])

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


@dataclass
class _Line:
    """A line's way."""

    edge: Edge
    score: float | None
    source: _Box
    destination: _Box
    rows: list[int]
    """Where it leaves, the rows whose gaps it is led through, where it enters."""
    xs: list[float]
    """Where it is there."""
    gaps: dict[int, tuple[tuple[float, float], float]] = field(
        default_factory=dict[int, tuple[tuple[float, float], float]]
    )
    """By row, the gap that it is led through, and where in it the line would be if there were no other."""


class _Plan:
    """Where everything stands."""

    def __init__(self, circuit: Circuit, drawn: _Drawn) -> None:
        self.circuit, self.drawn = circuit, drawn
        self.lines: list[_Line] = []
        self.roles = {node: _role_of(circuit, node) for node in drawn.nodes}
        self.colours = _colours(self.roles.values())
        inner = [node for node in drawn.nodes if node.kind in ("head", "mlp")]
        self.scored = any(circuit.nodes.get(node) is not None for node in inner)
        self.columns = _columns(circuit, inner)
        self.box_width = 0.19 + 0.07 * max([5, *(len(str(node.at(None))) for node in inner)])
        cells: dict[tuple[int, str | None], list[Node]] = defaultdict(list)
        for node in inner:
            cells[node.layer or 0, node.position].append(node)
        most = BOXES_A_LINE[len(self.columns) > 1]
        lines = {cell: _cut(sorted(nodes, key=self._in_cell), most) for cell, nodes in cells.items()}
        self._place_columns(lines)
        self._place_rows(lines)
        self._join()
        self.legend = _legend(self)
        self.width = max(self.right + 0.3 + LEGEND, LEAST_WIDTH)
        self.caption = [
            line
            for text in _caption(self)
            for line in textwrap.wrap(text, int((self.width - self.left - MARGIN) / 0.061))
        ]
        rise = MARGIN + 0.17 * len(self.caption) + (0.45 if self.columns != [None] else 0.25) + 0.14 + BOX_HEIGHT / 2
        tall = (self.n_rows - 1) * self.pitch
        self.bottom = max(rise, MARGIN + LEGEND_LINE * (len(self.legend) + 1) - tall)
        self.top = self.bottom + tall
        self.height = self.top + BOX_HEIGHT / 2 + 1.05

    def _in_cell(self, node: Node) -> tuple[bool, str, int]:
        return node.kind == "mlp", self.roles[node] or "~", node.head or 0

    def _place_columns(self, lines: Mapping[tuple[int, str | None], list[list[Node]]]) -> None:
        x = MARGIN + LABELS
        self.spans: dict[str | None, tuple[float, float]] = {}
        for column in self.columns:
            widest = max((len(line) for cell, found in lines.items() if cell[1] == column for line in found), default=1)
            width = max(widest * (self.box_width + GAP) + GAP, 0.5 + 0.085 * len(_short(column or "", 26)))
            self.spans[column] = (x, x + width)
            x += width + 0.14
        self.left, self.right = MARGIN + LABELS, x - 0.14

    def _place_rows(self, lines: Mapping[tuple[int, str | None], list[list[Node]]]) -> None:
        self.boxes: dict[Node, _Box] = {}
        self.labels: list[tuple[str, int, int]] = []
        row = 0
        if self._place_bar("input", row):
            row = 1
        for layer in sorted({layer for layer, _ in lines}):
            here = {column: lines.get((layer, column), []) for column in self.columns}
            count = max(map(len, here.values()))
            for column, found in here.items():
                left, right = self.spans[column]
                # An MLP reads the heads of its layer, so it stands no lower than any of them.
                first = count - len(found) if any(node.kind == "mlp" for line in found for node in line) else 0
                for number, line in enumerate(found, start=row + first):
                    x = (left + right - len(line) * (self.box_width + GAP) + GAP) / 2
                    for node in line:
                        self.boxes[node] = _Box(node, x, x + self.box_width, number)
                        x += self.box_width + GAP
            self.labels.append((f"layer {layer}", row, row + count - 1))
            row += count
        self.n_rows = row + self._place_bar("logits", row)
        self.pitch = min(max(IDEAL_HEIGHT / self.n_rows, PITCHES[0]), PITCHES[1])
        self.rows: dict[int, list[_Box]] = {row: [] for row in range(self.n_rows)}
        for box in sorted(self.boxes.values(), key=lambda box: box.left):
            self.rows[box.row].append(box)

    def _place_bar(self, kind: str, row: int) -> bool:
        """Input and logits are one bar: as wide as their column, or as everything where they have none."""
        nodes = [node for node in self.drawn.nodes if node.kind == kind]
        whole = self.left, self.right
        left, right = self.spans.get(nodes[0].position, whole) if len(nodes) == 1 and nodes[0].position else whole
        self.boxes |= {node: _Box(node, left, right, row) for node in nodes}
        return bool(nodes)

    def y(self, row: int) -> float:
        """The middle of a row."""
        return self.bottom + row * self.pitch

    def _join(self) -> None:
        """Draws every line from box to box, and leads it through a gap wherever it would pass behind another box."""
        scores = dict(self.drawn.edges)
        for edge, source, destination in self.drawn.lines:
            begin, end = self.boxes[source], self.boxes[destination]
            line = _Line(edge, scores[edge], begin, end, [begin.row, end.row], [begin.middle, end.middle])
            begin.leaving.append(line)
            end.entering.append(line)
            self.lines.append(line)
        self._settle()
        while hits := [(line, hit) for line in self.lines if (hit := self._hit(line))]:
            for line, (step, row, x) in hits:
                line.rows.insert(step, row)
                line.xs.insert(step, x)
                line.gaps[row] = self._gap(row, x), x
            self._settle()

    def _hit(self, line: _Line) -> tuple[int, int, float] | None:
        """Where a line passes behind a box, if it does: which piece, in which row, and at which x."""
        for step in range(1, len(line.rows)):
            (first, last), (x0, x1) = line.rows[step - 1 : step + 1], line.xs[step - 1 : step + 1]
            height = (last - first) * self.pitch - BOX_HEIGHT
            found: list[tuple[float, int, float]] = []
            for row in range(first + 1, last):
                low = (row - first) * self.pitch - BOX_HEIGHT
                ends = np.interp([low / height, (low + BOX_HEIGHT) / height], _CURVE_Y, _CURVE_X) * (x1 - x0) + x0
                left, right = float(ends.min()) - CLEAR, float(ends.max()) + CLEAR
                if any(left < box.right and box.left < right for box in self.rows[row]):
                    found.append((abs(row - (first + last) / 2), row, float(ends.mean())))
            if found:
                _, row, x = min(found)
                return step, row, x
        return None

    def _gap(self, row: int, x: float) -> tuple[float, float]:
        """The free stretch of a row that is nearest to x."""
        ends = [self.left - 0.05, *(end for box in self.rows[row] for end in (box.left, box.right)), self.right + 0.05]
        gaps = [(low + CLEAR, high - CLEAR) for low, high in zip(ends[::2], ends[1::2], strict=True)]
        return min(gaps, key=lambda gap: max(gap[0] - x, x - gap[1], 0.0))

    def _settle(self) -> None:
        """Spreads lines over the gaps that they are led through, and over the edges of the boxes where they end."""
        passing: dict[tuple[int, tuple[float, float]], list[tuple[float, int]]] = defaultdict(list)
        for number, line in enumerate(self.lines):
            for row, (gap, wanted) in line.gaps.items():
                passing[row, gap].append((wanted, number))
        for (row, gap), found in passing.items():
            ordered = sorted(found)
            for (_, number), x in zip(ordered, _lanes([wanted for wanted, _ in ordered], gap), strict=True):
                line = self.lines[number]
                line.xs[line.rows.index(row)] = x
        for box in self.boxes.values():
            _spread(box.leaving, box, 0, 1)
            _spread(box.entering, box, -1, -2)


def _lanes(wanted: Sequence[float], gap: tuple[float, float]) -> list[float]:
    """Where lines pass a gap: side by side over all of a narrow one, in a wide one where they want to, but apart."""
    low, high = gap
    if high - low < 0.5:
        return [low + (high - low) * (number + 0.5) / len(wanted) for number in range(len(wanted))]
    step = min(0.045, (high - low) / len(wanted))
    xs = [min(max(x, low), high) for x in wanted]
    for number in range(1, len(xs)):
        xs[number] = max(xs[number], xs[number - 1] + step)
    xs[-1] = min(xs[-1], high)
    for number in range(len(xs) - 2, -1, -1):
        xs[number] = min(xs[number], xs[number + 1] - step)
    return xs


def _spread(lines: Sequence[_Line], box: _Box, end: int, beside: int) -> None:
    """Where lines meet a box, in the order in which they come; a bar is wide, so they go straight up to it."""
    if box.node.kind in ("input", "logits"):
        for line in lines:
            line.xs[end] = min(max(line.xs[beside], box.left + 0.1), box.right - 0.1)
        return
    ordered = sorted(lines, key=lambda line: (line.xs[beside], str(line.edge)))
    for number, line in enumerate(ordered):
        line.xs[end] = box.middle + 0.72 * (box.right - box.left) * ((number + 0.5) / len(ordered) - 0.5)


def _columns(circuit: Circuit, nodes: Sequence[Node]) -> list[str | None]:
    """Positions in the circuit's order, then others that nodes stand at; first, if need be, no position at all."""
    used = {node.position for node in nodes}
    named = dict.fromkeys((*circuit.positions, *sorted(position for position in used if position)))
    found: list[str | None] = [None] if None in used else []
    return [*found, *(position for position in named if position in used)] or [None]


def _cut(nodes: Sequence[Node], most: int) -> list[list[Node]]:
    """Lines of about equal length, none longer than `most`."""
    count = -(-len(nodes) // most)
    length = -(-len(nodes) // count)
    return [list(nodes[begin : begin + length]) for begin in range(0, len(nodes), length)]


def _role_of(circuit: Circuit, node: Node) -> str | None:
    role = circuit.roles.get(node)
    return None if role is None or node.kind in ("input", "logits") else role.name


def _colours(roles: Iterable[str | None]) -> dict[str | None, str]:
    """A colour for each role that occurs, the known ones first; None is no role."""
    names = {role for role in roles if role and role != UNCLASSIFIED}
    known = [name for name in sorted(names, key=_rank) if name.lower() in ROLE_COLOURS]
    found: dict[str | None, str] = {name: ROLE_COLOURS[name.lower()] for name in known}
    others = sorted(names - set(known))
    return found | {name: OTHER_COLOURS[number % len(OTHER_COLOURS)] for number, name in enumerate(others)}


def _rank(role: str) -> tuple[int, str]:
    names = list(ROLE_COLOURS)
    return names.index(role.lower()) if role.lower() in names else len(names), role


def _draw_frame(axes: Axes, plan: _Plan) -> None:
    low, high = plan.y(0) - BOX_HEIGHT / 2 - 0.14, plan.top + BOX_HEIGHT / 2 + 0.14
    for column, (left, right) in plan.spans.items():
        axes.add_patch(_rounded(left, low, right - left, high - low, "#f5f6f8", 0.08, zorder=0))
        if column is not None:
            middle = (left + right) / 2
            _write(axes, middle, low - 0.17, _short(column, 26), 10, weight="bold", colour="#3b4252")
    for text, first, last in plan.labels:
        y = (plan.y(first) + plan.y(last)) / 2
        _write(axes, plan.left - 0.14, y, text, 8, align="right", colour="#6b7280")
    _write(axes, plan.left, high + 0.48, _title(plan.circuit), 13, align="left", weight="bold")
    _write(axes, plan.left, high + 0.2, _counts(plan), 9, align="left", colour="#4b5563")
    for number, text in enumerate(reversed(plan.caption)):
        _write(axes, plan.left, MARGIN + 0.17 * number, text, 8, align="left", colour="#4b5563")


def _draw_edges(axes: Axes, plan: _Plan) -> None:
    largest = max((abs(line.score or 0.0) for line in plan.lines), default=0.0)
    for line in plan.lines:
        share = 0.2 if line.score is None or not largest else abs(line.score) / largest
        width = 0.8 + 2.4 * share
        axes.add_patch(
            PathPatch(
                _curve(line, plan),
                facecolor="none",
                edgecolor=_sign_colour(line.score),
                linewidth=width,
                linestyle=_dashes(line.edge.destination.channel or "", width),
                alpha=0.5 + 0.35 * share,
                zorder=1 + share,
                capstyle="butt",
            )
        )


def _curve(line: _Line, plan: _Plan) -> Curve:
    x, y = line.xs[0], plan.y(line.rows[0]) + BOX_HEIGHT / 2
    points = [(x, y)]
    if line.rows == [line.rows[0]] * 2:
        # From the top of a head over its row to the top of the MLP of its layer.
        over = y + (0.8 * (plan.pitch - BOX_HEIGHT) if line.rows[0] + 1 < plan.n_rows else 0.16)
        points += [(x, over), (line.xs[1], over), (line.xs[1], y)]
        return Curve(points, [Curve.MOVETO] + [Curve.CURVE4] * 3)
    codes = [Curve.MOVETO]
    for row, end in zip(line.rows[1:], line.xs[1:], strict=True):
        low = plan.y(row) - BOX_HEIGHT / 2
        points += [(x, (y + low) / 2), (end, (y + low) / 2), (end, low)]
        codes += [Curve.CURVE4] * 3
        x, y = end, low + BOX_HEIGHT
        if row < line.rows[-1]:
            points.append((x, y))
            codes.append(Curve.LINETO)
    return Curve(points, codes)


def _dashes(channel: str, width: float) -> LineStyleType:
    """Dashes that are as long on a thin line as on a thick one."""
    return (0, [length / width for length in STYLES[channel]]) if STYLES[channel] else "-"


def _draw_boxes(axes: Axes, plan: _Plan) -> None:
    largest = max((abs(plan.circuit.nodes.get(node) or 0.0) for node in plan.boxes), default=0.0)
    seen: set[tuple[str, int]] = set()
    for node, box in plan.boxes.items():
        bar = node.kind in ("input", "logits")
        if (node.kind, box.row) in seen and bar:
            continue
        seen.add((node.kind, box.row))
        score = None if bar else plan.circuit.nodes.get(node)
        fill = ENDS if bar else plan.colours.get(plan.roles[node], NO_ROLE)
        hinders = score is not None and score > 0
        low = plan.y(box.row) - BOX_HEIGHT / 2
        shape = _rounded(box.left, low, box.right - box.left, BOX_HEIGHT, fill, 0.02 if node.kind == "mlp" else 0.08, 4)
        _outline(shape, fill, hinders)
        axes.add_patch(shape)
        ink = "white" if _luminance(fill) < 0.5 else "#14181f"
        two = plan.scored and not bar
        name = node.kind if bar else str(node.at(None))
        _write(
            axes, box.middle, low + BOX_HEIGHT * (0.67 if two else 0.5), name, 8, weight="bold", colour=ink, zorder=5
        )
        if two:
            text = "–" if score is None else _number(score, largest)
            _write(axes, box.middle, low + BOX_HEIGHT * 0.27, text, 6.5, colour=ink, zorder=5)


@dataclass(frozen=True)
class _Key:
    """One line of the legend."""

    text: str
    colour: str = ""
    """Of a box or a line; none is a heading."""
    channel: str | None = None
    """Of a line, how it is read through; None is a box."""
    width: float = 2.4
    """Of a line."""
    dashed: bool = False
    """Of a box, its outline."""


def _legend(plan: _Plan) -> list[_Key]:
    inner = [node for node in plan.drawn.nodes if node.kind in ("head", "mlp")]
    keys = [_Key("Nodes")] if inner else []
    for role, colour in plan.colours.items():
        keys.append(_Key(f"{_short(role or '', 26)} ({sum(plan.roles[node] == role for node in inner)})", colour))
    rest = [plan.roles[node] for node in inner if plan.roles[node] not in plan.colours]
    for role, text in ((UNCLASSIFIED, UNCLASSIFIED), (None, "no role")):
        if count := rest.count(role):
            keys.append(_Key(f"{text} ({count})", NO_ROLE))
    if any((plan.circuit.nodes.get(node) or 0.0) > 0 for node in inner):
        keys.append(_Key("hinders the task", "#ffffff", dashed=True))
    if not plan.lines:
        return keys
    keys.append(_Key("Edges"))
    ends = {line.edge.destination.channel or line.edge.destination.kind for line in plan.lines}
    solid = [text for end, text in (("q", "a query"), ("mlp", "an MLP"), ("logits", "the logits")) if end in ends]
    if solid:
        keys.append(_Key("into " + " or ".join(filter(None, (", ".join(solid[:-1]), solid[-1]))), ENDS, "", 1.4))
    keys += [_Key(f"into {text}", ENDS, end, 1.4) for end, text in (("k", "a key"), ("v", "a value")) if end in ends]
    scores = [line.score for line in plan.lines]
    for colour, text in ((HELPS, "helps the task"), (HINDERS, "hinders the task"), (NO_SCORE, "no score")):
        if any(_sign_colour(score) == colour for score in scores):
            keys.append(_Key(text, colour, ""))
    if largest := max(abs(score or 0.0) for score in scores):
        keys.append(_Key(f"width: size of the score, here {largest:.2g}", ENDS, "", 3.2))
    return keys


def _draw_legend(axes: Axes, plan: _Plan) -> None:
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
    return _short(" · ".join((circuit.shape.name, *said)), 60)


def _counts(plan: _Plan) -> str:
    circuit = plan.circuit
    counted = [_count(len(circuit.nodes), "node"), _count(len(circuit.edges), "edge")]
    if circuit.heads:
        heads = circuit.universe("heads")
        places = circuit.universe("nodes") // heads
        at = f" × {places} positions" if places > 1 else ""
        counted.append(f"{circuit.sparsity('nodes'):.2%} of {heads} heads{at}")
    return " · ".join(counted)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _caption(plan: _Plan) -> list[str]:
    circuit, drawn = plan.circuit, plan.drawn
    said: list[str] = []
    scored = plan.scored or any(line.score is not None for line in plan.lines)
    if scored:
        said.append("Scores: change of the logit difference when it is patched; negative: it helps the task.")
    nodes, edges = len(set(circuit.nodes) - set(drawn.nodes)), len(circuit.edges) - len(drawn.edges)
    left_out = " and ".join(_count(number, what) for number, what in ((edges, "edge"), (nodes, "node")) if number)
    if left_out:
        what, scores = (drawn.edges, circuit.edges) if edges else (drawn.nodes, circuit.nodes)
        which = "strongest" if any(scores.values()) else "first"
        kind = ("edges and what they join" if nodes else "edges") if edges else "nodes"
        said.append(f"Drawn: the {len(what)} {which} {kind}; {left_out} left out.")
    return said


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


def _number(score: float, largest: float) -> str:
    """With as many places as the largest score has something to show in."""
    if largest and not 1e-4 <= largest < 1e4:
        return f"{score:+.0e}".replace("-", "−")
    places = 2 if largest >= 0.3 or not largest else 1 - math.floor(math.log10(largest))
    return f"{score:+.{places}f}".replace("-", "−")


def _sign_colour(score: float | None) -> str:
    return NO_SCORE if score is None else HINDERS if score > 0 else HELPS


def _luminance(colour: str) -> float:
    red, green, blue = to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


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
