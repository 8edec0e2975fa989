"""A circuit's file: the JSON that EAP-IG and MIB read and write, with one block of our own.

Top level, theirs: `cfg` (`n_layers`, `n_heads`, `parallel_attn_mlp`, `d_model`), `nodes` and `edges`, each name with
`in_graph` and `score`. Names there have no positions: a node or edge is in the graph where it is at any position,
with its score of largest size. Parts that are not listed are not in the graph, which is how their reader takes it too.

Block `neuroplast`, ours: the model, the sign of scores, nodes with their positions, edges where they have positions,
roles, provenance. A file whose two parts disagree was changed by another tool, and is refused.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from neuroplast.circuits.circuit import SIGN, Circuit, Role, Shape
from neuroplast.components import READ_CHANNELS, Edge, Node, parse_edge, parse_node
from neuroplast.errors import InputError
from neuroplast.memory import show_size
from neuroplast.storage import write_text

SCHEMA = 1
LARGEST = 512 * 2**20
"""Bytes of the largest file that is read."""
MOST_LAYERS, MOST_HEADS, MOST_WIDTH = 1000, 1000, 1_000_000

Json = Mapping[str, Any]


def save_circuit(path: Path, circuit: Circuit) -> None:
    """Writes a circuit atomically.

    Raises:
        StorageError: when the disk refuses.
    """
    write_text(path, json.dumps(build_document(circuit), ensure_ascii=False, allow_nan=False) + "\n")


def load_circuit(path: Path) -> Circuit:
    """Reads a circuit: ours, or a graph that EAP-IG or MIB wrote.

    Raises:
        InputError: when the file is missing, too large, or no circuit; one line that says where.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise InputError(f"{path} has {show_size(size)}; a circuit's file has at most {show_size(LARGEST)}")
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        return parse_document(document)
    except OSError as error:
        raise InputError(f"could not read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no circuit: it is not JSON ({str(error)[:120]})") from error
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path} is no circuit: {error}") from error


def build_document(circuit: Circuit) -> dict[str, Any]:
    """The file's contents."""
    shape = circuit.shape
    block: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"name": shape.name, "weights_sha256": shape.weights_sha256},
        "sign": SIGN,
        "positions": list(circuit.positions),
        "nodes": {str(node): score for node, score in circuit.nodes.items()},
    }
    if any(edge.source.position or edge.destination.position for edge in (*circuit.edges, *circuit.outside)) or any(
        score is None for score in circuit.edges.values()
    ):
        block["edges"] = {str(edge): score for edge, score in circuit.edges.items()}
        block["outside"] = {str(edge): score for edge, score in circuit.outside.items()}
    block["roles"] = {
        str(node): {"name": role.name, "why": role.why, "measures": dict(role.measures)}
        for node, role in circuit.roles.items()
    }
    block["provenance"] = dict(circuit.provenance)
    nodes, edges = _collapse(circuit)
    return {
        "cfg": {
            "n_layers": shape.n_layers,
            "n_heads": shape.n_heads,
            "parallel_attn_mlp": shape.parallel,
            "d_model": shape.d_model,
        },
        "nodes": {
            name: {"in_graph": inside} | ({} if score is None else {"score": score})
            for name, (inside, score) in nodes.items()
        },
        "edges": {name: {"score": score or 0.0, "in_graph": inside} for name, (inside, score) in edges.items()},
        "neuroplast": block,
    }


def parse_document(document: Any) -> Circuit:
    """Reads the file's contents.

    Raises:
        InputError: saying which part is not as expected.
    """
    top = _object(document, "the file")
    shape = _shape(top)
    table = _Names(shape)
    nodes: dict[Node, float | None] = {}
    outside_nodes: dict[Node, float] = {}
    for name, entry in _object(top.get("nodes"), "'nodes'").items():
        node, inside, score = table.node(name), *_entry(entry, f"node {name[:60]!r}")
        if inside:
            nodes[node] = score
        elif score is not None:
            outside_nodes[node] = score
    edges: dict[Edge, float | None] = {}
    outside: dict[Edge, float] = {}
    for name, entry in _object(top.get("edges"), "'edges'").items():
        edge, inside, score = table.edge(name), *_entry(entry, f"edge {name[:60]!r}")
        if score is None:
            raise InputError(f"edge {name[:60]!r} has no score that is a number")
        if inside:
            edges[edge] = score
        else:
            outside[edge] = score
    theirs = Circuit(shape, nodes, edges, outside, outside_nodes=outside_nodes)
    if top.get("neuroplast") is None:
        return theirs
    ours = _parse_block(_object(top["neuroplast"], "'neuroplast'"), theirs)
    if (different := _difference(theirs, ours)) is not None:
        raise InputError(
            f"its top level and its block 'neuroplast' disagree about {different}: another tool changed it; remove "
            "the block to take the top level"
        )
    return ours


def _parse_block(block: Json, theirs: Circuit) -> Circuit:
    if block.get("schema") != SCHEMA:
        raise InputError(f"its block 'neuroplast' has schema {str(block.get('schema'))[:20]!r}; this version reads 1")
    _require_writable(block)
    model = _object(block.get("model"), "'model'")
    name, sha256 = model.get("name"), model.get("weights_sha256")
    if not isinstance(name, str) or not (sha256 is None or isinstance(sha256, str)):
        raise InputError("its 'model' must have a name, and weights_sha256 as text or null")
    shape = Shape(name, *theirs.shape.same_parts, sha256)
    scores = _object(block.get("nodes"), "its nodes with positions")
    nodes = {parse_node(each): _score(scores[each], each) for each in scores}
    edges, outside = theirs.edges, theirs.outside
    if "edges" in block:
        found = _object(block["edges"], "its edges with positions")
        edges = {parse_edge(each): _score(found[each], each) for each in found}
        left = _object(block.get("outside", {}), "its 'outside'")
        outside = {parse_edge(each): score for each in left if (score := _score(left[each], each)) is not None}
    positions = block.get("positions", [])
    if not isinstance(positions, list) or not all(isinstance(each, str) for each in cast(list[Any], positions)):
        raise InputError("its 'positions' must be a list of names")
    return Circuit(
        shape,
        nodes,
        edges,
        outside,
        {parse_node(each): _role(role, each) for each, role in _object(block.get("roles", {}), "its 'roles'").items()},
        tuple(cast(list[str], positions)),
        _object(block.get("provenance", {}), "its 'provenance'"),
        theirs.outside_nodes,
    )


