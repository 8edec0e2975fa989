"""A circuit's picture can be read: nothing overlaps, no line hides behind a box, and what is left out is said."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.text import Text

from neuroplast.circuits.circuit import Circuit, Role, Shape
from neuroplast.circuits.published import published_circuit
from neuroplast.components import READ_CHANNELS, Edge, Node, parse_edge, parse_node
from neuroplast.errors import InputError, StorageError
from neuroplast.report.circuit import CIRCUIT_FILES, draw_circuit, write_circuit_drawing, write_circuit_report
from neuroplast.report.circuit_layout import HELPS, HINDERS, MOST_EDGES, MOST_NODES, NO_SCORE, ROLE_COLOURS

SHAPE = Shape("m", n_layers=30, n_heads=9, d_model=8)


def published() -> Circuit:
    """The circuit of the paper, with scores that are made up."""
    circuit, rng = published_circuit("ioi-gpt2"), Random(1)
    signs = {"negative name mover": 0.7, "name mover": -1.1}
    return replace(
        circuit,
        nodes={node: signs.get(circuit.roles[node].name, -0.3) * rng.uniform(0.5, 1.5) for node in circuit.nodes},
        edges={edge: rng.gauss(-0.1, 0.2) for edge in circuit.edges},
    )


def large() -> Circuit:
    """70 heads of a model of 30 layers at five positions, and several hundred edges."""
    rng = Random(3)
    positions = ("io", "s1", "s1+1", "s2", "end")
    centres = dict(zip(positions, (2, 3, 6, 11, 22), strict=True))
    nodes: dict[Node, float | None] = {}
    while len(nodes) < 70:
        at = rng.choices(positions, (1, 1, 2, 4, 6))[0]
        layer = min(29, int(abs(rng.gauss(centres[at], 5))))
        nodes[Node("head", layer, rng.randrange(9), at)] = rng.gauss(-0.2, 0.6)
    edges: dict[Edge, float | None] = {}
    while len(edges) < 300:
        source, reader = rng.sample(list(nodes), 2)
        channel = rng.choice(READ_CHANNELS)
        if source.depth < reader.depth and (channel != "q" or source.position == reader.position):
            edges[Edge(source, Node("head", reader.layer, reader.head, source.position, channel))] = rng.gauss(0, 0.3)
    roles = {node: Role(rng.choice((*ROLE_COLOURS, "unclassified", "something new")), "") for node in nodes}
    edges |= {Edge(node, parse_node("logits@end")): -0.5 for node in nodes if node.position == "end"}
    return Circuit(SHAPE, nodes, edges, roles=roles, positions=positions)


def by_edges(count: int) -> Circuit:
    """Heads and MLPs without positions, as edge attribution finds them."""
    rng = Random(count)
    parts = [Node("head", layer, head) for layer in range(30) for head in range(9)]
    parts += [Node("input"), *(Node("mlp", layer) for layer in range(30))]
    size = {part: abs(rng.gauss(0, 1)) ** 3 for part in parts}
    sources, readers = (rng.choices(parts, [size[part] for part in parts], k=20 * count) for _ in range(2))
    edges: dict[Edge, float | None] = {}
    for source, reader in zip(sources, readers, strict=True):
        if source.depth < reader.depth and len(edges) < count:
            channel = rng.choice(READ_CHANNELS) if reader.kind == "head" else None
            edges[Edge(source, replace(reader, channel=channel))] = 0.001 * size[source] * size[reader]
    assert len(edges) == count
    ends = {end for edge in edges for end in (edge.source, replace(edge.destination, channel=None))}
    edges |= {Edge(part, Node("logits")): -0.1 for part in ends}
    return Circuit(SHAPE, dict.fromkeys([*ends, Node("logits")]), edges)


def wrapped() -> Circuit:
    """Two layers, more than fits side by side at S2 and at no position; at END less."""
    nodes = [Node("head", layer, head, at) for layer in (3, 4) for head in range(9) for at in ("s2", None)]
    nodes += [Node("head", layer, head, "end") for layer in (3, 4) for head in range(2)]
    mlps = [Node("mlp", layer, position=at) for layer in (3, 4) for at in ("end", None)]
    edges = {Edge(node, mlp): 1.0 for node in nodes for mlp in mlps if node.layer == mlp.layer}
    return Circuit(
        SHAPE, dict.fromkeys([*nodes, *mlps], -0.25), dict(list(edges.items())[::3]), positions=("s2", "end")
    )


CIRCUITS = {
    "published": published,
    "without scores": lambda: published_circuit("ioi-gpt2"),
    "large": large,
    "few edges": lambda: by_edges(40),
    "many edges": lambda: by_edges(900),
    "wrapped": wrapped,
    "two nodes": lambda: Circuit(SHAPE, {parse_node("input"): None, parse_node("logits"): None}),
    "one MLP": lambda: Circuit(SHAPE, {parse_node("m3"): -12345.0}),
    "nodes only": lambda: Circuit(SHAPE, dict.fromkeys(large().nodes, -1e-7)),
    "no nodes": lambda: Circuit(SHAPE, {}, {parse_edge("a0.h1@s2->a3.h1<v>@s2"): 0.5, parse_edge("m1->logits"): None}),
    "empty": lambda: Circuit(SHAPE, {}),
}


@pytest.fixture(params=CIRCUITS)
def circuit(request: pytest.FixtureRequest) -> Circuit:
    return CIRCUITS[request.param]()


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def boxes(figure: Figure) -> list[FancyBboxPatch]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch) and patch.get_zorder() == 4]


def lines(figure: Figure) -> list[PathPatch]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch)]


def test_no_two_texts_overlap_and_all_lie_in_the_picture(circuit: Circuit):
    figure = draw_circuit(circuit)
    renderer = FigureCanvasAgg(figure).get_renderer()
    extents = [(text, text.get_window_extent(renderer)) for text in figure.findobj(Text) if text.get_text()]
    width, height = figure.get_size_inches() * figure.dpi
    for number, (text, here) in enumerate(extents):
        assert here.x0 >= 0 and here.y0 >= 0 and here.x1 <= width and here.y1 <= height, text
        for other, there in extents[number + 1 :]:
            apart = here.x1 <= there.x0 or there.x1 <= here.x0 or here.y1 <= there.y0 or there.y1 <= here.y0
            assert apart, f"{text} and {other}"


def test_every_label_lies_in_its_box(circuit: Circuit):
    figure = draw_circuit(circuit)
    renderer = FigureCanvasAgg(figure).get_renderer()
    frames = [box.get_window_extent(renderer) for box in boxes(figure)]
    for text in figure.findobj(Text):
        if text.get_zorder() == 5:
            here = text.get_window_extent(renderer)
            assert any(f.x0 < here.x0 and here.x1 < f.x1 and f.y0 < here.y0 and here.y1 < f.y1 for f in frames), text


def test_no_line_passes_behind_a_box(circuit: Circuit):
    figure = draw_circuit(circuit)
    frames = [box.get_path().get_extents(box.get_patch_transform()) for box in boxes(figure)]
    lefts, lows, rights, highs = np.array([frame.extents for frame in frames] or np.zeros((0, 4))).T
    for line in lines(figure):
        pieces = [piece(np.linspace(0, 1, 60)) for piece, _ in line.get_path().iter_bezier()]
        x, y = np.concatenate(pieces)[:, :, None].transpose(1, 0, 2)
        behind = (x > lefts) & (x < rights) & (y > lows + 1e-6) & (y < highs - 1e-6)
        assert not behind.any()


def test_every_line_rises_or_arches_over_one_row_and_none_leaves_the_panels(circuit: Circuit):
    figure = draw_circuit(circuit)
    panels = [patch.get_extents() for patch in figure.axes[0].patches if patch.get_zorder() == 0]
    for line in lines(figure):
        path, extents = line.get_path(), line.get_extents()
        assert path.vertices[-1, 1] >= path.vertices[0, 1]
        assert extents.y1 <= panels[0].y1 and panels[0].y0 <= extents.y0
        assert panels[0].x0 - 8 <= extents.x0 and extents.x1 <= panels[-1].x1 + 8


def test_all_of_a_circuit_of_usual_size_is_drawn():
    figure = draw_circuit(published())
    assert len(boxes(figure)) == 26 + 7 + 1 + 1, "nodes, the legend's roles and its hindering one, logits"
    assert len(lines(figure)) == 137
    assert {"26 nodes · 137 edges · 6.02% of 144 heads × 3 positions", "s1+1", "s2", "end"} <= set(texts(figure))
    assert not any("left out" in text for text in texts(figure))


def test_layers_rise_and_positions_stand_side_by_side():
    figure = draw_circuit(published())
    at = {text.get_text(): text.get_position() for text in figure.findobj(Text)}
    assert at["a0.h1"][1] < at["a3.h0"][1] < at["a5.h5"][1] == at["a5.h9"][1] < at["a10.h0"][1] < at["logits"][1]
    assert at["a2.h2"][0] == at["a4.h11"][0] < at["a0.h1"][0] < at["a6.h9"][0] < at["a9.h9"][0]
    assert at["layer 5"][1] == pytest.approx(dict(boxes_by_name(figure))["a5.h5"].get_y() + 0.17)


def boxes_by_name(figure: Figure) -> list[tuple[str, FancyBboxPatch]]:
    """Each node's name with the box that it stands in."""
    found = []
    for text in figure.findobj(Text):
        x, y = text.get_position()
        if text.get_zorder() == 5 and text.get_text().startswith(("a", "m", "i", "l")):
            (box,) = (
                box
                for box in boxes(figure)
                if box.get_x() < x < box.get_x() + box.get_width() and box.get_y() < y < box.get_y() + box.get_height()
            )
            found.append((text.get_text(), box))
    return found


