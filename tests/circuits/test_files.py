"""Circuit files: ours come back as they were, EAP-IG's and MIB's are read and can read ours, the rest is refused."""

import copy
import json
import math
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroplast.circuits import files
from neuroplast.circuits.circuit import SIGN, Circuit, Role, Shape
from neuroplast.circuits.files import build_document, load_circuit, parse_document, require_model, save_circuit
from neuroplast.components import Edge, Node, parse_edge, parse_node
from neuroplast.errors import InputError, StorageError

SHAPE = Shape("tiny", n_layers=3, n_heads=2, d_model=8, weights_sha256="ab" * 32)
HARD_NUMBERS = (0.1 + 0.2, 5e-324, -1.7976931348623157e308, 1 / 3, 0.0, -1e-17)


def part_names(shape: Shape) -> tuple[list[str], list[str]]:
    """All nodes and edges of a model by name, as EAP-IG names them; written down here once more, from its loops."""
    stream, edges = ["input"], []
    for layer in range(shape.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(shape.n_heads)]
        edges += [f"{source}->{head}<{letter}>" for source in stream for head in heads for letter in "qkv"]
        before_mlp = stream if shape.parallel else stream + heads
        edges += [f"{source}->m{layer}" for source in before_mlp]
        stream = [*stream, *heads, f"m{layer}"]
    return [*stream, "logits"], edges + [f"{source}->logits" for source in stream]


class TheirGraph:
    """What EAP-IG's reader is documented to make of a file: all parts of `cfg`, nothing in the graph, no scores; then
    every listed node but `logits`, and every listed edge with its score, which must be a number."""

    def __init__(self, document: dict[str, Any]) -> None:
        cfg = document["cfg"]
        shape = Shape("", cfg["n_layers"], cfg["n_heads"], cfg["d_model"], cfg["parallel_attn_mlp"])
        nodes, edges = part_names(shape)
        self.nodes = {name: (False, math.nan) for name in nodes if name != "logits"}
        self.edges = dict.fromkeys(edges, (False, 0.0))
        for name, entry in document["nodes"].items():
            if name != "logits":
                assert name in self.nodes and type(entry["in_graph"]) is bool
                self.nodes[name] = (entry["in_graph"], entry.get("score", math.nan))
        for name, entry in document["edges"].items():
            assert name in self.edges and type(entry["in_graph"]) is bool and type(entry["score"]) is float
            self.edges[name] = (entry["in_graph"], entry["score"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TheirGraph) and repr((self.nodes, self.edges)) == repr((other.nodes, other.edges))


def their_document(shape: Shape, seed: int, node_scores: str = "some") -> dict[str, Any]:
    """A complete file as EAP-IG writes it; `node_scores` are `none`, or `some` and else NaN."""
    rng = Random(seed)
    nodes, edges = part_names(shape)
    document = {
        "cfg": {
            "n_layers": shape.n_layers,
            "n_heads": shape.n_heads,
            "parallel_attn_mlp": shape.parallel,
            "d_model": shape.d_model,
        },
        "nodes": {name: {"in_graph": name == "logits" or rng.random() < 0.4} for name in nodes},
        "edges": {name: {"score": rng.gauss(0, 1), "in_graph": rng.random() < 0.2} for name in edges},
    }
    if node_scores == "some":
        for entry in document["nodes"].values():
            entry["score"] = rng.choice((math.nan, rng.gauss(0, 1)))
    return document


def random_circuit(seed: int) -> Circuit:
    """Anything that can be known of a circuit, some of it missing."""
    rng = Random(seed)
    positions = rng.choice(((), ("s1", "s1+1", "s2", "end")))
    places = positions or (None,)

    def score():
        return rng.choice((None, rng.gauss(0, 1), rng.choice(HARD_NUMBERS)))

    heads = [Node("head", layer, head, at) for layer in range(3) for head in range(2) for at in places]
    nodes = [node for node in (Node("input"), *heads, Node("mlp", 1), Node("logits")) if rng.random() < 0.5]
    edges = [
        Edge(source, Node("head", reader.layer, reader.head, source.position, rng.choice("qkv")))
        for source in heads
        for reader in heads
        if source.depth < reader.depth and rng.random() < 0.3
    ]
    edges.append(Edge(Node("mlp", 0), Node("logits")))
    edges = list(dict.fromkeys(edges))
    rng.shuffle(edges)
    cut = rng.randrange(len(edges) + 1)
    left = [node for node in heads if node not in nodes]
    return Circuit(
        SHAPE,
        {node: score() for node in nodes},
        {edge: score() for edge in edges[:cut]},
        {edge: rng.gauss(0, 1) for edge in edges[cut:]},
        {node: Role("name mover", "it “copies”\n", {"copy score": 0.97, "attention": None}) for node in nodes[:3]},
        positions,
        {"method": "path", "settings": {"threshold": 0.02}, "steps": [{"found": 3}], "note": "Zeichen: ü 名"},
        {node: rng.gauss(0, 1) for node in left if rng.random() < 0.3},
    )


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_what_is_written_comes_back_equal_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, seed: int):
    path = tmp_path_factory.mktemp("circuit") / "circuit.json"
    circuit = random_circuit(seed)
    save_circuit(path, circuit)
    found = load_circuit(path)
    assert found == circuit
    assert list(found.edges) == list(circuit.edges) and found.shape.weights_sha256 == SHAPE.weights_sha256
    first = path.read_bytes()
    save_circuit(path, found)
    assert path.read_bytes() == first


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_their_reader_finds_in_our_file_what_the_circuit_has_at_any_position(seed: int):
    circuit = random_circuit(seed)
    found = TheirGraph(json.loads(json.dumps(build_document(circuit))))
    for name, (inside, score) in found.nodes.items():
        here = [node for node in circuit.nodes if str(node.at(None)) == name]
        assert inside == bool(here)
        known = [circuit.nodes[node] for node in here if circuit.nodes[node] is not None]
        if here:
            assert (score in known and abs(score) == max(map(abs, known))) if known else math.isnan(score)
    for name, (inside, score) in found.edges.items():
        here = [edge for edge in circuit.edges if str(edge.anywhere()) == name]
        assert inside == bool(here)
        known = [circuit.edges[edge] or 0.0 for edge in here]
        outside = [value for edge, value in circuit.outside.items() if str(edge.anywhere()) == name]
        assert abs(score) == max(map(abs, known or outside or [0.0]))


