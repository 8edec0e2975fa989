"""What several seeds say of each poison, and of two beside each other: read from a run and tabled."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neuroplast.report.documents import Document, load_document
from neuroplast.report.reading import read_estimate
from neuroplast.report.results import Estimate
from neuroplast.report.trajectories import PLASTICITY

SHOWN = {
    "half_way_steps/break/logit_diff": "Steps until behaviour is half broken",
    "half_way_steps/break/mechanism": "Steps until the mechanism is half broken",
    "half_way_steps/heal/logit_diff": "Steps until behaviour is half healed",
    "half_way_steps/heal/mechanism": "Steps until the mechanism is half healed",
    "restoration/mechanism/recovered": "Head effects ~ base, recovered",
    "restoration/mechanism/difference": "Head effects ~ base, recovered − control",
    "restoration/damage_undone/recovered": "Damage undone, recovered",
    "restoration/damage_undone/difference": "Damage undone, recovered − control",
    "restoration/function/recovered": "Base's circuit alone ÷ model, recovered",
    "restoration/function/difference": "Base's circuit alone ÷ model, recovered − control",
}
"""The numbers on the page, by their place in `plasticity.json`; `seeds.csv` has all."""


@dataclass(frozen=True)
class OverSeeds:
    """Means over seeds, of one poison or of the difference of two."""

    of: str
    """The poison, or `second − first`."""
    n: int
    """How many seeds."""
    numbers: dict[str, Estimate]
    """By place, the mean and what another seed would give."""


def load_over_seeds(run: Path) -> tuple[OverSeeds, ...]:
    """Reads them; none where one seed was run, or nothing was followed."""
    if not (run / PLASTICITY).exists():
        return ()
    document = load_document(run, PLASTICITY)
    named = list(document["over_seeds"].items())
    for each in document["between_poisons"].elements():
        first, second = (name.text() for name in each["poisons"].elements())
        named.append((f"{second} − {first}", each))
    return tuple(OverSeeds(of, each["n"].integer(), dict(_numbers(each, ""))) for of, each in named)


def seeds_rows(found: tuple[OverSeeds, ...]) -> Iterator[list[str | float | int | None]]:
    """Rows of `seeds.csv`: of what, seeds, quantity, value, interval, and why there is none."""
    for each in found:
        for quantity, number in each.numbers.items():
            low, high = number.interval or (None, None)
            yield [each.of, each.n, quantity, number.value, low, high, number.why]


def _numbers(document: Document, place: str) -> Iterator[tuple[str, Estimate]]:
    for key, inner in document.items():
        if not isinstance(inner.value, dict):
            continue
        here = f"{place}/{key}".lstrip("/")
        if "value" in inner.value:
            yield here, read_estimate(inner)
        else:
            yield from _numbers(inner, here)
