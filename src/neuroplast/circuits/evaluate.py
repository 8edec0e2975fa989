"""Judging a circuit, with everything that its numbers need to be read: the front door and the document."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neuroplast.circuits.circuit import LEVELS, Circuit
from neuroplast.circuits.criteria import PASSES, Criteria, CriteriaSettings, measure_criteria
from neuroplast.circuits.files import require_model
from neuroplast.circuits.random_circuits import crowded_position
from neuroplast.circuits.shape import shape_of
from neuroplast.circuits.stability import known_stability
from neuroplast.errors import unknown_name
from neuroplast.models.network import Network
from neuroplast.observer import Told
from neuroplast.statistics import Estimate
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

FEW = 5
"""Prompts below which a mean by position is hardly one."""


@dataclass(frozen=True)
class Evaluation:
    """A circuit, judged in a model."""

    circuit: Circuit
    """The circuit."""
    model: str
    """The model that it was judged in."""
    criteria: Criteria
    """What was measured."""

    @property
    def methodology(self) -> str:
        """One line that says how the numbers were made."""
        found, settings = self.criteria, self.criteria.settings
        kind = settings.ablation
        source = "" if kind == "zero" else f" of {found.n_reference} counterfactuals ({found.counterfactual or 'own'})"
        if kind == "mean-by-position":
            source += f", {found.smallest_group} or more a mean"
        places = ", ".join(self.circuit.positions) or "all"
        return (
            f"nodes are heads; a knocked-out head gives {kind}{source}; kept at positions: {places}; MLPs stay; "
            f"{found.n_prompts} prompts; ratio of means; intervals: {settings.resamples} bootstrap resamples of prompts"
        )

    @property
    def warnings(self) -> list[str]:
        """What a reader must not overlook."""
        found, said = self.criteria, list[str]()
        value = found.share.value
        if value is not None and value > 1:
            said.append(f"F(C)/F(M) is {value:.2f}, above 1: the circuit leaves out what works against it")
        if found.settings.ablation == "mean-by-position" and (few := found.smallest_group) < FEW:
            said.append(f"a mean by position is over as few as {few} of the reference prompts: give more")
        if (above := int((found.random >= found.level).sum())) > 0:
            said.append(f"{above} of {len(found.random)} random circuits of the same shape do as well or better")
        if failing := [need for need in found.needs if need.score.value is not None and need.score.value < PASSES]:
            said.append(f"{len(failing)} of {len(found.needs)} nodes change F by less than 1 % of F(M), given K")
        return said

    def document(self) -> dict[str, Any]:
        """Everything as JSON has it; a value that could not be computed is null beside its reason."""
        found, circuit = self.criteria, self.circuit
        passing = [need for need in found.needs if need.score.value is not None and need.score.value >= PASSES]
        return {
            "schema": 1,
            "model": self.model,
            "methodology": self.methodology,
            "settings": asdict(found.settings),
            "n_prompts": found.n_prompts,
            "n_reference": found.n_reference,
            "circuit": circuit_document(circuit),
            "F": {name: estimate_document(getattr(found, name)) for name in ("model", "circuit", "nothing")},
            "faithfulness": estimate_document(found.faithfulness),
            "foil_faithfulness": estimate_document(found.foil_faithfulness),
            "difference": estimate_document(found.difference),
            "normalised": estimate_document(found.normalised),
            "mean_of_ratios": estimate_document(found.mean_of_ratios),
            "spread": dict(found.spread),
            "by_group": {
                name: {what: estimate_document(each) for what, each in row.items()}
                for name, row in found.by_group.items()
            },
            "by_ablation": {
                name: {
                    "circuit": estimate_document(found.circuit_by_ablation[name]),
                    "faithfulness": estimate_document(found.by_ablation[name]),
                }
                for name in found.by_ablation
            },
            "random": _random_document(found, circuit),
            "completeness": {
                "gap": estimate_document(found.completeness_gap),
                "mean_random_gap": _mean_random_gap(found),
                "sets": [
                    {
                        "kind": gap.kind,
                        "name": gap.name,
                        "nodes": list(map(str, gap.nodes)),
                        "circuit": estimate_document(gap.circuit),
                        "model": estimate_document(gap.model),
                        "gap": estimate_document(gap.gap),
                    }
                    for gap in found.gaps
                ],
            },
            "minimality": {
                "min": estimate_document(found.minimality_min),
                "threshold": PASSES,
                "passing": len(passing),
                "nodes": [
                    {
                        "node": str(need.node),
                        "role": circuit.roles[need.node].name if need.node in circuit.roles else None,
                        "given": list(map(str, need.given)),
                        "score": estimate_document(need.score),
                        "alone": estimate_document(need.alone),
                    }
                    for need in found.needs
                ],
            },
            "stability": known_stability(circuit.provenance),
            "warnings": self.warnings,
        }


def evaluate(
    model: Network,
    circuit: Circuit,
    prompts: PromptSet,
    *,
    reference: PromptSet | None = None,
    counterfactual: str = "",
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Told | None = None,
    **settings: Any,
) -> Evaluation:
    """Judges a circuit in a model: faithfulness, completeness, minimality, against matched random circuits.

    Args:
        model: the model: the one that it was found in, or another with the same parts.
        circuit: the circuit.
        prompts: clean prompts with their counterfactuals.
        reference: more prompts of the task, whose counterfactuals means are taken over; None takes `prompts`.
        counterfactual: name of the counterfactual, for the methodology.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted measurement goes on.
        progress: called with (activity, done, total).
        settings: the fields of `CriteriaSettings`.

    Raises:
        InputError: when the model has other parts than the circuit's, or for an unknown setting.
    """
    for name in settings:
        if name not in CriteriaSettings.__dataclass_fields__:
            raise unknown_name("setting", name, CriteriaSettings.__dataclass_fields__)
    require_model(circuit, shape_of(model))
    criteria = measure_criteria(
        model,
        circuit,
        prompts,
        reference=reference,
        settings=CriteriaSettings(**settings),
        counterfactual=counterfactual,
        memory=memory,
        parts=parts,
        progress=progress,
    )
    return Evaluation(circuit, model.name, criteria)


def circuit_document(circuit: Circuit) -> dict[str, Any]:
    """Size and sparsity, with their denominators."""
    return {
        "n_heads": len(circuit.members("heads")),
        "n_nodes": len(circuit.heads),
        "n_edges": len(circuit.edges),
        "positions": list(circuit.positions),
        "sparsity": {level: circuit.sparsity(level) for level in LEVELS},
        "of": {level: circuit.universe(level) for level in LEVELS},
    }


def estimate_document(found: Estimate) -> dict[str, Any]:
    """A value with its interval, and the reason where there is none."""
    return {"value": found.value, "ci95": found.ci95} | ({"why": found.why} if found.why else {})


def _random_document(found: Criteria, circuit: Circuit) -> Mapping[str, Any]:
    if found.settings.n_random and (where := crowded_position(circuit)):
        return {"n": 0, "why": f"more than half of the heads at {where} belong to the circuit: too few others are left"}
    if not len(found.random):
        return {"n": 0, "why": "no random circuits were asked for"}
    return {
        "n": len(found.random),
        "mean": float(found.random.mean()),
        "sd": float(found.random.std(ddof=1)) if len(found.random) > 1 else None,
        "max": float(found.random.max()),
        "p95": float(np.quantile(found.random, 0.95)),
        "share_above": found.random_above,
        "unit": "F / F(M)" if found.share.value is not None else "F, in logits",
    }


def _mean_random_gap(found: Criteria) -> float | None:
    gaps = [abs(gap.gap.value) for gap in found.gaps if gap.kind == "random" and gap.gap.value is not None]
    return float(np.mean(gaps)) if gaps else None
