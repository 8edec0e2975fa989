"""Colours and labels that the figures and the page share; all told apart with colour-blind eyes."""

import math
from itertools import groupby

from neuroplast.report.results import Kind, Stage, StudyResults

KIND_COLOURS: dict[Kind, str] = {
    "base": "#6b7280",
    "tuned": "#0072b2",
    "poisoned": "#d55e00",
    "recovered": "#00875f",
    "control": "#b8578f",
}
"""One colour a kind of stage, after Okabe and Ito; the page has lighter ones for dark screens."""

DIVERGING = ("#0b3c6f", "#2f78b7", "#a9cbe6", "#f4f4f2", "#f6bd86", "#d96b14", "#7a2f00")
"""Blue (the head helps) over neutral (nothing) to orange (it hinders), evenly spaced."""

DIVERGING_DARK = ("#b5dcff", "#4f9fe6", "#23567f", "#262b33", "#84481a", "#e8822e", "#ffd3a6")
"""The same for dark screens."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Line styles by poison, so that two of them are told apart without colour."""

MAPS_PER_ROW = 7
"""Most heat maps side by side."""

SIGN_NOTE = "change of the logit difference when the head is patched; negative: the head helps"
"""What a head effect is, in one line."""


def lines_of(stage: Stage) -> tuple[str, ...]:
    """A stage id over several lines, for a narrow title."""
    return tuple(part.replace("_", " ") for part in stage.id.split("/"))


def poisons(results: StudyResults) -> tuple[str, ...]:
    """Names of the poisons, in order of appearance."""
    return tuple(dict.fromkeys(stage.poison for stage in results.stages if stage.poison))


def dash_of(stage: Stage, results: StudyResults) -> str:
    """The line style of a stage: one a poison."""
    names = poisons(results)
    return DASHES[names.index(stage.poison) % len(DASHES)] if stage.poison in names else DASHES[0]


def reading_order(results: StudyResults) -> tuple[Stage, ...]:
    """Final stages: base and tuned, then each poison's damage and recovery, then what they are held against.

    A control that names no poison follows the last recovered stage of its seed.
    """
    names, kinds = poisons(results), list(KIND_COLOURS)

    def key(stage: Stage) -> tuple[int, int, int, int]:
        rank = kinds.index(stage.kind)
        if stage.poison is None:
            return stage.seed, rank, 0, rank
        return stage.seed, kinds.index("poisoned"), names.index(stage.poison), rank

    return tuple(sorted(results.stages, key=key))


def by_seed(stages: tuple[Stage, ...]) -> tuple[tuple[int, tuple[Stage, ...]], ...]:
    """Stages in groups of one seed; they must come seed by seed."""
    return tuple((seed, tuple(group)) for seed, group in groupby(stages, key=lambda stage: stage.seed))


def grid(count: int) -> tuple[int, int]:
    """Rows and columns for `count` heat maps, rows filled evenly."""
    rows = math.ceil(count / MAPS_PER_ROW)
    return rows, math.ceil(count / rows)
