"""Measuring one stage, and what its numbers mean beside the base, the poison and the control."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.evaluate import estimate_document
from neuroplast.comparison.compare import compare_document
from neuroplast.components import Node
from neuroplast.errors import StorageError, UnsupportedModelError
from neuroplast.interventions.path_patching import path_patch
from neuroplast.interventions.selection import Group
from neuroplast.localisation import MatchedTest, is_localised
from neuroplast.models.network import Network
from neuroplast.observer import Observer
from neuroplast.plasticity.amplification import growth_share, growth_test
from neuroplast.plasticity.restoration import Restoration, Sample, restoration, similarity
from neuroplast.statistics import Estimate, Weights, estimate_mean, interval
from neuroplast.storage import Parts, load_tensors, write_tensors
from neuroplast.study.circuits import NO_CIRCUIT, Circuits, overlap_document
from neuroplast.study.plan import StudyConfig
from neuroplast.tasks.prompts import PromptSet

TOP_HEADS = 10


@dataclass(frozen=True)
class Measured:
    """What `effects.safetensors` holds: everything later numbers are made from, prompt by prompt."""

    effects: np.ndarray
    """Effect of every head on the logit difference, (layer, head, prompt)."""
    logit_diff: np.ndarray
    """Logit difference on the clean prompts, (prompt,)."""
    answer_probability: np.ndarray
    """P(answer), (prompt,)."""
    answer_top1: np.ndarray
    """1 where the answer is the most likely token, (prompt,)."""
    foil_top1: np.ndarray
    """1 where the foil is, (prompt,)."""
    prob_diff: np.ndarray
    """P(answers) - P(foils), (prompt,)."""

    @property
    def sample(self) -> Sample:
        """The two measurements that stages are compared by."""
        return Sample(self.logit_diff, self.effects.reshape(-1, self.effects.shape[-1]))


def run_measurement(
    model: Network,
    prompts: PromptSet,
    path: Path,
    metadata: Mapping[str, str],
    progress: Callable[[int, int], None],
) -> None:
    """Measures a model and writes `effects.safetensors`.

    Args:
        model: the stage's model.
        prompts: the shared prompts.
        path: the file to write.
        metadata: provenance kept in the file.
        progress: called with (steps done, steps in all).
    """
    behaviour = measure_behaviour(model, prompts)
    heads = path_patch(model, prompts, progress=progress)
    tensors = {
        "effects": heads.by_head(),
        "logit_diff": behaviour.logit_diff,
        "counterfactual_logit_diff": heads.counterfactual,
        "answer_probability": behaviour.answer_probability,
        "answer_top1": behaviour.answer_top1.float(),
        "foil_top1": behaviour.foil_top1.float(),
        "prob_diff": behaviour.prob_diff,
    }
    write_tensors(path, tensors, metadata)


def load_measured(path: Path) -> Measured:
    """Reads `effects.safetensors`, in float64.

    Raises:
        StorageError: when the file is damaged, or of a version that measured less.
    """
    tensors = load_tensors(path)
    if absent := set(Measured.__dataclass_fields__) - set(tensors):
        raise StorageError(f"{path} has no {min(absent)}; remove it, then run the same command again")
    return Measured(**{name: tensors[name].double().numpy() for name in Measured.__dataclass_fields__})


def behaviour_document(measured: Measured, groups: Mapping[str, np.ndarray], weights: Weights) -> dict[str, Any]:
    """The `behaviour` object of a stage; every mean has its interval.

    Args:
        measured: the stage.
        groups: rows of each group of prompts, reported apart.
        weights: from `bootstrap_weights`.
    """
    rows = {
        "accuracy": (measured.logit_diff > 0).astype(float),
        "top1": measured.answer_top1,
        "foil_top1": measured.foil_top1,
        "answer_probability": measured.answer_probability,
        "prob_diff": measured.prob_diff,
    }
    estimates = {name: estimate_mean(weights, values) for name, values in rows.items()}
    return {
        "logit_diff": _mean_document(estimate_mean(weights, measured.logit_diff)),
        **{name: estimate.value for name, estimate in estimates.items()},
        "ci95": {name: estimate.ci95 for name, estimate in estimates.items()},
        "by_group": {
            name: {"n_prompts": len(index), "logit_diff": float(measured.logit_diff[index].mean())}
            for name, index in groups.items()
        },
    }


def heads_document(measured: Measured, weights: Weights) -> dict[str, Any]:
    """Mean effect of every head with its interval, and the heads with the largest."""
    mean = measured.effects.mean(axis=2)
    low, high = interval(np.einsum("rp,lhp->rlh", weights, measured.effects))
    order = np.argsort(-np.abs(mean), axis=None, kind="stable")[:TOP_HEADS]
    places = [divmod(int(index), mean.shape[1]) for index in order]
    return {
        "top": [[str(Node("head", layer, head)), float(mean[layer, head])] for layer, head in places],
        "mean": mean.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }


def comparison_document(
    config: StudyConfig,
    base: Network,
    model: Network,
    prompts: PromptSet,
    circuit: Group | None,
    parts: Parts,
    observer: Observer,
) -> dict[str, Any]:
    """Where a stage's change from base is expressed and stored, and what was spared.

    Args:
        config: the study.
        base: the base.
        model: the stage's model.
        prompts: the shared prompts.
        circuit: the heads of the base's circuit; None takes those that act on the logits.
        parts: keeps what is measured.
        observer: is told how it goes.

    Returns:
        The document of `compare`, or the reason why the model's weights cannot be told apart.
    """
    try:
        return compare_document(
            base,
            model,
            prompts,
            battery=config.compare_battery,
            task=config.task,
            circuit=circuit,
            parts=parts,
            progress=observer.progress,
            n_drift=config.compare_drift,
            n_random=config.compare_random,
            seed=config.seeds[0],
        )
    except UnsupportedModelError as error:
        return {"why": str(error)}


def similarity_document(
    measured: Measured, base: Measured, weights: Weights, circuits: Circuits | None, of_base: Circuits | None
) -> dict[str, Any]:
    """The `similarity_to_base` object of a stage.

    Args:
        measured: the stage.
        base: the base.
        weights: from `bootstrap_weights`.
        circuits: the stage's circuits; None where none are looked for.
        of_base: the base's.
    """
    found = similarity(measured.sample, base.sample, weights)
    overlap = _overlap(circuits, of_base)
    return {
        "effects": found.value,
        **{name: value for name, value in overlap.items() if name not in ("ci95", "why")},
        "ci95": {"effects": found.ci95, **overlap["ci95"]},
        "why": overlap["why"] | _why({"effects": found}),
    }


def _overlap(circuits: Circuits | None, of_base: Circuits | None) -> dict[str, Any]:
    if circuits is None or of_base is None:
        names = ("nodes_jaccard", "edges_jaccard")
        return dict.fromkeys(names) | {"ci95": {}, "why": dict.fromkeys(names, NO_CIRCUIT)}
    return overlap_document(circuits, of_base)


def amplification_document(
    measured: Measured, base: Measured, of_base: Circuits | None, config: StudyConfig, weights: Weights
) -> dict[str, Any]:
    """How much of the change of a tuned stage strengthens base's own circuit, against random sets of heads.

    Args:
        measured: the stage.
        base: the base.
        of_base: the base's circuits; None where none were looked for.
        config: the study.
        weights: from `bootstrap_weights`.
    """
    circuit = of_base.nodes if of_base else None
    if circuit is None:
        reason = of_base.criteria["why"].get("circuit") if of_base else None
        why = f"base has no circuit: {reason or 'name base in circuit_stages'}"
        nothing = asdict(MatchedTest(0, why=why))
        return estimate_document(Estimate(None, None, why)) | {"heads": [], "null": nothing, "localised": None}
    heads = list(circuit.acting)
    share = growth_share(base.effects, measured.effects, heads, weights)
    test = growth_test(base.effects, measured.effects, heads, share, config.compare_random, config.seeds[0])
    return {
        **estimate_document(share),
        "heads": list(map(str, heads)),
        "null": asdict(test),
        "localised": is_localised(share, test),
    }


def restoration_document(
    base: Measured,
    poisoned: Measured,
    recovered: Measured,
    control: Measured,
    weights: Weights,
    seed: int,
    circuits: Mapping[str, Circuits | None],
) -> dict[str, Any]:
    """The `restoration` object of a recovered stage, with the same rows measured on the equal-step control.

    Args:
        base: the base; likewise the other three.
        poisoned: the stage that it recovers from.
        recovered: the stage.
        control: the equal-step control.
        weights: from `bootstrap_weights`.
        seed: seed of the null.
        circuits: the circuits of `base`, `recovered` and `control`, where they were looked for.
    """
    rows = _rows(restoration(base.sample, poisoned.sample, recovered.sample, weights, seed))
    against = _rows(restoration(base.sample, poisoned.sample, control.sample, weights, seed))
    mine, theirs = (_circuit_rows(circuits[name], circuits["base"]) for name in ("recovered", "control"))
    floor = _overlap(circuits["recovered"], circuits["base"]).get("floor", {})
    rows, against = rows | mine, against | theirs
    return {
        **{name: row.value for name, row in rows.items()},
        "ci95": {name: row.ci95 for name, row in rows.items()},
        "control": {name: row.value for name, row in against.items()},
        "control_ci95": {name: row.ci95 for name, row in against.items()},
        "floor": {"structure": floor.get("nodes_jaccard"), "structure_edges": floor.get("edges_jaccard")},
        "why": _why(rows),
        "control_why": _why(against),
    }


def _circuit_rows(circuits: Circuits | None, of_base: Circuits | None) -> dict[str, Estimate]:
    """Structure: Jaccard with the base's circuit. Function: the base's circuit in this model. Transfer: the reverse."""
    overlap = _overlap(circuits, of_base)
    rows = {
        row: Estimate(overlap[name], overlap["ci95"].get(name), overlap["why"].get(name))
        for row, name in (("structure", "nodes_jaccard"), ("structure_edges", "edges_jaccard"))
    }
    for row, name in (("function", "base_circuit"), ("transfer", "transfer")):
        measured = None if circuits is None else circuits.criteria.get(name)
        if measured is None:
            rows[row] = Estimate(None, None, _why_missing(circuits))
        else:
            found = measured["faithfulness"]
            low_high = found["ci95"]
            rows[row] = Estimate(found["value"], low_high and (low_high[0], low_high[1]), found.get("why"))
    return rows


def _why_missing(circuits: Circuits | None) -> str:
    return NO_CIRCUIT if circuits is None else circuits.criteria["why"].get("circuit") or "needs both circuits"


def _rows(found: Restoration) -> dict[str, Estimate]:
    return {"behaviour": found.behaviour, "mechanism": found.mechanism, "damage_undone": found.damage_undone}


def _mean_document(found: Estimate) -> dict[str, Any]:
    return {"mean": found.value, "ci95": found.ci95} | ({"why": found.why} if found.why else {})


def _why(rows: Mapping[str, Estimate]) -> dict[str, str]:
    return {name: row.why for name, row in rows.items() if row.why is not None}
