"""The self-contained page: one HTML file that opens offline and asks the network for nothing."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]

from neuroplast.circuits.circuit import Role
from neuroplast.components import Node
from neuroplast.errors import InputError
from neuroplast.report import style
from neuroplast.report.audit import draw_audit
from neuroplast.report.changes import SignFlip, node_frequency, sign_flips
from neuroplast.report.charts import build_charts
from neuroplast.report.circuit import write_circuit_drawing
from neuroplast.report.documents import REMEDY, Document
from neuroplast.report.evaluation import criteria_rows
from neuroplast.report.figures import write_figures
from neuroplast.report.paper import write_paper_tables
from neuroplast.report.results import Estimate, Stage, StageCircuit, StudyResults, load_results
from neuroplast.report.seeds import SHOWN, OverSeeds, load_over_seeds
from neuroplast.report.tables import write_plasticity_tables, write_tables
from neuroplast.report.trajectories import Plasticity, load_followed, load_plasticity, write_trajectory_figures
from neuroplast.storage import atomic_file, load_json, write_text

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
    picture: str | None
    """The drawing as a `data:` address; None where the page has enough of them."""
    nodes: tuple[CircuitNode, ...]
    """Its nodes, the strongest first."""
    criteria: tuple[tuple[str, Estimate, str], ...]
    """Everything it was judged by: name, value, what it means or why it is missing."""


def write_report(run: Path) -> Path:
    """Writes the page, the figures and the tables of a finished run, replacing earlier ones.

    Only saved results are read; the same results give the same bytes.

    Args:
        run: the run directory.

    Returns:
        Path of the page, `run/report.html`.

    Raises:
        InputError: when the directory is no finished run.
        StorageError: when it cannot be written to.
    """
    results = load_results(run)
    write_tables(results, run / "tables")
    write_paper_tables(run, results)
    write_figures(results, run / "figures")
    circuits = _shown_circuits(results, _write_drawings(results, run / "figures"))
    ways = load_plasticity(run, results)
    over_seeds = load_over_seeds(run)
    write_plasticity_tables(load_followed(run, results).values(), ways, over_seeds, run / "tables")
    drawn = write_trajectory_figures(ways, run / "figures")
    pictures = tuple((each, _data_address(drawn[each.back.id])) for each in ways)
    _write_comparisons(results, run)
    page = run / "report.html"
    write_text(page, render_page(results, circuits, pictures, over_seeds))
    return page


def _write_comparisons(results: StudyResults, run: Path) -> None:
    """Draws the comparison of every stage that was compared with base."""
    for stage in results.stages:
        path = run / "stages" / stage.id / "comparison.json"
        if path.is_file() and "maps" in (found := load_json(path)):
            with atomic_file(run / "figures" / f"comparison-{stage.id.replace('/', '-')}.png") as temporary:
                FigureCanvasAgg(draw_audit(found)).print_png(temporary)


def _write_drawings(results: StudyResults, folder: Path) -> dict[str, Path]:
    """Draws the circuit of every final stage that has one, and gives the SVG files by stage id."""
    drawn: dict[str, Path] = {}
    for stage in results.stages:
        if stage.circuit:
            circuit = stage.circuit.found
            named = replace(circuit, shape=replace(circuit.shape, name=f"{stage.id} · {circuit.shape.name}"))
            drawn[stage.id] = folder / f"circuit-{stage.id.replace('/', '-')}.svg"
            for suffix in (".svg", ".png"):
                write_circuit_drawing(named, drawn[stage.id].with_name(drawn[stage.id].stem + suffix))
    return drawn


def _shown_circuits(results: StudyResults, drawings: Mapping[str, Path]) -> tuple[ShownCircuit, ...]:
    shown: list[ShownCircuit] = []
    for stage in style.reading_order(results):
        if stage.circuit is None:
            continue
        path = drawings[stage.id]
        picture = _data_address(path) if len(shown) < DRAWN_CIRCUITS else None
        nodes, rows = _circuit_nodes(stage.circuit), _criteria(stage.circuit.criteria.document)
        shown.append(ShownCircuit(stage, stage.circuit, path.stem, picture, nodes, rows))
    return tuple(shown)


def _data_address(path: Path) -> str:
    """An SVG inside an image runs no script and asks for nothing, whatever its texts say."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


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
            (name, Estimate(value, None if low is None else (low, high)), note) for name, value, low, high, note in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{judged.where} is damaged ({error}); {REMEDY}") from error


