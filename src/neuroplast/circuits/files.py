"""A circuit's file: the JSON that EAP-IG (github.com/hannamw/EAP-IG, `Graph.to_json`) and MIB read and write, with
one block of our own.

Top level, theirs: `cfg` (`n_layers`, `n_heads`, `parallel_attn_mlp`, `d_model`), `nodes` and `edges`, by name, with
`in_graph` and `score`. Names have no positions there: a node or an edge is in the graph where it is at any position,
with its score of largest size. What is not listed is not in the graph; their reader takes it so too. Of theirs is also
read: a node's score NaN (it has none), a node that is only true or false (EAP-IG's first files), an edge without a
score or with null (those, and MIB's files of membership). Nodes that list neurons are refused.

Block `neuroplast`, ours: the model, the sign of scores, positions; `nodes` with positions and scores, `edges` and
`outside` likewise where an edge has a position or no score, `outside_nodes`, `roles`, `provenance`. A file whose two
parts disagree was changed by another tool, and is refused: which of them is meant cannot be known.

A file that comes from elsewhere is untrusted: whatever is wrong with it is one line, found in a time that grows with
its size alone.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard, cast

from neuroplast.circuits.circuit import SIGN, Circuit, Part, Role, Shape
from neuroplast.components import READ_CHANNELS, Edge, Node, parse_edge, parse_node
from neuroplast.errors import InputError, one_line
from neuroplast.reading import LARGEST, parse_json, read_text, require_depth
from neuroplast.storage import write_json

SCHEMA = 1
DEEPEST = 60
"""Levels of the most deeply nested block that is read; what writes JSON recurses."""
LONGEST = 4096
"""Characters of the longest name that is read."""
MOST_LAYERS, MOST_HEADS, MOST_WIDTH = 1000, 1000, 1_000_000

Json = Mapping[str, Any]
Listed = dict[str, tuple[bool, float | None]]
"""By name, whether a part is in the graph, and its score."""


def save_circuit(path: Path | str, circuit: Circuit) -> None:
    """Writes a circuit atomically.

    Raises:
        InputError: when it holds what could not be read back: a number that is not finite, a position that looks like
            a part of a node's name, text that is no Unicode.
        StorageError: when the disk refuses.
    """
    document = build_document(circuit)
    try:
        write_json(Path(path), document)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the circuit cannot be written to {path}: {_line(error)}") from error


def load_circuit(path: Path | str) -> Circuit:
    """Reads a circuit: ours, or a graph that EAP-IG or MIB wrote.

    Raises:
        InputError: when the file is missing, too large, or no circuit; one line that says where.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"could not read {path}: there is no such file")
        text = read_text(path, LARGEST)
    except OSError as error:
        raise InputError(f"could not read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no circuit: it is not UTF-8 ({_line(error)})") from error
    except ValueError as error:
        raise InputError(f"could not read {path}: {_line(error)}") from error
    try:
        return parse_document(parse_json(text, strict=False, pairs=_without_repeats))
    except InputError as error:
        raise InputError(f"{path} is no circuit: {one_line(error)}") from error  # it may quote a name
    except ValueError as error:
        raise InputError(f"{path} is no circuit: it is not JSON ({_line(error)})") from error


def load_heads(path: Path, model: Shape) -> Circuit:
    """Reads a circuit whose heads are to be looked at in a model.

    Raises:
        InputError: when it cannot be read, has no heads, or is of a model with other parts.
    """
    circuit = load_circuit(path)
    require_model(circuit, model)
    if not circuit.heads:
        raise InputError(f"{path} has no heads, and a circuit's heads are what is looked at; give another circuit")
    return circuit


