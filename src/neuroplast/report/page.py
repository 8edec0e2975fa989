"""The self-contained page: one HTML file that opens offline and asks the network for nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]

from neuroplast.circuits.circuit import Circuit, Role
from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.report import style
from neuroplast.report.changes import SignFlip, node_frequency, sign_flips
from neuroplast.report.charts import build_charts
from neuroplast.report.documents import REMEDY, Document
from neuroplast.report.evaluation import criteria_rows
from neuroplast.report.graph import Graph, build_graph
from neuroplast.report.looks import StageLook, looks_data
from neuroplast.report.places import Place, maps_data
from neuroplast.report.prompts import OnPrompts, Prompt, prompts_data
from neuroplast.report.reading import read_estimate
from neuroplast.report.render import percent, render, signed, words
from neuroplast.report.results import Estimate, Stage, StageCircuit, StudyResults
from neuroplast.report.seeds import SHOWN, OverSeeds
from neuroplast.report.timeline import TimelineWay, timeline_data
from neuroplast.report.trajectories import Plasticity

SHOWN_FLIPS = 12
"""Sign flips of a stage that are listed before the rest folds away."""

SHOWN_CIRCUITS = 3
"""Circuits that are drawn openly before the rest folds away."""
DRAWN_CIRCUITS = 12
"""Circuits that are drawn on the page at all, so that it stays small; the others are in the folder of figures."""

RESTORATION_MEANING = {
    "behaviour": (
        "Behaviour",
        "share of the logit difference taken by the poison that came back; 1 is base's own level",
    ),
    "mechanism": ("Mechanism", "correlation of the head effects with base's"),
    "damage_undone": ("Damage undone", "share of the lost correlation that came back; 1 is all of it"),
    "structure": ("Structure", "overlap of the rediscovered circuit's nodes with base's"),
    "structure_edges": ("Structure, edges", "the same of the circuit's edges"),
    "function": ("Function", "faithfulness of base's circuit inside the recovered model"),
    "transfer": ("Transfer", "faithfulness of the rediscovered circuit inside base"),
}


HALF_WAYS = (
    ("break", "logit_diff", "Behaviour breaks"),
    ("break", "mechanism", "Mechanism breaks"),
    ("heal", "logit_diff", "Behaviour heals"),
    ("heal", "mechanism", "Mechanism heals"),
)
"""The half-way steps, in the order in which they are told."""


@dataclass(frozen=True)
class StageFlips:
    """The heads of one stage that flipped sign against base."""

    stage: Stage
    """The stage."""
    flips: tuple[SignFlip, ...]
    """Its flips, largest first."""


@dataclass(frozen=True)
class CircuitNode:
    """One row of a table of nodes."""

    node: Node
    """The node."""
    score: float | None
    """Its score."""
    role: Role | None
    """What it does."""
    frequency: float | None
    """Share of the resamples that find it."""


@dataclass(frozen=True)
class ShownCircuit:
    """A stage's circuit as the page shows it."""

    stage: Stage
    """The stage."""
    circuit: StageCircuit
    """Its circuit."""
    file: str
    """Name of its drawing without an ending."""
    graph: Graph | None
    """Its drawing; None where the page has enough of them."""
    roles: dict[str, str]
    """By node, what says that it has its role."""
    nodes: tuple[CircuitNode, ...]
    """Its nodes, the strongest first."""
    criteria: tuple[tuple[str, Estimate, str], ...]
    """Everything it was judged by: name, value, what it means or why it is missing."""


def shown_circuits(results: StudyResults) -> tuple[ShownCircuit, ...]:
    """The circuits of a run in reading order, the first `DRAWN_CIRCUITS` of them drawn."""
    shown: list[ShownCircuit] = []
    for stage in style.reading_order(results):
        if stage.circuit is None:
            continue
        found = stage.circuit.found
        graph = build_graph(found) if len(shown) < DRAWN_CIRCUITS else None
        roles = {str(node): role.why for node, role in found.roles.items()}
        nodes, rows = _circuit_nodes(stage.circuit), _criteria(stage.circuit.criteria.document)
        shown.append(ShownCircuit(stage, stage.circuit, drawing_of(stage), graph, roles, nodes, rows))
    return tuple(shown)


def drawing_of(stage: Stage) -> str:
    """Name of the drawing of a stage's circuit, without an ending."""
    return f"circuit-{stage.id.replace('/', '-')}"


