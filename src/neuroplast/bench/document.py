"""The table as JSON has it, and two of them beside each other."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuroplast.bench.job import Alternating, Missing, Peer
from neuroplast.bench.rounds import Clock
from neuroplast.errors import InputError
from neuroplast.storage import load_json

SCHEMA = 1


def row_document(name: str, clock: Clock, rate: float) -> dict[str, Any]:
    """One row. What could not be measured is null, with the reason under `why`.

    Args:
        name: of the row.
        clock: what was measured.
        rate: operations a second of the machine's matrix products.
    """
    job = clock.job
    why: dict[str, str] = {}
    row: dict[str, Any] = {"name": name, "what": job.what, "repeats": len(clock.seconds)}
    own = None
    if clock.failed is None:
        own = statistics.median(clock.seconds)
        row |= {"seconds": own, "range": [min(clock.seconds), max(clock.seconds)]}
    else:
        row |= {"seconds": None, "range": None}
        why["seconds"] = clock.failed
    return row | _floor(clock, own, rate, why) | _peer(clock, own, why) | {"why": why}


def _floor(clock: Clock, own: float | None, rate: float, why: dict[str, str]) -> dict[str, Any]:
    floor = clock.job.floor
    if own is None or isinstance(floor, Missing):
        why["floor"] = clock.failed or (floor.why if isinstance(floor, Missing) else "")
        return {"floor": None, "floor_seconds": None, "over_floor": None}
    if isinstance(floor, Alternating):
        seconds, kind = statistics.median(clock.floor), "run in turn"
    else:
        seconds, kind = floor.operations(clock.found) / rate, "counted"
    return {"floor": kind, "floor_seconds": seconds, "over_floor": own / seconds}


def _peer(clock: Clock, own: float | None, why: dict[str, str]) -> dict[str, Any]:
    keys = ("peer", "peer_seconds", "peer_timed", "over_peer", "max_difference")
    peer, named = clock.peer, clock.job.peer
    if own is None or isinstance(peer, Missing) or not isinstance(named, Peer):
        why["peer"] = clock.failed or (peer.why if isinstance(peer, Missing) else "")
        return dict.fromkeys(keys)
    values = (named.name, peer.seconds, peer.timed, own / peer.seconds, peer.max_difference)
    return dict(zip(keys, values, strict=True))


def load_document(path: Path) -> dict[str, Any]:
    """An earlier table.

    Raises:
        StorageError: when the file cannot be read.
        InputError: when it holds something else.
    """
    document = load_json(path)
    try:
        fits = (
            document["schema"] == SCHEMA
            and isinstance(document["date"], str)
            and document["rate"]["operations_a_second"] > 0
            and all({"name", "what", "seconds", "over_floor"} <= set(row) for row in document["rows"])
            and all(row["seconds"] is None or row["seconds"] > 0 for row in document["rows"])
            and isinstance(document["model"]["name"], str)
        )
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise InputError(f"{path} is no table of `neuroplast bench`; expected what its --out or --json wrote")
    return document


def compare(now: Mapping[str, Any], then: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Every row's seconds ÷ those of an earlier table; a row that is not the same there has none, with the reason.

    Args:
        now: this table.
        then: the earlier one, from `load_document`.
        file: where that lies.
    """
    former = {row["name"]: row for row in then["rows"]}
    is_same = now["model"] == then["model"]
    rows: dict[str, Any] = {}
    for row in now["rows"]:
        other = former.get(row["name"])
        if not is_same:
            why = f"it is of another model: {then['model']['name']}"
        elif other is None or other["seconds"] is None or row["seconds"] is None:
            why = "it was not measured both times"
        elif other["what"] != row["what"]:
            why = f"it was another size: {other['what']}"
        else:
            rows[row["name"]] = {"ratio": row["seconds"] / other["seconds"]}
            continue
        rows[row["name"]] = {"ratio": None, "why": why}
    rates = [each["rate"]["operations_a_second"] for each in (now, then)]
    return {"file": file, "date": then["date"], "rate_ratio": rates[0] / rates[1], "rows": rows}
