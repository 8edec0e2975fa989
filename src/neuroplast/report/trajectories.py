"""How the mechanism went through training: read from a run, drawn and tabled.

A picture for each recovery that was followed together with the poisoning before it: behaviour, likeness to base and the
strength of each role over the steps, and strength against the logit difference, where a way back that is not the way
there shows as a loop. Only saved results are read.
"""

# pyright: reportUnknownMemberType=false
# matplotlib passes its **kwargs on untyped.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuroplast.errors import InputError
from neuroplast.report import style
from neuroplast.report.documents import REMEDY, Document, load_document
from neuroplast.report.figures import DPI, tidy, write_both
from neuroplast.report.reading import read_estimate
from neuroplast.report.results import Estimate, StudyResults

TRAJECTORY, PLASTICITY = "trajectory.json", "plasticity.json"
WAYS = {"break": "to break", "heal": "to heal"}
ROLE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a7a00", "#444444")
"""After Okabe and Ito."""
BREAKING, HEALING = style.KIND_COLOURS["poisoned"], style.KIND_COLOURS["recovered"]
MARKERS = "osD^vP*X"
"""One a role, so that two are told apart without colour."""


@dataclass(frozen=True)
class Point:
    """What was measured at one step."""

    step: int
    """The optimizer step of the stage's training."""
    logit_diff: Estimate
    """Mean logit difference."""
    accuracy: float | None
    """Share of prompts with a positive logit difference."""
    similarity: Estimate
    """Correlation of head effects with base's."""
    circuit: Estimate
    """Logit difference of base's circuit alone."""
    faithfulness: Estimate
    """Its share of the model's."""
    roles: dict[str, dict[str, Estimate]]
    """By role and quantity."""


@dataclass(frozen=True)
class FollowedStage:
    """One stage's way."""

    id: str
    """The stage."""
    kind: str
    """What was done."""
    points: tuple[Point, ...]
    """What was measured on the way."""
    heads: dict[str, tuple[str, ...]]
    """By role, base's heads."""
    n_prompts: int | None
    """Prompts that it was measured on."""


@dataclass(frozen=True)
class RoleChange:
    """How a role's strength goes with the logit difference, breaking and healing."""

    role: str
    """The role."""
    strength: str
    """What its strength is: `direct` or `total`."""
    sign: float
    """-1 where it is what the heads take from the logit difference."""
    coupling: Estimate
    """Spearman's correlation with the logit difference, on both ways."""
    null: tuple[float | None, float | None, float | None]
    """Mean and standard deviation of random sets, and p."""
    why_no_null: str | None
    """Why there is none."""
    hysteresis: Estimate
    """Strength on the way back minus on the way there, at the same logit difference."""


@dataclass(frozen=True)
class Plasticity:
    """How one poison broke the mechanism and how it healed."""

    there: FollowedStage
    """The poisoning."""
    back: FollowedStage
    """The recovery."""
    half_way: dict[tuple[str, str], Estimate]
    """Steps to half of the way, by way (`WAYS`) and by what went it."""
    roles: tuple[RoleChange, ...]
    """By role."""
    heads: tuple[Document, ...]
    """Heads whose direct effect came, went or turned round."""


def load_followed(run: Path, results: StudyResults) -> dict[str, FollowedStage]:
    """Reads the ways of a run's stages; none where nothing was followed."""
    found: dict[str, FollowedStage] = {}
    for stage in results.stages:
        name = f"stages/{stage.id}/{TRAJECTORY}"
        if (run / name).exists():
            document = load_document(run, name)
            points = tuple(_point(each) for each in document["points"].elements())
            heads = {role: tuple(head.text() for head in each.elements()) for role, each in document["roles"].items()}
            if not points:
                raise InputError(f"{document.where}: points: expected what was measured on the way; {REMEDY}")
            n_prompts = document["n_prompts"].integer() if document["n_prompts"] else None
            found[stage.id] = FollowedStage(stage.id, stage.kind, points, heads, n_prompts)
    return found


def step_file(stage_id: str, step: int) -> str:
    """What was measured at a step of a followed stage, prompt by prompt; relative to the run."""
    return f"stages/{stage_id}/trajectory/step-{step:06d}.safetensors"