def render_page(
    results: StudyResults,
    circuits: tuple[ShownCircuit, ...] = (),
    ways: tuple[tuple[Plasticity, str], ...] = (),
    over_seeds: tuple[OverSeeds, ...] = (),
) -> str:
    """The page as HTML.

    Args:
        results: the run.
        circuits: what is shown of the stages' circuits.
        ways: how each poison broke the mechanism and how it healed, with a drawing as a `data:` address.
        over_seeds: what several seeds say of each poison, and of two beside each other.
    """
    environment = Environment(
        loader=PackageLoader("neuroplast", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast(dict[str, Callable[..., str]], environment.filters)  # pyright: ignore[reportUnknownMemberType]
    filters |= {"signed": _signed, "percent": _percent, "words": _words, "plain": _plain}
    order = style.reading_order(results)
    charts = build_charts(results)
    story = _story_stages(order)
    return environment.get_template("page.html.j2").render(
        results=results,
        groups=style.by_seed(order),
        story=_story(story),
        story_stages=story,
        measured=order[0],
        has_foil=any(point.behaviour.foil_top1 is not None for point in results.points),
        has_circuits=any(s.nodes.shared.value is not None for s in order if s.kind != "base"),
        circuits=circuits,
        shown_circuits=SHOWN_CIRCUITS,
        judged=tuple(
            s for s in order if s.circuit or s.base_circuit.value is not None or s.base_circuit_foil.value is not None
        ),
        compared=tuple(s for s in order if s.kind != "base" and s.nodes.shared.value is not None),
        without_circuit=_without_circuit(order),
        methodologies=tuple(dict.fromkeys(each.circuit.criteria.methodology for each in circuits)),
        prompt_groups=tuple(dict.fromkeys(name for s in order for name, _ in s.behaviour.by_group)),
        flips=tuple(StageFlips(s, sign_flips(s, results.base_of(s))) for s in order if s.kind != "base"),
        shown_flips=SHOWN_FLIPS,
        ways=ways,
        half_ways=HALF_WAYS,
        over_seeds=tuple(
            each for each in over_seeds if any(number.value is not None for number in each.numbers.values())
        ),
        seeds_shown=SHOWN,
        restored=tuple(stage for stage in order if stage.restoration),
        restoration_meaning=RESTORATION_MEANING,
        charts=charts,
        colours=style.KIND_COLOURS,
        scales={"light": style.DIVERGING, "dark": style.DIVERGING_DARK},
        sign_note=style.SIGN_NOTE,
        facts=_facts,
        # plotly.js is the one text that is not ours; it is shipped inside the plotly package.
        plotly=Markup(get_plotlyjs()),
    )


def _without_circuit(order: tuple[Stage, ...]) -> tuple[tuple[str, tuple[Stage, ...]], ...]:
    """Reasons why stages have no circuit, each with its stages."""
    found: dict[str, list[Stage]] = {}
    for stage in order:
        if stage.circuit is None:
            found.setdefault(stage.why_no_circuit or "no circuit was looked for", []).append(stage)
    return tuple((why, tuple(stages)) for why, stages in found.items())


def _story_stages(order: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Of the first seed: base, tuned, the most damaging poison, its recovery and the control."""
    first = [stage for stage in order if stage.seed == order[0].seed]
    poisoned = [stage for stage in first if stage.kind == "poisoned"]
    worst = min(poisoned, key=_logit_diff, default=None)
    told = [stage for stage in first if stage.kind in ("base", "tuned")]
    if worst is not None:
        told += [worst, *(s for s in first if s.kind == "recovered" and s.poison == worst.poison)]
        told += [s for s in first if s.kind == "control" and s.poison in (None, worst.poison)]
    return tuple(told)


def _story(stages: tuple[Stage, ...]) -> str:
    """What happened, in one or two sentences."""
    by_kind = {stage.kind: stage for stage in stages}
    base = by_kind["base"]
    text = f"The logit difference is {_ld(base)} at base"
    if tuned := by_kind.get("tuned"):
        text += f" and {_ld(tuned)} after clean fine-tuning"
    text += "."
    if poisoned := by_kind.get("poisoned"):
        text += f" {_words(poisoned.poison or 'poison').capitalize()} takes it to {_ld(poisoned)}"
        if recovered := by_kind.get("recovered"):
            text += f"; {recovered.step} clean steps bring it to {_ld(recovered)}"
            undone = {row.name: row.recovered for row in recovered.restoration}.get("damage_undone")
            if undone and undone.value is not None:
                text += f" and undo {_percent(undone.value, 0)} of the damage to the mechanism"
        text += "."
    return text


def _ld(stage: Stage) -> str:
    return _signed(_logit_diff(stage))


def _logit_diff(stage: Stage) -> float:
    return stage.behaviour.logit_diff.known


def _signed(value: float, digits: int = 2) -> str:
    """A number with a typographic minus, and no minus before a zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def _percent(value: float, digits: int = 1) -> str:
    return _signed(100 * value, digits) + "\u202f%"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: object) -> str:
    """A saved value as text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _facts(block: Document) -> list[tuple[str, object]]:
    """Keys and values of a saved object, without the empty ones; nothing where it is absent."""
    return [(key, value.value) for key, value in block.items() if value]
