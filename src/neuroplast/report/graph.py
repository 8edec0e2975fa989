"""A circuit as a graph that a reader can point at: the places of `circuit_layout`, in the units of an SVG.

The static picture of `circuit.py` has the same boxes and lines. Here everything is drawn from the top down, 96 units an
inch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from neuroplast.circuits.circuit import Circuit
from neuroplast.report.circuit_layout import BOX_HEIGHT, STYLES, Line, Plan, choose, count_of, ink_on, show_score

UNITS = 96
ABOVE, BELOW, BESIDE = 0.3, 0.68, 0.25
"""Inches around the boxes."""

Unit = Callable[[float], float]
"""Inches across, or up, as units of the SVG."""


@dataclass(frozen=True)
class GraphBox:
    """A node's box."""

    node: str
    """The node, `a23.h3@end`."""
    name: str
    """What is written on it."""
    score: str
    """Its score as text; empty where there is none to show."""
    role: str
    """What it does; empty where that is not known."""
    x: float
    """Left end."""
    y: float
    """Upper end."""
    width: float
    """How wide."""
    height: float
    """How high."""
    fill: str
    """Colour of its role."""
    ink: str
    """Colour of the letters on it."""
    hinders: bool
    """Whether its score is positive."""
    part: bool
    """Whether it is a head or an MLP, and no end of the graph."""


@dataclass(frozen=True)
class GraphLine:
    """An edge's line."""

    edge: str
    """The edge, with its score."""
    source: str
    """The box that it leaves."""
    destination: str
    """The box that it enters."""
    path: str
    """Its curve, as SVG writes it."""
    sign: str
    """`helps`, `hinders` or `unknown`."""
    width: float
    """How thick."""
    opacity: float
    """How opaque, 0 to 1."""
    dashes: str
    """Dashes and gaps; empty is solid."""


@dataclass(frozen=True)
class Graph:
    """What is drawn of a circuit."""

    width: float
    """Of the whole."""
    height: float
    """Of the whole."""
    columns: tuple[tuple[str, float, float, float, float], ...]
    """Name (empty for none), left, upper end, width and height of each position's ground."""
    layers: tuple[tuple[str, float, float], ...]
    """Name of each layer, and where it is written."""
    boxes: tuple[GraphBox, ...]
    """Its nodes."""
    lines: tuple[GraphLine, ...]
    """Its edges."""
    roles: tuple[tuple[str, str, int], ...]
    """Role, colour and number of nodes of each."""
    left_out: str
    """What is not drawn, in words; empty where all is."""


def build_graph(circuit: Circuit) -> Graph | None:
    """Lays a circuit out; None where it has no nodes."""
    drawn = choose(circuit)
    if not drawn.nodes:
        return None
    plan = Plan(circuit, drawn)
    top = plan.top + BOX_HEIGHT / 2 + ABOVE
    low, high = plan.y(0) - BOX_HEIGHT / 2 - 0.14, plan.top + BOX_HEIGHT / 2 + 0.14

    def x(inches: float) -> float:
        return round(inches * UNITS, 1)

    def y(inches: float) -> float:
        return round((top - inches) * UNITS, 1)

    missing = [
        count_of(number, what)
        for number, what in (
            (len(set(circuit.nodes) - set(drawn.nodes)), "node"),
            (len(circuit.edges) - len(drawn.edges), "edge"),
        )
        if number
    ]
    return Graph(
        width=x(plan.right + BESIDE),
        height=y(plan.y(0) - BELOW),
        columns=tuple(
            (name or "", x(left), y(high), x(right - left), x(high - low)) for name, (left, right) in plan.spans.items()
        ),
        layers=tuple((text, x(plan.left - 0.14), y((plan.y(a) + plan.y(b)) / 2)) for text, a, b in plan.labels),
        boxes=_boxes(plan, x, y),
        lines=tuple(_line(line, plan, x, y) for line in plan.lines),
        roles=_roles(plan),
        left_out=" and ".join(missing),
    )


def _boxes(plan: Plan, x: Unit, y: Unit) -> tuple[GraphBox, ...]:
    largest = max((abs(plan.circuit.nodes.get(node) or 0.0) for node in plan.boxes), default=0.0)
    found: list[GraphBox] = []
    bars: set[tuple[str, int]] = set()
    for node, box in plan.boxes.items():
        part = node.kind in ("head", "mlp")
        if not part and (node.kind, box.row) in bars:
            continue
        bars.add((node.kind, box.row))
        score, fill = plan.circuit.nodes.get(node) if part else None, plan.fill(node)
        found.append(
            GraphBox(
                node=str(node),
                name=str(node.at(None)) if part else node.kind,
                score="" if score is None else show_score(score, largest),
                role=plan.roles[node] or "",
                x=x(box.left),
                y=y(plan.y(box.row) + BOX_HEIGHT / 2),
                width=x(box.right - box.left),
                height=x(BOX_HEIGHT),
                fill=fill,
                ink=ink_on(fill),
                hinders=score is not None and score > 0,
                part=part,
            )
        )
    return tuple(found)


def _line(line: Line, plan: Plan, x: Unit, y: Unit) -> GraphLine:
    largest = max(abs(each.score or 0.0) for each in plan.lines)
    share = 0.2 if line.score is None or not largest else abs(line.score) / largest
    path = " ".join(
        step.kind + " ".join(f"{x(across):g},{y(up):g}" for across, up in step.points) for step in plan.way(line)
    )
    sign = "unknown" if line.score is None else "hinders" if line.score > 0 else "helps"
    score = "" if line.score is None else f"  {show_score(line.score, largest)}"
    return GraphLine(
        edge=f"{line.edge}{score}",
        source=str(line.source.node),
        destination=str(line.destination.node),
        path=path,
        sign=sign,
        width=round(1.0 + 3.0 * share, 2),
        opacity=round(0.5 + 0.35 * share, 2),
        dashes=" ".join(f"{1.33 * length:g}" for length in STYLES[line.edge.destination.channel or ""]),
    )


def _roles(plan: Plan) -> tuple[tuple[str, str, int], ...]:
    counts: dict[tuple[str, str], int] = {}
    for node in plan.boxes:
        if node.kind in ("head", "mlp"):
            key = plan.roles[node] or "no role", plan.fill(node)
            counts[key] = counts.get(key, 0) + 1
    return tuple((role, colour, count) for (role, colour), count in counts.items())
