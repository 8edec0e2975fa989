"""A stage's circuit: found anew in its model, judged there, and held against the base's.

`circuit.json` is the circuit by path patching, `edges.json` the one by EAP-IG, `criteria.json` what was measured of
them: the evaluation, the base's circuit in this model and, of a recovered stage and its control, its circuit in the
base, each beside random circuits of the same shape; and how much of the model the chosen edges are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.circuits.circuit import Circuit, jaccard
from neuroplast.circuits.discover import discover
from neuroplast.circuits.edge_criteria import edge_faithfulness
from neuroplast.circuits.edge_discovery import discover_edges
from neuroplast.circuits.evaluate import circuit_document, estimate_document, evaluate
from neuroplast.circuits.files import load_circuit, save_circuit
from neuroplast.circuits.inside import inside_document
from neuroplast.circuits.shape import shape_of
from neuroplast.circuits.stability import drawn_sets
from neuroplast.errors import NothingFoundError, StorageError, UnsupportedModelError
from neuroplast.models.network import Network
from neuroplast.observer import Observer
from neuroplast.statistics import Weights, bootstrap_weights, interval
from neuroplast.storage import Parts, load_json, write_json
from neuroplast.study.plan import StudyConfig
from neuroplast.tasks.prompts import PromptSet

CIRCUIT, EDGES, CRITERIA = "circuit.json", "edges.json", "criteria.json"
NO_CIRCUIT = "no circuit is looked for at this stage: name its kind in circuit_stages"
METHOD = "eap-ig"


@dataclass(frozen=True)
class Circuits:
    """A measured point's circuits, read back."""

    nodes: Circuit | None
    """By path patching; None where nothing was found."""
    edges: Circuit | None
    """By EAP-IG; None where it was not asked for, or nothing was found."""
    criteria: Mapping[str, Any]
    """What was measured of them."""


class CircuitStudy:
    """Finds and judges the circuits of a study's stages."""

    def __init__(self, config: StudyConfig, prompts: PromptSet, reference: PromptSet, observer: Observer) -> None:
        self.config, self.prompts, self.reference, self.observer = config, prompts, reference, observer
        self.weights: Weights = bootstrap_weights(len(prompts), config.seeds[0], config.resamples)

    def measure(
        self,
        folder: Path,
        model: Network,
        base: Circuit | None,
        load_base: Callable[[], Network] | None,
        weights_sha256: str,
        *,
        own: bool,
    ) -> None:
        """Writes a point's circuits and what was measured of them; what is there is not made again.

        Args:
            folder: the point's folder.
            model: its model.
            base: the base's circuit; None while the base itself is measured, or where it has none.
            load_base: gives the base's model, for a recovered stage and its control.
            weights_sha256: of the model.
            own: also finds its own circuit; base's is always tried in it.
        """
        if (folder / CRITERIA).is_file():
            return
        parts = Parts(folder / "parts")
        document: dict[str, Any] = {"why": {}}
        why: dict[str, str] = document["why"]

        def find(name: str, make: Callable[[], Circuit]) -> Circuit | None:
            if not (folder / name).is_file():
                try:
                    found = make()
                except (NothingFoundError, UnsupportedModelError) as error:
                    why[name.removesuffix(".json")] = str(error)
                    return None
                shape = replace(found.shape, name=self.config.model, weights_sha256=weights_sha256)
                save_circuit(folder / name, replace(found, shape=shape))
            return load_circuit(folder / name)

        circuit = find(CIRCUIT, lambda: self._discover(model, parts)) if own else None
        edges = find(EDGES, lambda: self._discover_edges(model, parts)) if own and self.config.circuit_edges else None
        if not own:
            why["circuit"] = NO_CIRCUIT
            if self.config.circuit_edges:
                why["edges"] = NO_CIRCUIT
        if circuit is not None:
            document["evaluation"] = self._evaluate(model, circuit, parts)
        if base is not None:
            document["base_circuit"] = self._faithfulness(model, base, parts, "base circuit")
            if load_base is not None and circuit is not None:
                document["transfer"] = self._faithfulness(load_base(), circuit, parts, "transfer")
        if edges is not None:
            found = edge_faithfulness(model, edges, self.prompts, resamples=self.config.resamples, parts=parts)
            document["edges"] = {"n": len(edges.edges), "faithfulness": estimate_document(found)}
        write_json(folder / CRITERIA, document)
        parts.remove()

    def _discover(self, model: Network, parts: Parts) -> Circuit:
        return discover(
            model,
            self.prompts,
            threshold=self.config.circuit_threshold,
            seed=self.config.seeds[0],
            parts=parts,
            progress=self.observer.progress,
        )

    def _discover_edges(self, model: Network, parts: Parts) -> Circuit:
        return discover_edges(
            model,
            self.prompts,
            method=METHOD,
            n=min(self.config.circuit_edges, shape_of(model).n_edges),
            parts=parts,
            progress=self.observer.progress,
        )

    def _evaluate(self, model: Network, circuit: Circuit, parts: Parts) -> dict[str, Any]:
        found = evaluate(
            model,
            circuit,
            self.prompts,
            reference=self.reference,
            counterfactual=self.config.counterfactual,
            parts=parts,
            progress=self.observer.progress,
            n_random=self.config.circuit_random,
            resamples=self.config.resamples,
            seed=self.config.seeds[0],
        )
        return found.document()

    def _faithfulness(self, model: Network, circuit: Circuit, parts: Parts, name: str) -> dict[str, Any]:
        """How much of a model's logit difference a circuit that was found elsewhere gives."""

        return inside_document(
            model,
            circuit,
            self.prompts,
            self.reference,
            self.weights,
            n_random=self.config.circuit_random,
            seed=self.config.seeds[0],
            parts=parts,
            name=name,
            progress=self.observer.progress,
        )


