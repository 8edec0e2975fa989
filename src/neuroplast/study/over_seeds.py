"""What several seeds say of a poison, and of two poisons beside each other. The seed is the unit, and pairs them."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from neuroplast.circuits.evaluate import estimate_document
from neuroplast.statistics import Estimate, over_seeds

RESTORED = ("behaviour", "mechanism", "damage_undone", "function")

Numbers = Mapping[tuple[str, ...], float | None]
"""What one seed says of one poison: numbers by their place in the document."""


def numbers_of(way: Mapping[str, Any] | None, restoration: Mapping[str, Any]) -> Numbers:
    """The numbers of one recovery.

    Args:
        way: from `FollowStudy.plasticity_document`; None where it was not followed.
        restoration: from `restoration_document`.
    """
    found: dict[tuple[str, ...], float | None] = {}
    way = way or {"half_way_steps": {}, "roles": {}}
    for direction, times in way["half_way_steps"].items():
        for what, time in times.items():
            found["half_way_steps", direction, what] = time["value"]
    for role, change in way["roles"].items():
        for what in ("coupling", "hysteresis"):
            found["roles", role, what] = change[what]["value"]
    for row in RESTORED:
        mine, control = restoration.get(row), restoration["control"].get(row)
        found["restoration", row, "recovered"], found["restoration", row, "control"] = mine, control
        found["restoration", row, "difference"] = _difference(mine, control)
    return found


def seeds_document(seeds: Sequence[Numbers]) -> dict[str, Any]:
    """The mean over seeds of every number that all of them have a place for, with what another seed would give."""
    return {"n": len(seeds)} | _nested(
        {place: _mean([each[place] for each in seeds]) for place in seeds[0] if all(place in each for each in seeds)}
    )


def poisons_document(by_poison: Mapping[str, Sequence[Numbers]]) -> list[dict[str, Any]]:
    """Of every two poisons, how much more the second has of every number, the seed being the same."""
    return [
        {"poisons": [first, second]}
        | seeds_document(
            [
                {place: _difference(theirs[place], mine[place]) for place in mine if place in theirs}
                for mine, theirs in zip(by_poison[first], by_poison[second], strict=True)
            ]
        )
        for first, second in combinations(by_poison, 2)
    ]


def _mean(values: Sequence[float | None]) -> Estimate:
    """Over all seeds or none: a step that some never reached is late there, and the others' mean would be early."""
    absent = sum(value is None for value in values)
    if absent:
        return Estimate(None, None, f"undefined at {absent} of {len(values)} seeds")
    return over_seeds(values)


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _nested(found: Mapping[tuple[str, ...], Estimate]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for place, each in found.items():
        inner = document
        for key in place[:-1]:
            inner = inner.setdefault(key, {})
        inner[place[-1]] = estimate_document(each)
    return document