def test_a_boxs_colour_is_its_role_and_its_outline_its_sign():
    circuit = published()
    found = dict(boxes_by_name(draw_circuit(circuit)))
    for node, score in circuit.nodes.items():
        box = found[str(node.at(None))]
        assert to_hex(box.get_facecolor()) == ROLE_COLOURS[circuit.roles[node].name.lower()]
        assert (box.get_linestyle() != "-") == (score is not None and score > 0)


def test_the_legend_counts_roles():
    said = texts(draw_circuit(published()))
    assert {"name mover (3)", "backup name mover (8)", "induction (4)", "hinders the task", "into a key"} <= set(said)
    circuit = large()
    said = texts(draw_circuit(circuit))
    for role in {role.name for role in circuit.roles.values()}:
        assert f"{role} ({len(circuit.with_role(role))})" in said
    assert "no role (1)" in texts(draw_circuit(Circuit(SHAPE, {parse_node("m0"): None})))


def draw(nodes: str, edges: dict[str, float | None]) -> Figure:
    return draw_circuit(
        Circuit(SHAPE, {parse_node(name): None for name in nodes.split()}, {parse_edge(e): s for e, s in edges.items()})
    )


@pytest.mark.parametrize(
    ("edge", "ends"),
    [
        ("a0.h0@s2->a3.h1<v>@s2", [("a0.h0", "a3.h1"), ("a0.h0", "a3.h1")]),
        ("a0.h0@s2->a3.h1<k>@s2", [("a0.h0", "a3.h1"), ("a0.h0", "a3.h1")]),
        ("a0.h0@s2->a3.h1<q>@s2", [("a0.h0", "a3.h1")]),
        ("a0.h0@s2->logits@end", [("a0.h0", "logits")]),
        ("a0.h0->m4", [("a0.h0", "m4")]),
    ],
)
def test_keys_and_values_go_to_every_box_of_their_head_and_queries_to_one(edge: str, ends: list[tuple[str, str]]):
    figure = draw("a0.h0@s2 a3.h1@s2 a3.h1@end logits@end", {edge: 1.0})
    found = []
    for line in lines(figure):
        (x0, y0), (x1, y1) = line.get_path().vertices[[0, -1]]
        found.append((box_at(figure, x0, y0 - 0.1), box_at(figure, x1, y1 + 0.1)))
    assert found == ends
    assert len({line.get_path().vertices[-1, 0] for line in lines(figure)}) == len(ends)


