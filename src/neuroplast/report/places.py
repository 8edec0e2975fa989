"""A stage beside base, as the page shows it: where its change is expressed, where it is stored, and what was spared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.errors import InputError
from neuroplast.report.audit import against, summary_rows
from neuroplast.report.documents import REMEDY, Document
from neuroplast.report.reading import read_estimate
from neuroplast.report.results import Estimate, Stage
from neuroplast.storage import load_json

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Spared:
    """One other task, or the model's own text."""

    task: str
    """Its name."""
    status: str
    """`spared`, `damaged`, `improved`, `uncertain` or `undefined`."""
    kept: Estimate
    """What is left of it, as a share."""
    against: str
    """What drift does to it, in words."""


@dataclass(frozen=True)
class Place:
    """One checkpoint that was compared with base."""

    name: str
    """The stage, or the model."""
    kind: str
    """What kind of stage."""
    heads: str
    """Whose shares are told, in words: base's circuit, or what stands for it."""
    label: str
    """The verdict in a word."""
    statement: str
    """The verdict in a sentence."""
    expressed: Estimate
    """Share of the change that patching base's circuit back undoes."""
    expressed_null: str
    """What random sets of heads undo, in words."""
    stored: Estimate
    """Share of the change that the weights of base's circuit store."""
    stored_null: str
    """What random sets store, in words."""
    groups: tuple[tuple[str, float], ...]
    """By kind of part, its share of what is stored."""
    undoes: np.ndarray | None
    """By layer and head, in logits, what patching it back undoes; None where nothing changed."""
    stored_map: np.ndarray | None
    """By layer and head, in logits, what its weights store."""
    spared: tuple[Spared, ...]
    """Other tasks, and text."""
    rows: tuple[tuple[str, str, str, str], ...]
    """Everything: section, what, value, and what it is held against."""


def load_places(
    run: Path, stages: Sequence[Stage], *, has_circuit: bool
) -> tuple[tuple[Place, ...], tuple[tuple[Stage, str], ...], dict[str, Mapping[str, Any]]]:
    """Reads the comparisons of a run: those made, the reasons why others were not, and the documents with maps.

    Args:
        run: the run directory.
        stages: its stages.
        has_circuit: whether base has a circuit, whose shares are told then.

    Raises:
        InputError: when one does not hold what it should.
    """
    whose = "base’s circuit" if has_circuit else "the heads that act on the logits most"
    places: list[Place] = []
    missing: list[tuple[Stage, str]] = []
    documents: dict[str, Mapping[str, Any]] = {}
    for stage in stages:
        path = run / "stages" / stage.id / COMPARISON
        if not path.is_file():
            continue
        document = load_json(path)
        try:
            if "verdict" not in document:
                missing.append((stage, document["why"]))
                continue
            places.append(build_place(document, stage.id, stage.kind, whose))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(f"{path} is damaged ({error!r}); {REMEDY}") from error
        if "maps" in document:
            documents[stage.id] = document
    return tuple(places), tuple(missing), documents


def build_place(document: Mapping[str, Any], name: str, kind: str, heads: str) -> Place:
    """What a comparison's document says.

    Args:
        document: the comparison.
        name: the stage, or the model.
        kind: what kind of stage.
        heads: whose shares are told, in words.

    Raises:
        KeyError: when it lacks something; likewise TypeError and ValueError.
    """
    changed = "maps" in document
    expressed, stored = (document[name]["circuit"] if changed else None for name in ("expressed", "stored"))
    nothing, rows = Estimate(None, None, "nothing changed"), tuple(summary_rows(document))
    return Place(
        name=name,
        kind=kind,
        heads=heads,
        label=document["verdict"]["label"],
        statement=document["verdict"]["statement"],
        expressed=_estimate(expressed["undone"]) if expressed else nothing,
        expressed_null=against(expressed) if expressed else "",
        stored=_estimate(stored["share"]) if stored else nothing,
        stored_null=against(stored) if stored else "",
        groups=_groups(document) if changed else (),
        undoes=np.array(document["maps"]["undoes"], dtype=float) if changed else None,
        stored_map=np.array(document["maps"]["stored"], dtype=float) if changed else None,
        spared=_spared(document, rows) if changed else (),
        rows=rows,
    )


def _groups(document: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Shares of the summed sizes, so that what cancels in the sum is seen."""
    return tuple(
        (name, Document(f"{COMPARISON}: stored: {name}", each["share"]).number())
        for name, each in document["stored"]["sizes"].items()
        if "<" not in name and each["share"]
    )


def _spared(document: Mapping[str, Any], rows: Sequence[tuple[str, str, str, str]]) -> tuple[Spared, ...]:
    held = {row[0].removeprefix("spared: "): row[3] for row in rows if row[0].startswith("spared: ")}
    found: list[Spared] = []
    for task, each in document["spared"].items():
        kept = each.get("kept")
        estimate = _estimate(kept) if kept else Estimate(None, None, each.get("why"))
        found.append(Spared(task, each["status"], estimate, held[task]))
    return tuple(found)


def _estimate(found: Mapping[str, Any]) -> Estimate:
    return read_estimate(Document(COMPARISON, found))


def maps_data(places: Sequence[Place]) -> dict[str, Any]:
    """The two maps of heads of each stage, for the page's script."""
    found: dict[str, Any] = {}
    for place in places:
        for name, grid, label, what in (
            ("undoes", place.undoes, "What patching each head back undoes, in logits", "undoes"),
            ("stored", place.stored_map, "What the weights of each head store, in logits", "stores"),
        ):
            if grid is not None:
                found[f"{place.name}/{name}"] = map_data(grid, f"{label}, {place.name}", what)
    return found


def map_data(grid: np.ndarray, label: str, what: str, bound: float | None = None) -> dict[str, Any]:
    """One map of heads.

    Args:
        grid: a number of each head, (layer, head).
        label: what it shows.
        what: what its numbers are, in a word.
        bound: the number that has the strongest colour; None takes the largest.
    """
    layers, heads = grid.shape
    return {
        "layers": layers,
        "heads": heads,
        "values": [round(value, 4) for value in grid.ravel().tolist()],
        "bound": bound or float(np.abs(grid).max()) or 1.0,
        "label": label,
        "what": what,
    }