def test_a_file_by_hand():
    circuit = Circuit(
        SHAPE,
        {parse_node("a1.h0@s2"): -0.5, parse_node("a1.h0@end"): 0.25, parse_node("a2.h1@end"): None},
        {parse_edge("a1.h0@s2->a2.h1<v>@s2"): -0.125, parse_edge("a1.h0@end->a2.h1<v>@end"): 0.5},
        {parse_edge("m0->logits"): 0.0625},
        {parse_node("a2.h1@end"): Role("name mover", "copies", {"copy score": 1.0})},
        ("s2", "end"),
        {"method": "path"},
    )
    assert build_document(circuit) == {
        "cfg": {"n_layers": 3, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
        "nodes": {"a1.h0": {"in_graph": True, "score": -0.5}, "a2.h1": {"in_graph": True}},
        "edges": {
            "a1.h0->a2.h1<v>": {"score": 0.5, "in_graph": True},
            "m0->logits": {"score": 0.0625, "in_graph": False},
        },
        "neuroplast": {
            "schema": 1,
            "model": {"name": "tiny", "weights_sha256": "ab" * 32},
            "sign": SIGN,
            "positions": ["s2", "end"],
            "nodes": {"a1.h0@end": 0.25, "a1.h0@s2": -0.5, "a2.h1@end": None},
            "edges": {"a1.h0@s2->a2.h1<v>@s2": -0.125, "a1.h0@end->a2.h1<v>@end": 0.5},
            "outside": {"m0->logits": 0.0625},
            "roles": {"a2.h1@end": {"name": "name mover", "why": "copies", "measures": {"copy score": 1.0}}},
            "provenance": {"method": "path"},
        },
    }


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("node_scores", ["none", "some"])
def test_a_graph_of_theirs_loads_and_goes_back_with_every_score(tmp_path: Path, parallel: bool, node_scores: str):
    shape = Shape("unknown", 3, 2, 8, parallel)
    document = their_document(shape, 1, node_scores)
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(document))
    circuit = load_circuit(path)
    assert circuit.shape == shape
    assert len(circuit.edges) + len(circuit.outside) == shape.n_edges == len(document["edges"])
    for name, entry in document["edges"].items():
        assert (circuit.edges if entry["in_graph"] else circuit.outside)[parse_edge(name)] == entry["score"]
    assert {str(node) for node in circuit.nodes} == {n for n, entry in document["nodes"].items() if entry["in_graph"]}
    save_circuit(path, circuit)
    assert load_circuit(path) == circuit
    assert TheirGraph(json.loads(path.read_text())) == TheirGraph(json.loads(json.dumps(document)))


