"""The self-contained page: one HTML file that opens offline and asks the network for nothing."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]

from neuroplast.report import style
from neuroplast.report.changes import SignFlip, sign_flips
from neuroplast.report.charts import build_charts
from neuroplast.report.documents import Document
from neuroplast.report.figures import write_figures
from neuroplast.report.results import Stage, StudyResults, load_results
from neuroplast.report.tables import write_tables
from neuroplast.storage import write_text

SHOWN_FLIPS = 12
"""Sign flips of a stage that are listed before the rest folds away."""

RESTORATION_MEANING = {
    "behaviour": (
        "Behaviour",
        "share of the logit difference taken by the poison that came back; 1 is base's own level",
    ),
    "mechanism": ("Mechanism", "correlation of the head effects with base's"),
    "damage_undone": ("Damage undone", "share of the lost correlation that came back; 1 is all of it"),
    "structure": ("Structure", "overlap of the rediscovered circuit with base's"),
    "function": ("Function", "faithfulness of base's circuit inside the recovered model"),
}


@dataclass(frozen=True)
class StageFlips:
    """The heads of one stage that flipped sign against base."""

    stage: Stage
    """The stage."""
    flips: tuple[SignFlip, ...]
    """Its flips, largest first."""


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
    write_figures(results, run / "figures")
    page = run / "report.html"
    write_text(page, render_page(results))
    return page


def render_page(results: StudyResults) -> str:
    """The page as HTML."""
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
        has_circuits=any(s.nodes_jaccard.value is not None for s in order if s.kind != "base"),
        prompt_groups=tuple(dict.fromkeys(name for s in order for name, _ in s.behaviour.by_group)),
        flips=tuple(StageFlips(s, sign_flips(s, results.base_of(s))) for s in order if s.kind != "base"),
        shown_flips=SHOWN_FLIPS,
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