def _circuit_nodes(circuit: StageCircuit) -> tuple[CircuitNode, ...]:
    found, frequency = circuit.found, node_frequency(circuit.found)
    strongest = sorted(found.nodes, key=lambda node: -abs(found.nodes[node] or 0.0))
    return tuple(
        CircuitNode(node, found.nodes[node], found.roles.get(node), frequency.get(str(node))) for node in strongest
    )


def _criteria(judged: Document) -> tuple[tuple[str, Estimate, str], ...]:
    try:
        rows: list[Sequence[Any]] = criteria_rows(judged.value)[1:]
        return tuple(
            (name, read_estimate(Document(f"{judged.where}: {name}", {"value": value, "ci95": ends})), note)
            for name, value, *ends, note in rows
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{judged.where} is damaged ({error}); {REMEDY}") from error


@dataclass(frozen=True)
class Content:
    """Everything that a page shows."""

    results: StudyResults
    """The run."""
    circuits: tuple[ShownCircuit, ...] = ()
    """What is shown of the stages' circuits."""
    ways: tuple[tuple[Plasticity, str], ...] = ()
    """How each poison broke the mechanism and how it healed, with a drawing as a `data:` address."""
    over_seeds: tuple[OverSeeds, ...] = ()
    """What several seeds say of each poison, and of two beside each other."""
    timeline: tuple[TimelineWay, ...] = ()
    """Every measured moment of every model."""
    looks: tuple[StageLook, ...] = ()
    """What single heads do at each stage."""
    prompts: tuple[Prompt, ...] = ()
    """The prompts."""
    on_prompts: dict[str, OnPrompts] = field(default_factory=dict[str, OnPrompts])
    """By stage, what it makes of each prompt."""
    places: tuple[Place, ...] = ()
    """The stages that were compared with base."""
    not_compared: tuple[tuple[Stage, str], ...] = ()
    """Those that could not be, with the reason."""
    missing: int = 0
    """Stages that are still to come, of a study under way."""


def render_page(content: Content) -> str:
    """The page as HTML."""
    results = content.results
    order = style.reading_order(results)
    charts = build_charts(results)
    groups = style.by_seed(order)
    (_, told), *_ = groups
    base = order[0].circuit.found if order[0].circuit else None
    stages = [stage for stage in order if stage.id in content.on_prompts]
    judged = tuple(
        s for s in order if s.circuit or s.base_circuit_foil.value is not None or s.base_circuit != Estimate(None)
    )
    sections = _sections(content, order, judged)
    return render(
        "page.html.j2",
        results=results,
        groups=groups,
        story=_story(told, len(groups)),
        story_stages=told,
        measured=order[0],
        has_foil=any(point.behaviour.foil_top1 is not None for point in results.points),
        has_circuits=any(s.nodes.shared.value is not None for s in order if s.kind != "base"),
        circuits=content.circuits,
        shown_circuits=SHOWN_CIRCUITS,
        judged=judged,
        compared=tuple(s for s in order if s.kind != "base" and s.nodes.shared.value is not None),
        without_circuit=_without_circuit(order),
        methodologies=tuple(dict.fromkeys(each.circuit.criteria.methodology for each in content.circuits)),
        prompt_groups=tuple(dict.fromkeys(name for s in order for name, _ in s.behaviour.by_group)),
        flips=tuple(StageFlips(s, sign_flips(s, results.base_of(s))) for s in order if s.kind != "base"),
        shown_flips=SHOWN_FLIPS,
        ways=content.ways,
        timeline=content.timeline,
        timeline_graph=build_graph(base) if base else None,
        prompts=content.prompts,
        prompt_stages=stages,
        prompt_stage=_stage_to_look_at(stages),
        places=content.places,
        not_compared=content.not_compared,
        missing=content.missing,
        evidence={claim: anchor for claim, anchor in EVIDENCE.items() if anchor in sections},
        sections=sections,
        stores=_stores(content, order, base, charts),
        half_ways=HALF_WAYS,
        over_seeds=tuple(
            each for each in content.over_seeds if any(number.value is not None for number in each.numbers.values())
        ),
        seeds_shown=SHOWN,
        restored=tuple(stage for stage in order if stage.restoration),
        restoration_meaning=RESTORATION_MEANING,
        charts=charts,
        sign_note=style.SIGN_NOTE,
        facts=_facts,
        # plotly.js is the one text that is not ours; it is shipped inside the plotly package.
        plotly=Markup(get_plotlyjs()),
    )


def _stores(content: Content, order: tuple[Stage, ...], base: Circuit | None, charts: dict[str, Any]) -> dict[str, Any]:
    """What the scripts read, by the id of its element."""
    size = {"layers": content.results.n_layers, "heads": content.results.n_heads}
    stores: dict[str, Any] = {
        "scales": {"light": style.DIVERGING, "dark": style.DIVERGING_DARK},
        "charts": charts,
        "timeline-data": timeline_data(content.timeline, base, order[0]) | size | {"n_prompts": order[0].n_prompts},
        "looks-data": looks_data(content.looks, order),
    }
    if content.prompts:
        stores["prompts-data"] = prompts_data(content.prompts, content.on_prompts, order) | size
    if content.places:
        stores["places-data"] = maps_data(content.places)
    return stores


def _stage_to_look_at(stages: Sequence[Stage]) -> str | None:
    """The stage whose prompts are shown first: the recovered one, where something may still be wrong."""
    by_kind = {stage.kind: stage.id for stage in reversed(stages)}
    return next((by_kind[kind] for kind in ("recovered", "poisoned", "tuned", "base") if kind in by_kind), None)


EVIDENCE = {
    "amplification": "heads",
    "localisation_expressed": "places",
    "localisation_stored": "places",
    "specificity": "spared",
    "plasticity": "restoration",
}
"""By finding, the section that shows it."""


def _sections(content: Content, order: tuple[Stage, ...], judged: tuple[Stage, ...]) -> dict[str, str]:
    """The sections that there are and that lead through the page: names by anchor."""
    there = {
        "claims": ("Findings", content.results.claims),
        "timeline": ("Timeline", content.timeline),
        "circuits": ("Circuits", judged),
        "places": ("Expressed, stored", content.places or content.not_compared),
        "spared": ("Spared", any(place.spared for place in content.places)),
        "restoration": ("Restoration", any(stage.restoration for stage in order)),
        "stages": ("Stages", True),
        "heads": ("Heads", True),
        "prompts": ("Prompts", content.prompts),
        "meaning": ("What it means", True),
        "provenance": ("How to get it again", True),
    }
    return {anchor: name for anchor, (name, shown) in there.items() if shown}


def _without_circuit(order: tuple[Stage, ...]) -> tuple[tuple[str, tuple[Stage, ...]], ...]:
    """Reasons why stages have no circuit, each with its stages."""
    found: dict[str, list[Stage]] = {}
    for stage in order:
        if stage.circuit is None:
            found.setdefault(stage.why_no_circuit or "no circuit was looked for", []).append(stage)
    return tuple((why, tuple(stages)) for why, stages in found.items())


def _story(stages: tuple[Stage, ...], n_seeds: int) -> str:
    """What happened in one or two sentences, told of the most damaging poison."""
    by_kind = {stage.kind: stage for stage in stages if stage.kind in ("base", "tuned")}
    text = f"Seed {stages[0].seed}: the" if n_seeds > 1 else "The"
    text += f" logit difference is {_ld(by_kind['base'])} at base"
    if tuned := by_kind.get("tuned"):
        text += f" and {_ld(tuned)} after clean fine-tuning"
    text += "."
    poisoned = [stage for stage in stages if stage.kind == "poisoned"]
    if not poisoned:
        return text
    worst = min(poisoned, key=_logit_diff)
    text += f" {words(worst.poison or 'poison').capitalize()} takes it to {_ld(worst)}"
    if recovered := next((s for s in stages if s.kind == "recovered" and s.poison == worst.poison), None):
        text += f"; {recovered.step} clean steps bring it to {_ld(recovered)}"
        undone = {row.name: row.recovered for row in recovered.restoration}.get("damage_undone")
        if undone and undone.value is not None:
            text += f" and undo {percent(undone.value, 0)} of the damage to the mechanism"
    return text + ("." if len(poisoned) == 1 else f". (Of {len(poisoned)} poisons it moves the logit difference most.)")


def _ld(stage: Stage) -> str:
    return signed(_logit_diff(stage))


def _logit_diff(stage: Stage) -> float:
    return stage.behaviour.logit_diff.known


def _facts(block: Document) -> list[tuple[str, object]]:
    """Keys and values of a saved object, without the empty ones; nothing where it is absent."""
    return [(key, value.value) for key, value in block.items() if value]
