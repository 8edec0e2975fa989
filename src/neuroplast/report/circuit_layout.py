"""Where everything stands in a circuit's picture: what is drawn, rows, columns, the way of every line, the legend.

All lengths are inches.
"""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from neuroplast.circuits.circuit import Circuit, order_of
from neuroplast.components import Edge, Node
from neuroplast.report.style import DIVERGING

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

BOX_HEIGHT, GAP, MARGIN, CLEAR = 0.34, 0.26, 0.3, 0.04
LABELS, LEGEND, LEGEND_LINE, LEAST_WIDTH = 0.75, 2.95, 0.23, 7.0
BOXES_A_LINE = {False: 12, True: 6}
"""Most boxes side by side in one column, by whether there are several columns."""
PITCHES, IDEAL_HEIGHT = (0.66, 0.95), 10.0
"""Least and largest distance of two rows, and how tall all rows shall be if that allows it."""
_SHARES = np.linspace(0, 1, 129)
_CURVE_Y, _CURVE_X = 1.5 * _SHARES - 1.5 * _SHARES**2 + _SHARES**3, 3 * _SHARES**2 - 2 * _SHARES**3
"""A line's curve between two rows, as shares of its height and of its width: it begins and ends upright."""


@dataclass(frozen=True)
class Drawn:
    """What of a circuit is drawn."""

    nodes: tuple[Node, ...]
    """Boxes, in the order of the forward pass."""
    edges: tuple[tuple[Edge, float | None], ...]
    """The strongest edges, the weakest of them first."""
    lines: tuple[tuple[Edge, Node, Node], ...]
    """Their lines, in the same order: edge, box that it leaves, box that it enters."""


def choose(circuit: Circuit) -> Drawn:
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
    return Drawn(tuple(sorted(shown, key=order_of)), tuple(reversed(edges)), tuple(reversed(lines)))


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
class Box:
    """A node's place."""

    node: Node
    left: float
    right: float
    row: int
    leaving: list["Line"] = field(default_factory=list["Line"])
    entering: list["Line"] = field(default_factory=list["Line"])

    @property
    def middle(self) -> float:
        """Its middle, from left to right."""
        return (self.left + self.right) / 2


@dataclass(frozen=True)
class Step:
    """One piece of a line's curve."""

    kind: Literal["M", "L", "C"]
    """Go there, draw straight to there, or along a cubic Bézier curve; as SVG calls them."""
    points: tuple[tuple[float, float], ...]
    """One point, or the two control points and the end of a curve."""


@dataclass
class Line:
    """A line's way."""

    edge: Edge
    score: float | None
    source: Box
    destination: Box
    rows: list[int]
    """Where it leaves, the rows whose gaps it is led through, where it enters."""
    xs: list[float]
    """Where it is there."""
    gaps: dict[int, tuple[tuple[float, float], float]] = field(
        default_factory=dict[int, tuple[tuple[float, float], float]]
    )
    """By row, the gap that it is led through, and where in it the line would be if there were no other."""


class Plan:
    """Where everything stands."""

    def __init__(self, circuit: Circuit, drawn: Drawn) -> None:
        self.circuit, self.drawn = circuit, drawn
        self.lines: list[Line] = []
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
            width = max(widest * (self.box_width + GAP) + GAP, 0.5 + 0.085 * len(shorten(column or "", 26)))
            self.spans[column] = (x, x + width)
            x += width + 0.14
        self.left, self.right = MARGIN + LABELS, x - 0.14

    def _place_rows(self, lines: Mapping[tuple[int, str | None], list[list[Node]]]) -> None:
        self.boxes: dict[Node, Box] = {}
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
                        self.boxes[node] = Box(node, x, x + self.box_width, number)
                        x += self.box_width + GAP
            self.labels.append((f"layer {layer}", row, row + count - 1))
            row += count
        self.n_rows = row + self._place_bar("logits", row)
        self.pitch = min(max(IDEAL_HEIGHT / self.n_rows, PITCHES[0]), PITCHES[1])
        self.rows: dict[int, list[Box]] = {row: [] for row in range(self.n_rows)}
        for box in sorted(self.boxes.values(), key=lambda box: box.left):
            self.rows[box.row].append(box)

    def _place_bar(self, kind: str, row: int) -> bool:
        """Input and logits are one bar: as wide as their column, or as everything where they have none."""
        nodes = [node for node in self.drawn.nodes if node.kind == kind]
        whole = self.left, self.right
        left, right = self.spans.get(nodes[0].position, whole) if len(nodes) == 1 and nodes[0].position else whole
        self.boxes |= {node: Box(node, left, right, row) for node in nodes}
        return bool(nodes)

    def y(self, row: int) -> float:
        """The middle of a row."""
        return self.bottom + row * self.pitch

    def fill(self, node: Node) -> str:
        """The colour of a box: what its node does."""
        return ENDS if node.kind in ("input", "logits") else self.colours.get(self.roles[node], NO_ROLE)

    def way(self, line: Line) -> list[Step]:
        """A line's curve: out of the top of a box, through the gaps of rows, into the bottom of another."""
        x, y = line.xs[0], self.y(line.rows[0]) + BOX_HEIGHT / 2
        steps = [Step("M", ((x, y),))]
        if line.rows == [line.rows[0]] * 2:
            # From the top of a head over its row to the top of the MLP of its layer.
            over = y + (0.8 * (self.pitch - BOX_HEIGHT) if line.rows[0] + 1 < self.n_rows else 0.16)
            return [*steps, Step("C", ((x, over), (line.xs[1], over), (line.xs[1], y)))]
        for row, end in zip(line.rows[1:], line.xs[1:], strict=True):
            low = self.y(row) - BOX_HEIGHT / 2
            steps.append(Step("C", ((x, (y + low) / 2), (end, (y + low) / 2), (end, low))))
            x, y = end, low + BOX_HEIGHT
            if row < line.rows[-1]:
                steps.append(Step("L", ((x, y),)))
        return steps

    def _join(self) -> None:
        """Draws every line from box to box, and leads it through a gap wherever it would pass behind another box."""
        scores = dict(self.drawn.edges)
        for edge, source, destination in self.drawn.lines:
            begin, end = self.boxes[source], self.boxes[destination]
            line = Line(edge, scores[edge], begin, end, [begin.row, end.row], [begin.middle, end.middle])
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

    def _hit(self, line: Line) -> tuple[int, int, float] | None:
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