def require_model(circuit: Circuit, model: Shape, *, same_weights: bool = False) -> None:
    """Checks that a circuit names parts of this model: base's circuit may be judged in a model with other weights.

    Args:
        circuit: as it was loaded.
        model: the model that it shall be used in.
        same_weights: whether it must have been found in these very weights.

    Raises:
        InputError: when the model has other parts; or, where it is asked, other weights or unknown ones.
    """
    shape = circuit.shape
    if not shape.fits(model):
        names = ("layers", "heads a layer", "width", "parallel")
        pairs = zip(names, shape.same_parts, model.same_parts, strict=True)
        apart = "; ".join(f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs)
        raise InputError(f"a circuit of {shape.name} does not fit {model.name}: {apart}; take a model with its parts")
    if same_weights and (shape.weights_sha256 is None or shape.weights_sha256 != model.weights_sha256):
        known = "in unknown" if shape.weights_sha256 is None else f"in other ({shape.weights_sha256[:12]}…)"
        raise InputError(f"the circuit was found {known} weights than those of {model.name}; find it again in these")


def build_document(circuit: Circuit) -> dict[str, Any]:
    """The file's contents.

    Raises:
        InputError: when the model's name or a position cannot be read back.
    """
    shape = circuit.shape
    _require_readable(circuit)
    block: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"name": shape.name, "weights_sha256": shape.weights_sha256},
        "sign": SIGN,
        "positions": list(circuit.positions),
        "nodes": _by_name(circuit.nodes),
    }
    if _needs_edges(circuit):
        block |= {"edges": _by_name(circuit.edges), "outside": _by_name(circuit.outside)}
    if circuit.outside_nodes:
        block["outside_nodes"] = _by_name(circuit.outside_nodes)
    block["roles"] = {
        str(node): {"name": role.name, "why": role.why, "measures": dict(role.measures)}
        for node, role in circuit.roles.items()
    }
    block["provenance"] = dict(circuit.provenance)
    nodes = _collapse(circuit.nodes, circuit.outside_nodes)
    edges = _collapse(circuit.edges, circuit.outside)
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
        # Their reader wants a number for every edge.
        "edges": {name: {"score": score or 0.0, "in_graph": inside} for name, (inside, score) in edges.items()},
        "neuroplast": block,
    }


def parse_document(document: Any) -> Circuit:
    """Reads the file's contents.

    Args:
        document: what `parse_json` gives.

    Raises:
        InputError: saying which part is not as expected.
    """
    top = _object(document, "the file")
    shape = _shape(top)
    nodes, edges = _listed(top, "nodes"), _listed(top, "edges")
    names = _Names(shape)
    theirs = _from_top_level(names, nodes, edges)
    if top.get("neuroplast") is None:
        return theirs
    ours = _from_block(_object(top["neuroplast"], "'neuroplast'"), names, theirs)
    different = _difference(nodes, _collapse(ours.nodes, ours.outside_nodes))
    if "edges" in top["neuroplast"]:
        different = different or _difference(edges, _collapse(ours.edges, ours.outside))
    if different:
        raise InputError(
            f"its top level and its block 'neuroplast' disagree about {different}: another tool changed it; remove "
            "the block to take the top level"
        )
    return ours


def _from_top_level(names: "_Names", listed_nodes: Listed, listed_edges: Listed) -> Circuit:
    nodes = [(names.node(name), inside, score) for name, (inside, score) in listed_nodes.items()]
    edges = [(names.edge(name), inside, score) for name, (inside, score) in listed_edges.items()]
    return Circuit(
        names.shape,
        {node: score for node, inside, score in nodes if inside},
        {edge: score for edge, inside, score in edges if inside},
        {edge: score for edge, inside, score in edges if not inside and score is not None},
        outside_nodes={node: score for node, inside, score in nodes if not inside and score is not None},
    )


def _from_block(block: Json, names: "_Names", theirs: Circuit) -> Circuit:
    if block.get("schema") != SCHEMA:
        raise InputError(
            f"its block 'neuroplast' has schema {_shown(block.get('schema'))}; this version reads {SCHEMA}: "
            "update neuroplast, or remove the block to take the top level"
        )
    _require_writable(block)
    model = _object(block.get("model"), "'model'")
    name, sha256 = model.get("name"), model.get("weights_sha256")
    if not _is_name(name) or not (sha256 is None or _is_name(sha256)):
        raise InputError("its 'model' must have a name, and weights_sha256 as text or null")
    positions = block.get("positions")
    if not isinstance(positions, list) or not all(map(_is_name, cast(list[Any], positions))):
        raise InputError("its 'positions' must be a list of names")
    edges, outside = theirs.edges, theirs.outside
    if "edges" in block:
        edges = {names.edge(each, at=True): score for each, score in _scores(block, "edges").items()}
        outside = {names.edge(each, at=True): score for each, score in _known_scores(block, "outside").items()}
    return Circuit(
        Shape(name, *theirs.shape.same_parts, sha256),
        {names.node(each, at=True): score for each, score in _scores(block, "nodes").items()},
        edges,
        outside,
        {
            names.node(each, at=True): _role(role, each)
            for each, role in _object(block.get("roles", {}), "its 'roles'").items()
        },
        tuple(cast(list[str], positions)),
        _object(block.get("provenance", {}), "its 'provenance'"),
        {names.node(each, at=True): score for each, score in _known_scores(block, "outside_nodes").items()},
    )