def load_plasticity(run: Path, results: StudyResults) -> tuple[Plasticity, ...]:
    """Reads how each poison broke the mechanism and how it healed; empty where that was not followed."""
    if not (run / PLASTICITY).exists():
        return ()
    followed, parents = load_followed(run, results), {stage.id: stage.parent for stage in results.stages}
    found: list[Plasticity] = []
    for name, each in load_document(run, PLASTICITY)["stages"].items():
        there, back = followed.get(parents.get(name) or ""), followed.get(name)
        if there is not None and back is not None:
            times = {
                (way, what): read_estimate(time) for way in WAYS for what, time in each["half_way_steps"][way].items()
            }
            roles = tuple(_role(role, change) for role, change in each["roles"].items())
            found.append(Plasticity(there, back, times, roles, tuple(each["heads"].elements())))
    return tuple(found)


def write_trajectory_figures(found: Sequence[Plasticity], folder: Path) -> dict[str, Path]:
    """Draws each into `trajectory-<stage>.svg` and `.png`, and gives the SVG files by stage."""
    drawn: dict[str, Path] = {}
    for each in found:
        path = folder / f"trajectory-{each.back.id.replace('/', '-')}"
        write_both(draw_plasticity(each), path)
        drawn[each.back.id] = path.with_name(f"{path.name}.svg")
    return drawn