def test_lists_may_be_partial_as_they_may_for_their_reader():
    document = their_document(SHAPE, 2)
    document["nodes"] = {"m0": {"in_graph": True}, "a0.h1": {"in_graph": False, "score": 0.5}}
    document["edges"] = {"m0->logits": {"score": 1, "in_graph": True}}
    circuit = parse_document(document)
    assert circuit.nodes == {parse_node("m0"): None} and circuit.edges == {parse_edge("m0->logits"): 1.0}
    assert not circuit.outside and circuit.outside_nodes == {parse_node("a0.h1"): 0.5}
    assert parse_document(document | {"nodes": {}, "edges": {}}) == Circuit(circuit.shape, {})


def test_the_first_files_of_eap_ig_had_nodes_without_scores_and_edges_with_null():
    document = their_document(SHAPE, 3)
    document["nodes"] = {name: entry["in_graph"] for name, entry in document["nodes"].items()}
    for entry in document["edges"].values():
        entry["score"] = None
    circuit = parse_document(document)
    assert set(map(str, circuit.nodes)) == {name for name, inside in document["nodes"].items() if inside}
    assert set(circuit.edges.values()) == {None} and not circuit.outside
    assert parse_document(json.loads(json.dumps(build_document(circuit)))) == circuit


def test_a_file_of_membership_needs_no_scores():
    document = their_document(SHAPE, 4, "none")
    for entry in document["edges"].values():
        del entry["score"]
    circuit = parse_document(document)
    inside = {name for name, entry in document["edges"].items() if entry["in_graph"]}
    assert set(map(str, circuit.edges)) == inside
    assert all(math.isfinite(score) for _, score in TheirGraph(build_document(circuit)).edges.values())


def written(seed: int = 0) -> dict[str, Any]:
    """A file of ours with positions, taken apart."""
    rich = (circuit for circuit in map(random_circuit, range(seed, seed + 100)) if circuit.positions and circuit.edges)
    document = json.loads(json.dumps(build_document(next(circuit for circuit in rich if len(circuit.nodes) > 3))))
    assert any(entry["in_graph"] for entry in document["edges"].values())
    return document


def flip(document: dict[str, Any], kind: str) -> str:
    name = next(iter(document[kind]))
    document[kind][name]["in_graph"] ^= True
    return name


def rescore(document: dict[str, Any], kind: str) -> str:
    name = next(iter(document[kind]))
    document[kind][name]["score"] = 12.5
    return name


def drop(document: dict[str, Any], kind: str) -> str:
    name = next(name for name, entry in document[kind].items() if entry["in_graph"])
    del document[kind][name]
    return name


@pytest.mark.parametrize("kind", ["nodes", "edges"])
@pytest.mark.parametrize("change", [flip, rescore, drop])
def test_a_file_whose_two_parts_disagree_is_refused(kind: str, change):
    document = written()
    name = change(document, kind)
    with pytest.raises(InputError, match=f"disagree about {name.replace('<', '.')}: another tool changed it; remove"):
        parse_document(document)
    del document["neuroplast"]
    assert parse_document(document).shape.name == "unknown"


def test_what_another_tool_adds_without_saying_anything_is_no_disagreement():
    document = written()
    circuit = parse_document(document)
    document["edges"] = {name: {"score": 0.0, "in_graph": False} for name in part_names(SHAPE)[1]} | document["edges"]
    document["nodes"] = {name: {"in_graph": False} for name in part_names(SHAPE)[0]} | document["nodes"]
    assert parse_document(document) == circuit