class _Names:
    """Nodes and edges of a model by name; each part is read once, for a file may name a hundred thousand edges."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._parts: dict[str, Node] = {}

    def node(self, name: str, at: bool = False) -> Node:
        """A part that is no head's q, k or v; `at` says whether it may have a position."""
        node = self._part(name)
        if node.channel or (node.position and not at):
            raise InputError(f"node {name[:60]!r} is not the name of a node" + ("" if at else " without position"))
        return node

    def edge(self, name: str, at: bool = False) -> Edge:
        """An edge; `at` says whether its ends may have positions."""
        source, arrow, destination = name.partition("->")
        if not arrow:
            raise InputError(f"not the name of an edge: {name[:60]!r}; expected SOURCE->DESTINATION")
        edge = Edge(self._part(source), self._part(destination))
        if not at and (edge.source.position or edge.destination.position):
            raise InputError(f"edge {name[:60]!r} has positions, which it cannot have there")
        if self.shape.parallel and edge.source.layer is not None and edge.source.layer == edge.destination.layer:
            raise InputError(f"edge {name!r}: in this model attention and MLP of a layer read the same residual stream")
        return edge

    def _part(self, name: str) -> Node:
        if name not in self._parts:
            if not _is_name(name):
                raise InputError(f"not the name of a part: {name[:60]!r}")
            node = parse_node(name)
            # Else one part could be listed twice, as a0.h1 and as 0.1.
            if (
                str(node) != name
                or node.kind in ("attention", "residual")
                or node.channel not in (None, *READ_CHANNELS)
            ):
                raise InputError(f"not the name of a part in a circuit's file: {name[:60]!r}")
            if not self.shape.has(node):
                raise InputError(
                    f"{name[:60]} is no part of a model of {self.shape.n_layers} layers of {self.shape.n_heads} heads"
                )
            self._parts[name] = node
        return self._parts[name]


def _collapse(inside: Mapping[Part, float | None], outside: Mapping[Part, float]) -> Listed:
    """Nodes or edges without positions: what is in the graph at any position, and its score of largest size there."""
    found: Listed = {}
    for is_inside, scores in ((True, inside), (False, outside)):
        for part, score in scores.items():
            _put(found, str(_anywhere(part)), is_inside, score)
    return found


def _anywhere(part: Node | Edge) -> Node | Edge:
    """Without positions; a part that has none is not made anew, because there may be a hundred thousand."""
    if isinstance(part, Node):
        return part if part.position is None else part.at(None)
    return part if part.source.position is None and part.destination.position is None else part.anywhere()


def _put(into: Listed, name: str, inside: bool, score: float | None) -> None:
    former = into.get(name)
    if former is None or (inside, _size(score)) > (former[0], _size(former[1])):
        into[name] = inside, None if score is None else float(score)


def _size(score: float | None) -> float:
    return -1.0 if score is None else abs(score)


def _difference(listed: Listed, expected: Listed) -> str | None:
    """The first name about which the two parts of a file disagree; an entry that says nothing is as good as none."""
    for name in {**listed, **expected}:
        (inside, score), (wanted, value) = listed.get(name, (False, None)), expected.get(name, (False, None))
        if inside != wanted or (score or 0.0) != (value or 0.0):
            return name
    return None