def draw_plasticity(found: Plasticity) -> Figure:
    """Behaviour, likeness to base and the strength of each role over the steps; strength against behaviour."""
    rows = 2 if found.roles else 1
    figure = Figure(figsize=(10, 3.2 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    top_left, top_right = axes[0]
    _draw_over_steps(top_left, found, "logit difference", {"model": "logit_diff", "base's circuit alone": "circuit"})
    _draw_over_steps(top_right, found, "correlation of head effects with base's", {"": "similarity"})
    if found.roles:
        _draw_roles(found, *axes[1])
    figure.suptitle(f"{found.there.id}, then {found.back.id}".replace("$", r"\$"), fontsize=10)
    return figure


def _draw_roles(found: Plasticity, low_left: Axes, low_right: Axes) -> None:
    """The strength of each role over the steps, and against behaviour."""
    for number, change in enumerate(found.roles):
        colour, marker = ROLE_COLOURS[number % len(ROLE_COLOURS)], MARKERS[number % len(MARKERS)]
        there, back = (_strengths(each, change) for each in (found.there, found.back))
        end = found.there.points[-1].step
        low_left.plot(
            [*(point.step for point in found.there.points), *(end + point.step for point in found.back.points)],
            [*(value for _, value in there), *(value for _, value in back)],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            label=f"{change.role} ({change.strength})",
        )
        for way, way_colour in ((there, BREAKING), (back, HEALING)):
            low_right.plot(*zip(*way, strict=True), color=way_colour, linewidth=1, alpha=0.7)
            low_right.plot(*zip(*way, strict=True), linestyle="", marker=marker, markersize=4, color=colour)
            for (x, y), (to_x, to_y) in pairwise(way):
                low_right.annotate(
                    "",
                    ((x + to_x) / 2, (y + to_y) / 2),
                    (x, y),
                    arrowprops={"arrowstyle": "->", "color": way_colour, "lw": 0.8},
                )
    _mark_turn(low_left, found)
    low_left.set_ylabel("strength, in logits", fontsize=9)
    low_left.set_xlabel("optimiser steps: breaking, then healing", fontsize=9)
    low_right.set_xlabel("logit difference", fontsize=9)
    low_right.set_ylabel("strength, in logits", fontsize=9)
    low_right.set_title("orange: breaking, green: healing", fontsize=8)
    for axes in (low_left, low_right):
        axes.axhline(0, color="#444444", linewidth=0.8)
        tidy(axes)
    low_left.legend(frameon=False, fontsize=7, loc="best")


def _draw_over_steps(axes: Axes, found: Plasticity, label: str, lines: dict[str, str]) -> None:
    end = found.there.points[-1].step
    for (name, field), style_of in zip(lines.items(), ("-", "--"), strict=False):
        for stage, offset in ((found.there, 0), (found.back, end)):
            known = [(offset + p.step, e) for p in stage.points if (e := getattr(p, field)).value is not None]
            if not known:
                continue
            colour = BREAKING if stage is found.there else HEALING
            steps, values = [x for x, _ in known], [each.value for _, each in known]
            axes.plot(steps, values, style_of, color=colour, marker="o", markersize=3)
            for x, each in known:
                if each.interval:
                    axes.plot((x, x), each.interval, color=colour, linewidth=0.9)
        if name and any(getattr(p, field).value is not None for p in (*found.there.points, *found.back.points)):
            axes.plot([], [], style_of, color="#444444", label=name)
    _mark_turn(axes, found)
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set_ylabel(label, fontsize=9)
    tidy(axes)
    if any(lines):
        axes.legend(frameon=False, fontsize=7, loc="best")


def _mark_turn(axes: Axes, found: Plasticity) -> None:
    axes.axvline(found.there.points[-1].step, color="#999999", linewidth=0.8, linestyle=":")


def _strengths(stage: FollowedStage, change: RoleChange) -> list[tuple[float, float]]:
    """Logit difference and strength at each step."""
    return [
        (point.logit_diff.known, change.sign * point.roles[change.role][change.strength].known)
        for point in stage.points
    ]


def trajectory_rows(followed: Iterable[FollowedStage]) -> Iterable[list[str | float | int | None]]:
    """Rows of `trajectories.csv`: stage, step, role, quantity, value and interval."""
    for stage in followed:
        for point in stage.points:
            whole = {
                "logit_diff": point.logit_diff,
                "similarity_to_base": point.similarity,
                "circuit_logit_diff": point.circuit,
                "circuit_faithfulness": point.faithfulness,
            }
            for role, quantities in {"": whole, **point.roles}.items():
                for quantity, each in quantities.items():
                    low, high = each.interval or (None, None)
                    yield [stage.id, point.step, role, quantity, each.value, low, high, each.why]


def plasticity_rows(found: Iterable[Plasticity]) -> Iterable[list[str | float | int | None]]:
    """Rows of `plasticity.csv`: stage, role, quantity, value, interval, random sets, p, and what is to be said."""
    for each in found:
        for (way, what), time in each.half_way.items():
            yield [each.back.id, "", f"half_way_steps_{way}_{what}", *_cells(time), None, None, None, time.why]
        for change in each.roles:
            why = change.coupling.why or change.why_no_null
            yield [each.back.id, change.role, "coupling", *_cells(change.coupling), *change.null, why]
            gap = change.hysteresis
            yield [each.back.id, change.role, "hysteresis", *_cells(gap), None, None, None, gap.why]


def _cells(found: Estimate) -> tuple[float | None, float | None, float | None]:
    low, high = found.interval or (None, None)
    return found.value, low, high


def _point(point: Document) -> Point:
    logit_diff = read_estimate(point["logit_diff"])
    if logit_diff.value is None:
        raise InputError(f"{point.where}: expected a logit difference, got none; {REMEDY}")
    return Point(
        step=point["step"].integer(),
        logit_diff=logit_diff,
        accuracy=point["accuracy"].number_or_none(),
        similarity=read_estimate(point["similarity_to_base"]),
        circuit=read_estimate(point["circuit_logit_diff"]),
        faithfulness=read_estimate(point["circuit_faithfulness"]),
        roles={
            role: {quantity: read_estimate(each) for quantity, each in mine.items()}
            for role, mine in point["roles"].items()
        },
    )


def _role(role: str, change: Document) -> RoleChange:
    null = change["coupling_null"]
    return RoleChange(
        role=role,
        strength=change["strength"]["quantity"].text(),
        sign=change["strength"]["sign"].number(),
        coupling=read_estimate(change["coupling"]),
        null=(null["mean"].number_or_none(), null["sd"].number_or_none(), null["p"].number_or_none()),
        why_no_null=null["why"].text_or_none(),
        hysteresis=read_estimate(change["hysteresis"]),
    )