def _spread(lines: Sequence[Line], box: Box, end: int, beside: int) -> None:
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


@dataclass(frozen=True)
class Key:
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


def _legend(plan: Plan) -> list[Key]:
    inner = [node for node in plan.drawn.nodes if node.kind in ("head", "mlp")]
    keys = [Key("Nodes")] if inner else []
    for role, colour in plan.colours.items():
        keys.append(Key(f"{shorten(role or '', 26)} ({sum(plan.roles[node] == role for node in inner)})", colour))
    rest = [plan.roles[node] for node in inner if plan.roles[node] not in plan.colours]
    for role, text in ((UNCLASSIFIED, UNCLASSIFIED), (None, "no role")):
        if count := rest.count(role):
            keys.append(Key(f"{text} ({count})", NO_ROLE))
    if any((plan.circuit.nodes.get(node) or 0.0) > 0 for node in inner):
        keys.append(Key("hinders the task", "#ffffff", dashed=True))
    if not plan.lines:
        return keys
    keys.append(Key("Edges"))
    ends = {line.edge.destination.channel or line.edge.destination.kind for line in plan.lines}
    solid = [text for end, text in (("q", "a query"), ("mlp", "an MLP"), ("logits", "the logits")) if end in ends]
    if solid:
        keys.append(Key("into " + " or ".join(filter(None, (", ".join(solid[:-1]), solid[-1]))), ENDS, "", 1.4))
    keys += [Key(f"into {text}", ENDS, end, 1.4) for end, text in (("k", "a key"), ("v", "a value")) if end in ends]
    scores = [line.score for line in plan.lines]
    for colour, text in ((HELPS, "helps the task"), (HINDERS, "hinders the task"), (NO_SCORE, "no score")):
        if any(sign_colour(score) == colour for score in scores):
            keys.append(Key(text, colour, ""))
    if largest := max(abs(score or 0.0) for score in scores):
        keys.append(Key(f"width: size of the score, here {largest:.2g}", ENDS, "", 3.2))
    return keys


def count_of(number: int, what: str) -> str:
    """A number of things, in the right number."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def _caption(plan: Plan) -> list[str]:
    circuit, drawn = plan.circuit, plan.drawn
    said: list[str] = []
    scored = plan.scored or any(line.score is not None for line in plan.lines)
    if scored:
        said.append("Scores: change of the logit difference when it is patched; negative: it helps the task.")
    nodes, edges = len(set(circuit.nodes) - set(drawn.nodes)), len(circuit.edges) - len(drawn.edges)
    left_out = " and ".join(count_of(number, what) for number, what in ((edges, "edge"), (nodes, "node")) if number)
    if left_out:
        what, scores = (drawn.edges, circuit.edges) if edges else (drawn.nodes, circuit.nodes)
        which = "strongest" if any(scores.values()) else "first"
        kind = ("edges and what they join" if nodes else "edges") if edges else "nodes"
        said.append(f"Drawn: the {len(what)} {which} {kind}; {left_out} left out.")
    return said


def sign_colour(score: float | None) -> str:
    """The colour of what helps, hinders, or has no score."""
    return NO_SCORE if score is None else HINDERS if score > 0 else HELPS


def shorten(text: str, most: int) -> str:
    """A text of at most so many letters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def show_score(score: float, largest: float) -> str:
    """A score with as many places as the largest score has something to show in."""
    if largest and not 1e-4 <= largest < 1e4:
        return f"{score:+.0e}".replace("-", "−")
    places = 2 if largest >= 0.3 or not largest else 1 - math.floor(math.log10(largest))
    return f"{score:+.{places}f}".replace("-", "−")


def ink_on(colour: str) -> str:
    """What can be read on a colour."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5 else "#14181f"