def _needs_edges(circuit: Circuit) -> bool:
    """Whether the top level cannot hold all that is known of edges."""
    parts = (*circuit.edges, *circuit.outside)
    return None in circuit.edges.values() or any(edge.source.position or edge.destination.position for edge in parts)


def _by_name(scores: Mapping[Node, float | None] | Mapping[Edge, float | None]) -> dict[str, float | None]:
    return {str(part): None if score is None else float(score) for part, score in scores.items()}


def _require_readable(circuit: Circuit) -> None:
    """What is written must come back: a position that looks like a part of a name would come back as something else."""
    for name in (circuit.shape.name, *circuit.positions):
        if not _is_name(name):
            raise InputError(f"{_shown(name)} cannot be written as a name: it must be one line of text")
    nodes = {*circuit.nodes, *circuit.outside_nodes, *circuit.roles}
    nodes |= {node for edge in (*circuit.edges, *circuit.outside) for node in (edge.source, edge.destination)}
    for position in {node.position for node in nodes if node.position}:
        edge = Edge(Node("input", position=position), Node("logits", position=position))
        try:
            same = _is_name(str(edge)) and parse_edge(str(edge)) == edge
        except InputError:
            same = False
        if not same:
            raise InputError(f"position {position[:40]!r} cannot be written in a node's name; give it another name")


def _listed(top: Json, key: str) -> Listed:
    kind = key.removesuffix("s")
    return {
        name: _entry(entry, f"{kind} {name[:60]!r}", key == "nodes")
        for name, entry in _object(top.get(key), f"{key!r}").items()
    }


def _entry(entry: Any, what: str, is_node: bool) -> tuple[bool, float | None]:
    """Whether a part is in the graph, and its score."""
    if is_node and isinstance(entry, bool):
        return entry, None
    found = _object(entry, what)
    if "neurons" in found or "neurons_scores" in found:
        raise InputError(f"{what} lists neurons; circuits here are of whole heads and MLPs")
    inside, score = found.get("in_graph"), found.get("score")
    if not isinstance(inside, bool):
        raise InputError(f"{what}: in_graph must be true or false, got {_shown(inside)}")
    if is_node and isinstance(score, float) and math.isnan(score):
        score = None
    return inside, _score(score, what)


def _scores(block: Json, key: str) -> dict[str, float | None]:
    return {name: _score(score, name) for name, score in _object(block.get(key, {}), f"its {key!r}").items()}


def _known_scores(block: Json, key: str) -> dict[str, float]:
    found = _scores(block, key)
    if missing := next((name for name, score in found.items() if score is None), None):
        raise InputError(f"{missing[:60]!r} in its {key!r} must have a score")
    return cast(dict[str, float], found)


def _score(value: Any, what: str) -> float | None:
    if value is None:
        return None
    # Whole numbers may have hundreds of digits: they are compared before they are converted.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{what[:60]}: its score must be a finite number, got {_shown(value)}")
    return float(value)


def _role(value: Any, what: str) -> Role:
    role = _object(value, f"the role of {what[:60]}")
    measures = _object(role.get("measures", {}), f"the measures of {what[:60]}")
    name, why = role.get("name"), role.get("why")
    if not isinstance(name, str) or not isinstance(why, str):
        raise InputError(f"the role of {what[:60]} must have a name and a why")
    return Role(name, why, {each: _score(measures[each], f"{what[:40]}, {each}") for each in measures})


def _is_name(value: Any) -> TypeGuard[str]:
    """Whether it is text that fits into one line of a message."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable()


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


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be an object, got {_shown(value)}")
    return cast(dict[str, Any], value)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return repr(value[:40] if isinstance(value, str) else value)[:50]


def _line(error: BaseException) -> str:
    return ascii(str(error))[1:-1][:120]


def _require_writable(block: Json) -> None:
    """JSON can spell half a surrogate pair and infinity, which no file takes back, and nest without end."""
    try:
        require_depth(block, DEEPEST)
    except ValueError as error:
        raise InputError(f"its block 'neuroplast': {error}") from error
    try:
        json.dumps(block, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise InputError(f"its block 'neuroplast' holds what no file can ({_line(error)})") from error


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise InputError(f"the name {repeated[:60]!r} stands twice in one object")
    return found