def box_at(figure: Figure, x: float, y: float) -> str:
    (name,) = (
        name
        for name, box in boxes_by_name(figure)
        if box.get_x() < x < box.get_x() + box.get_width() and box.get_y() < y < box.get_y() + box.get_height()
    )
    return name


def test_a_line_tells_size_sign_and_channel():
    edges = {
        "a0.h0->a3.h1<q>": -2.0,
        "a0.h0->a3.h1<k>": 1.0,
        "a0.h0->a3.h1<v>": None,
        "a0.h0->a4.h1<q>": 0.0,
    }
    found = sorted(lines(draw("a0.h0 a3.h1 a4.h1", edges)), key=lambda line: line.get_linewidth())
    unscored = next(line for line in found if to_hex(line.get_edgecolor()) == NO_SCORE)
    scored = [line for line in found if line is not unscored]
    assert [to_hex(line.get_edgecolor()) for line in scored] == [HELPS, HINDERS, HELPS]
    weakest, middle, strongest = (line.get_linewidth() for line in scored)
    assert middle - weakest == pytest.approx(strongest - middle), "width grows with the size of the score"
    assert scored[0].get_linestyle() == scored[2].get_linestyle() == "-"
    assert len({str(line.get_linestyle()) for line in (scored[0], scored[1], unscored)}) == 3