EMPTY = {"cfg": {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 4}, "nodes": {}, "edges": {}}
MODEL = '"model": {"name": "m", "weights_sha256": null}, "positions": [], "nodes": {}'
DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "1",
    "null": "null",
    "deep": DEEP,
    "deep inside": '{"cfg": ' + DEEP + "}",
    "a long number": '{"cfg": {"n_layers": ' + "9" * 5000 + "}}",
    "no cfg": "{}",
    "cfg is a list": '{"cfg": []}',
    "repeated": '{"cfg": {}, "cfg": {}}',
    "repeated edge": '{"edges": {"m0->m1": 1, "m0->m1": 1}}',
    "not UTF-8": b"\xff\xfe\x00",
    "zeros": b"\x00" * 50,
}
LAYERS: dict[str, Any] = {
    "zero": 0, "negative": -1, "true": True, "text": "2", "a half": 1.5, "huge": 10**9, "400 digits": 10**400,
    "list": [2], "infinite": math.inf, "NaN": math.nan, "null": None, "text with\nlines": "a\nb\x1b[31m",
}  # fmt: skip
NODES: dict[str, Any] = {
    "out of range": {"a2.h0": {"in_graph": True}},
    "head out of range": {"a0.h2": {"in_graph": False}},
    "another spelling": {"0.1": {"in_graph": True}},
    "digits of another script": {"a٠.h0": {"in_graph": True}},
    "unknown": {"x": {"in_graph": True}},
    "half a surrogate": {"m0\ud800": {"in_graph": True}},
    "long": {"m" + "0" * 100_000: {"in_graph": True}},
    "position": {"a0.h0@end": {"in_graph": True}},
    "channel": {"a0.h0<q>": {"in_graph": True}},
    "attention": {"a0": {"in_graph": True}},
    "residual": {"r0": {"in_graph": True}},
    "null": {"m0": None},
    "text": {"m0": "yes"},
    "number": {"m0": {"in_graph": 1}},
    "missing": {"m0": {}},
    "infinite": {"m0": {"in_graph": True, "score": math.inf}},
    "400 digits": {"m0": {"in_graph": True, "score": 10**400}},
    "boolean score": {"m0": {"in_graph": True, "score": True}},
    "text score": {"m0": {"in_graph": True, "score": "1\n2"}},
    "list score": {"m0": {"in_graph": True, "score": [[[1]]]}},
    "neurons": {"m0": {"in_graph": True, "neurons": [True]}},
    "a list": [],
}
EDGES: dict[str, Any] = {
    "NaN": {"m0->m1": {"in_graph": True, "score": math.nan}},
    "infinite": {"m0->m1": {"in_graph": True, "score": -math.inf}},
    "400 digits": {"m0->m1": {"in_graph": False, "score": -(10**400)}},
    "no arrow": {"m0": {"in_graph": True, "score": 1}},
    "two arrows": {"m0->m1->logits": {"in_graph": True, "score": 1}},
    "backwards": {"m1->m0": {"in_graph": True, "score": 1}},
    "from logits": {"logits->m0": {"in_graph": True, "score": 1}},
    "into input": {"m0->input": {"in_graph": True, "score": 1}},
    "no channel": {"m0->a1.h0": {"in_graph": True, "score": 1}},
    "pattern": {"m0->a1.h0<pattern>": {"in_graph": True, "score": 1}},
    "out of range": {"m0->m2": {"in_graph": False, "score": 1}},
    "position": {"m0@end->m1@end": {"in_graph": True, "score": 1}},
    "spaces": {"m0 -> m1": {"in_graph": True, "score": 1}},
    "boolean": {"m0->m1": True},
}
BLOCKS: dict[str, str] = {
    "a list": "[]",
    "no schema": "{}",
    "later schema": '{"schema": 2}',
    "no model": '{"schema": 1}',
    "model of lines": '{"schema": 1, "model": {"name": "a\\nb"}, "positions": [], "nodes": {}}',
    "half a surrogate": '{"schema": 1, ' + MODEL + ', "provenance": {"a": "\\ud800"}}',
    "infinite": '{"schema": 1, ' + MODEL + ', "provenance": {"a": 1e999}}',
    "deep": '{"schema": 1, ' + MODEL + ', "provenance": {"a": ' + "[" * 200 + "]" * 200 + "}}",
    "provenance is a list": '{"schema": 1, ' + MODEL + ', "provenance": []}',
    "positions are numbers": '{"schema": 1, "model": {"name": "m"}, "positions": [1], "nodes": {}}',
    "positions of lines": '{"schema": 1, "model": {"name": "m"}, "positions": ["a\\nb"], "nodes": {}}',
    "node that is not in the graph": '{"schema": 1, "model": {"name": "m"}, "positions": [], "nodes": {"m0": 1}}',
    "node out of range": '{"schema": 1, "model": {"name": "m"}, "positions": [], "nodes": {"m9@end": 1}}',
    "node of text": '{"schema": 1, "model": {"name": "m"}, "positions": [], "nodes": {"m0@end": "1"}}',
    "edge out of range": '{"schema": 1, ' + MODEL + ', "edges": {}, "outside": {"m0@end->m7@end": 1}}',
    "outside without score": '{"schema": 1, ' + MODEL + ', "edges": {}, "outside": {"m0@end->m1@end": null}}',
    "edge inside and outside": '{"schema": 1, ' + MODEL + ', "edges": {"m0->m1": 1}, "outside": {"m0->m1": 1}}',
    "role of nothing": '{"schema": 1, ' + MODEL + ', "roles": {"m0": {}}}',
    "role of a node that is none": '{"schema": 1, ' + MODEL + ', "roles": {"m0->m1": {"name": "a", "why": "b"}}}',
    "measure of text": '{"schema": 1, '
    + MODEL
    + ', "roles": {"m0": {"name": "a", "why": "b", "measures": {"x": "1"}}}}',
}