class _Names:
    """The parts of a model by name: looked up, because a file may name a hundred thousand edges."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        heads = [Node("head", layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]
        mlps = [Node("mlp", layer) for layer in range(shape.n_layers)]
        self.nodes = {str(node): node for node in (Node("input"), *heads, *mlps, Node("logits"))}
        reads = [Node("head", n.layer, n.head, None, channel) for n in heads for channel in READ_CHANNELS]
        self.ends = {str(node): node for node in (*reads, *mlps, Node("logits"))}

    def node(self, name: str) -> Node:
        """A part without position or channel."""
        if name not in self.nodes:
            raise InputError(f"node {name[:60]!r} is no part of a model of {self.shape.n_layers} layers")
        return self.nodes[name]

    def edge(self, name: str) -> Edge:
        """An edge without positions."""
        source, _, destination = name.partition("->")
        if source not in self.nodes or destination not in self.ends:
            raise InputError(f"edge {name[:60]!r} joins no parts of a model of {self.shape.n_layers} layers")
        edge = Edge(self.nodes[source], self.ends[destination])
        if self.shape.parallel and edge.source.layer is not None and edge.source.layer == edge.destination.layer:
            raise InputError(f"edge {name!r}: in this model attention and MLP of a layer read the same residual stream")
        return edge


def _collapse(circuit: Circuit) -> tuple[dict[str, tuple[bool, float | None]], dict[str, tuple[bool, float | None]]]:
    """Nodes and edges without positions: by name, whether it is in the graph, and its score of largest size."""
    nodes: dict[str, tuple[bool, float | None]] = {}
    edges: dict[str, tuple[bool, float | None]] = {}

    def put(into: dict[str, tuple[bool, float | None]], name: str, inside: bool, score: float | None) -> None:
        former, rank = into.get(name), (inside, abs(score or 0.0))
        if former is None or rank > (former[0], abs(former[1] or 0.0)):
            into[name] = (inside, score)

    for node, score in circuit.nodes.items():
        put(nodes, str(node.at(None)), True, score)
    for node, score in circuit.outside_nodes.items():
        put(nodes, str(node.at(None)), False, score)
    for edge, score in circuit.edges.items():
        put(edges, str(edge.anywhere()), True, score)
    for edge, score in circuit.outside.items():
        put(edges, str(edge.anywhere()), False, score)
    return nodes, edges


def _difference(theirs: Circuit, ours: Circuit) -> str | None:
    """The first name about which two readings disagree."""
    for mine, other in zip(_collapse(ours), _collapse(theirs), strict=True):
        for name in {**mine, **other}:
            inside, score = mine.get(name, (False, None))
            if (inside, score or 0.0) != (other.get(name, (False, None))[0], other.get(name, (False, None))[1] or 0.0):
                return name
    return None


def _shape(top: Json) -> Shape:
    cfg = _object(top.get("cfg"), "'cfg'")

    def whole(name: str, most: int) -> int:
        value = cfg.get(name)
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(f"cfg.{name} must be a whole number from 1 to {most}, got {_shown(value)}")
        return value

    parallel = cfg.get("parallel_attn_mlp", False)
    if not isinstance(parallel, bool):
        raise InputError(f"cfg.parallel_attn_mlp must be true or false, got {_shown(parallel)}")
    return Shape(
        "unknown", whole("n_layers", MOST_LAYERS), whole("n_heads", MOST_HEADS), whole("d_model", MOST_WIDTH), parallel
    )


def _entry(entry: Any, what: str) -> tuple[bool, float | None]:
    """Whether a part is in the graph, and its score; NaN is how EAP-IG writes that it has none."""
    found = _object(entry, what)
    if "neurons" in found:
        raise InputError(f"{what} lists neurons; circuits here are of whole heads and MLPs")
    inside = found.get("in_graph")
    if not isinstance(inside, bool):
        raise InputError(f"{what}: in_graph must be true or false, got {_shown(inside)}")
    score = found.get("score")
    if isinstance(score, float) and math.isnan(score):
        score = None
    return inside, _score(score, what)


def _score(value: Any, what: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise InputError(f"{what[:60]}: its score must be a number, got {_shown(value)}")
    return float(value)


def _role(value: Any, what: str) -> Role:
    role = _object(value, f"the role of {what[:60]}")
    measures = _object(role.get("measures", {}), f"the measures of {what[:60]}")
    name, why = role.get("name"), role.get("why")
    if not isinstance(name, str) or not isinstance(why, str):
        raise InputError(f"the role of {what[:60]} must have a name and a why")
    return Role(name, why, {each: _score(measures[each], f"{what}, {each}") for each in measures})


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be an object, got {_shown(value)}")
    return cast(dict[str, Any], value)


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]}"


def _require_writable(block: Json) -> None:
    """JSON can spell half a surrogate pair and infinity, which no file takes back."""
    try:
        json.dumps(block, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"its block 'neuroplast' holds what no file can ({str(error)[:80]})") from error


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise InputError(f"the name {repeated[:60]!r} stands twice in one object")
    return found