def test_the_weakest_edges_are_left_out_and_counted():
    circuit = large()
    figure = draw_circuit(circuit)
    assert len(boxes_of_nodes(figure)) == 70 and len(lines(figure)) <= MOST_EDGES
    (said,) = (text for text in texts(figure) if "left out" in text)
    drawn = int(said.split()[2])
    assert said == f"Drawn: the {drawn} strongest edges; {len(circuit.edges) - drawn} edges left out."
    assert drawn > 120
    widest = max(line.get_linewidth() for line in lines(figure))
    strongest = max(abs(score or 0) for score in circuit.edges.values())
    assert widest == pytest.approx(3.2) and f"width: size of the score, here {strongest:.2g}" in texts(figure)


def boxes_of_nodes(figure: Figure) -> list[str]:
    return [name for name, _ in boxes_by_name(figure) if name not in ("input", "logits")]


def test_of_hundreds_of_nodes_those_are_drawn_that_the_strongest_edges_join():
    circuit = by_edges(900)
    figure = draw_circuit(circuit)
    shown = boxes_of_nodes(figure)
    assert len(circuit.nodes) > 150 and 40 < len(shown) <= MOST_NODES
    said = " ".join(texts(figure))
    assert "strongest edges and what they join" in said and f"{len(circuit.nodes)} nodes · " in said
    strongest = max(circuit.edges, key=lambda edge: abs(circuit.edges[edge] or 0))
    assert str(strongest.source) in shown


def test_of_too_many_nodes_without_edges_the_strongest_are_drawn():
    nodes = {Node("head", layer, head): 0.001 * (9 * layer + head) for layer in range(30) for head in range(9)}
    figure = draw_circuit(Circuit(SHAPE, dict(nodes)))
    shown = boxes_of_nodes(figure)
    assert len(shown) == MOST_NODES and "a29.h8" in shown and "a0.h1" not in shown
    assert f"Drawn: the {MOST_NODES} strongest nodes; {270 - MOST_NODES} nodes left out." in " ".join(texts(figure))


def test_an_empty_circuit_says_so():
    assert texts(draw_circuit(Circuit(SHAPE, {}))) == ["m", "This circuit is empty: it has no nodes and no edges."]