def hostile_files() -> dict[str, str | bytes]:
    found: dict[str, str | bytes] = dict(HOSTILE)
    for name, value in LAYERS.items():
        found[f"layers: {name}"] = json.dumps(EMPTY | {"cfg": EMPTY["cfg"] | {"n_layers": value}})
        found[f"parallel: {name}"] = json.dumps(EMPTY | {"cfg": EMPTY["cfg"] | {"parallel_attn_mlp": value or 0}})
    del found["parallel: true"]
    found |= {f"node: {name}": json.dumps(EMPTY | {"nodes": nodes}) for name, nodes in NODES.items()}
    found |= {f"edge: {name}": json.dumps(EMPTY | {"edges": edges}) for name, edges in EDGES.items()}
    found |= {f"block: {name}": f'{json.dumps(EMPTY)[:-1]}, "neuroplast": {text}}}' for name, text in BLOCKS.items()}
    both = EMPTY | {"cfg": EMPTY["cfg"] | {"parallel_attn_mlp": True}}
    both["edges"] = {"a0.h0->m0": {"in_graph": True, "score": 1.0}}
    return found | {"edge: not in a parallel model": json.dumps(both)}


@pytest.mark.parametrize("name", hostile_files())
def test_whatever_is_wrong_is_one_line(tmp_path: Path, name: str):
    path = tmp_path / "circuit.json"
    content = hostile_files()[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    begun = time.process_time()
    with pytest.raises(InputError) as error:
        load_circuit(path)
    message = str(error.value)
    assert message.isprintable() and len(message) < 500 and str(path) in message
    assert time.process_time() - begun < 5


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_a_file_with_anything_changed_loads_or_is_refused(seed: int):
    rng = Random(seed)
    document = copy.deepcopy(written(rng.randrange(50)) if rng.random() < 0.7 else their_document(SHAPE, 1))
    junk = (None, True, 0, -1, 10**400, math.nan, math.inf, "", "a\ud800", "m0->m1", "\n", [], {}, [{}], {"a": [1]})
    for _ in range(rng.randint(1, 3)):
        place: Any = document
        while True:
            inner = [key for key, each in place.items() if isinstance(each, dict) and each]
            if not inner or rng.random() < 0.2:
                break
            place = place[rng.choice(inner)]
        key = rng.choice(list(place))
        if rng.random() < 0.3:
            place[rng.choice(("", "x", "a9.h9", "m0@end", "score", "m0->m1<q>"))] = place.pop(key)
        else:
            place[key] = rng.choice(junk)
    try:
        circuit = parse_document(document)
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert parse_document(json.loads(json.dumps(build_document(circuit)))) == circuit


def test_a_model_of_a_million_heads_costs_nothing(tmp_path: Path):
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(EMPTY | {"cfg": EMPTY["cfg"] | {"n_layers": 1000, "n_heads": 1000}}))
    begun = time.process_time()
    assert not load_circuit(path).nodes
    assert time.process_time() - begun < 2