def load_circuits(folder: Path) -> Circuits | None:
    """Reads a point's circuits; None where it was not measured.

    Raises:
        StorageError: when a file is damaged.
    """
    if not (folder / CRITERIA).is_file():
        return None
    criteria = load_json(folder / CRITERIA)
    if not isinstance(criteria, dict) or not isinstance(criteria.get("why"), dict):
        raise StorageError(f"{folder / CRITERIA} is damaged; remove it, then run the same command again")
    nodes, edges = (load_circuit(path) if (path := folder / name).is_file() else None for name in (CIRCUIT, EDGES))
    return Circuits(nodes, edges, criteria)


def summary_document(found: Circuits) -> dict[str, Any] | None:
    """The `circuit` object of a stage; None where it has no circuit."""
    if found.nodes is None:
        return None
    judged, sizes = found.criteria["evaluation"], circuit_document(found.nodes)
    rows = {
        "faithfulness": judged["faithfulness"],
        "foil_faithfulness": judged["foil_faithfulness"],
        "completeness_gap": judged["completeness"]["gap"],
        "minimality_min": judged["minimality"]["min"],
    }
    stability = judged["stability"] or {}
    return {
        "n_nodes": sizes["n_nodes"],
        "n_edges": sizes["n_edges"],
        "sparsity": sizes["sparsity"]["nodes"],
        **{name: row["value"] for name, row in rows.items()},
        "random_faithfulness": {name: judged["random"].get(name) for name in ("mean", "max", "n", "unit")},
        "stability": stability.get("nodes_jaccard"),
        "edge_circuit": found.criteria.get("edges"),
        "methodology": judged["methodology"],
        "ci95": {name: row["ci95"] for name, row in rows.items()},
        "why": {name: row["why"] for name, row in rows.items() if row["value"] is None},
    }


def overlap_document(found: Circuits, base: Circuits) -> dict[str, Any]:
    """Jaccard of a stage's circuits with the base's, with intervals and the base's own noise floor.

    Circuits of resamples share less than those of all prompts do, since each errs on its own: `ci95` is of pairs of
    resamples, and their mean, `resampled`, is what to hold against the floor.
    """
    document: dict[str, Any] = {"ci95": {}, "why": {}, "floor": {}, "resampled": {}}
    for level in ("nodes", "edges"):
        name = f"{level}_jaccard"
        if found.nodes is None or base.nodes is None:
            document[name] = None
            document["why"][name] = _missing(found, base)
            continue
        document[name] = found.nodes.jaccard(base.nodes, level)
        mine, theirs = (each.nodes.provenance.get("stability") for each in (found, base) if each.nodes is not None)
        pairs = zip(drawn_sets(mine, level), drawn_sets(theirs, level), strict=False)
        known = [value for one, other in pairs if (value := jaccard(one, other)) is not None]
        if known and found is not base:
            low, high = interval(np.array(known))
            document["ci95"][name] = (float(low), float(high))
            document["resampled"][name] = float(np.mean(known))
        if theirs:
            document["floor"][name] = theirs[name]["mean"]
    edges = None if found.edges is None or base.edges is None else found.edges.jaccard(base.edges, "edges")
    document["edge_circuit_jaccard"] = edges
    if edges is None:
        document["why"]["edge_circuit_jaccard"] = _missing(found, base, "edges")
    return document


def _missing(found: Circuits, base: Circuits, name: str = "circuit") -> str:
    reasons = (each.criteria["why"].get(name) for each in (found, base))
    reason = next((reason for reason in reasons if reason), None)
    return reason if reason == NO_CIRCUIT else "no circuit was found" + (f": {reason}" if reason else "")