def test_scores_that_are_small_or_huge_are_readable():
    small = draw_circuit(Circuit(SHAPE, {parse_node("m0"): -0.00321, parse_node("m1"): 0.02}))
    assert {"−0.003", "+0.020"} <= set(texts(small))
    assert "−1e+04" in texts(draw_circuit(Circuit(SHAPE, {parse_node("m0"): -12345.0})))
    assert "−1e−07" in texts(draw_circuit(Circuit(SHAPE, {parse_node("m0"): -1e-7})))


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_circuit_gives_the_same_bytes(tmp_path: Path, suffix: str):
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    write_circuit_drawing(large(), first)
    other = large()
    shuffled = list(other.edges.items())
    Random(0).shuffle(shuffled)
    write_circuit_drawing(replace(other, edges=dict(shuffled)), second)
    assert first.read_bytes() == second.read_bytes()


def test_the_bytes_do_not_hang_on_the_order_of_sets(tmp_path: Path):
    code = (
        "import sys; from neuroplast.circuits.published import published_circuit; "
        "from neuroplast.report.circuit import write_circuit_drawing; "
        "write_circuit_drawing(published_circuit(), sys.argv[1])"
    )
    for seed in "12":
        path = tmp_path / f"{seed}.svg"
        subprocess.run([sys.executable, "-c", code, path], check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_names_that_are_not_letters_do_no_harm(tmp_path: Path):
    odd = "$x_1$ <b>&amp; -- \x1b[31m\ud800"
    node = Node("head", 1, 1, "$s_2$")
    circuit = Circuit(
        Shape(odd, 2, 2, 4), {node: 1.0}, roles={node: Role(odd, odd)}, positions=("$s_2$",), provenance={"task": 3}
    )
    write_circuit_drawing(circuit, tmp_path / "circuit.svg")
    root = ElementTree.parse(tmp_path / "circuit.svg").getroot()
    assert root.tag.endswith("svg")
    assert "$s_2$" in texts(draw_circuit(circuit))


def test_another_kind_of_file_is_refused(tmp_path: Path):
    for name in ("circuit.pdf", "circuit", "circuit.svg.gz"):
        with pytest.raises(InputError, match=f"drawn as .svg or .png, got '{name}'"):
            write_circuit_drawing(published_circuit(), tmp_path / name)
    write_circuit_drawing(published_circuit(), str(tmp_path / "circuit.PNG"))
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.PNG"]
    assert (tmp_path / "circuit.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        write_circuit_drawing(published_circuit(), tmp_path / "file" / "circuit.png")


def test_the_report_is_two_pictures_and_two_tables(tmp_path: Path):
    scores = {"a0.h0@s2": -0.1 - 0.2, "a1.h1@end": None}
    circuit = Circuit(
        SHAPE,
        {parse_node(name): score for name, score in scores.items()},
        {parse_edge("a0.h0@s2->a1.h1<v>@s2"): -0.5, parse_edge("a1.h1@end->logits@end"): -2.0},
        {parse_edge("m0->m1"): 0.25},
        {parse_node("a1.h1@end"): Role("name mover", 'copies, "well"')},
        ("s2", "end"),
    )
    write_circuit_report(circuit, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(CIRCUIT_FILES)
    nodes, edges = (
        list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("nodes.csv", "edges.csv")
    )
    assert [row["node"] for row in nodes] == ["a0.h0@s2", "a1.h1@end"]
    assert float(nodes[0]["score"]) == -0.1 - 0.2 and nodes[1]["score"] == ""
    assert nodes[1]["role"] == "name mover" and nodes[1]["why"] == 'copies, "well"' and nodes[0]["role"] == ""
    assert [(row["edge"], row["in_circuit"]) for row in edges] == [
        ("a1.h1@end->logits@end", "yes"),
        ("a0.h0@s2->a1.h1<v>@s2", "yes"),
        ("m0->m1", "no"),
    ]