def test_a_file_that_is_too_large_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "circuit.json"
    path.write_text(" " * 2000)
    monkeypatch.setattr(files, "LARGEST", 1000)
    with pytest.raises(InputError, match=r"it has 2\.0 KiB; 1000 bytes is the most that is read"):
        load_circuit(path)


def test_a_name_of_several_lines_is_quoted_in_one(tmp_path: Path):
    path = tmp_path / "circuit.json"
    block = {"schema": 1, "model": {"name": "m"}, "positions": [], "nodes": {"a\nb": "x"}}
    path.write_text(json.dumps(EMPTY | {"neuroplast": block}))
    with pytest.raises(InputError, match="a b: its score must be a finite number, got 'x'") as caught:
        load_circuit(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "pipe", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(InputError, match="could not read"):
            load_circuit(path)


@pytest.mark.parametrize(
    ("circuit", "message"),
    [
        (Circuit(SHAPE, {parse_node("m0"): math.nan}), "cannot be written"),
        (Circuit(SHAPE, {}, {parse_edge("m0->m1"): math.inf}), "cannot be written"),
        (Circuit(SHAPE, {}, provenance={"path": "caf\udce9"}), "cannot be written"),
        (Circuit(SHAPE, {}, provenance={"set": {1}}), "cannot be written"),
        (Circuit(SHAPE, {Node("mlp", 0, position="a->b"): 1.0}), "position 'a->b' cannot be written"),
        (Circuit(SHAPE, {Node("mlp", 0, position="end "): 1.0}), "position 'end ' cannot be written"),
        (Circuit(SHAPE, {}, positions=("a\nb",)), "must be one line of text"),
        (Circuit(Shape("a\nb", 1, 1, 1), {}), "must be one line of text"),
    ],
)
def test_what_would_not_come_back_is_not_written(tmp_path: Path, circuit: Circuit, message: str):
    with pytest.raises(InputError, match=message) as error:
        save_circuit(tmp_path / "circuit.json", circuit)
    assert str(error.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        save_circuit(tmp_path / "file" / "circuit.json", Circuit(SHAPE, {}))


def test_a_circuit_fits_models_with_its_parts_whatever_their_weights():
    circuit = Circuit(SHAPE, {parse_node("m0"): 1.0})
    poisoned = Shape("poisoned", 3, 2, 8, weights_sha256="cd" * 32)
    require_model(circuit, poisoned)
    require_model(circuit, SHAPE, same_weights=True)
    with pytest.raises(InputError, match=r"found in other \(abababababab…\) weights than those of poisoned"):
        require_model(circuit, poisoned, same_weights=True)
    with pytest.raises(InputError, match="found in unknown weights"):
        require_model(Circuit(Shape("unknown", 3, 2, 8), {}), SHAPE, same_weights=True)


@pytest.mark.parametrize(
    ("model", "apart"),
    [
        (Shape("other", 4, 2, 8), "layers 3 and 4"),
        (Shape("other", 3, 4, 8), "heads a layer 2 and 4"),
        (Shape("other", 3, 2, 16, parallel=True), "width 8 and 16; parallel False and True"),
    ],
)
def test_a_circuit_of_a_model_with_other_parts_is_refused(model: Shape, apart: str):
    with pytest.raises(InputError, match=f"a circuit of tiny does not fit other: {apart}; take a model"):
        require_model(Circuit(SHAPE, {}), model)
