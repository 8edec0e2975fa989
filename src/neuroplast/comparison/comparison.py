"""A comparison of two checkpoints, and its document."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neuroplast.circuits.evaluate import estimate_document
from neuroplast.comparison.behaviour_change import BehaviourChange
from neuroplast.comparison.ends import Curve
from neuroplast.comparison.expressed import Expressed, summarise
from neuroplast.comparison.mechanism import Mechanism
from neuroplast.comparison.spared import TaskChange, TextChange
from neuroplast.comparison.stored import Stored
from neuroplast.comparison.text import SAMPLES
from neuroplast.comparison.verdict import TOLERANCE, UNCHANGED, Verdict, status_of
from neuroplast.errors import InputError
from neuroplast.interventions.selection import Group
from neuroplast.localisation import MatchedTest, is_localised
from neuroplast.statistics import bootstrap_weights

TEXT = "text"
NO_TEXT = "no text was sampled"


@dataclass(frozen=True)
class CompareSettings:
    """How two checkpoints are compared."""

    n_drift: int = 19
    """Twins that drift as far in random directions; with fewer than 19 nothing is beyond drift at a level of 0.05."""
    n_profiles: int = 2
    """Of these, how many at most are patched and split as well, to see how concentrated drift is."""
    n_random: int = 1000
    """Matched random sets of heads."""
    n_samples: int = SAMPLES
    """Samples of text; 0 leaves text out."""
    tolerance: float = TOLERANCE
    """Share of a task, or of a mechanism's likeness, up to which a change does not count."""
    seed: int = 0
    """Seed of everything drawn."""

    def __post_init__(self) -> None:
        for name in ("n_drift", "n_profiles", "n_random", "n_samples", "seed"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise InputError(f"{name} must be a whole number from 0, got {value!r}")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance must lie between 0 and 1, got {self.tolerance!r}")


@dataclass(frozen=True)
class Profile:
    """How concentrated the change of a twin is that only drifted."""

    expressed: tuple[float | None, float | None]
    """Gini coefficient and effective number of what its heads undo."""
    stored: tuple[float | None, float | None]
    """The same of what its parts store."""
    sizes: Mapping[str, float | None]
    """By group, its share of the summed sizes of what parts store."""


@dataclass(frozen=True)
class Comparison:
    """What changed between two checkpoints."""

    settings: CompareSettings
    """How it was measured."""
    n_prompts: int
    """Prompts that it was measured on."""
    circuit: Group
    """The heads whose share is looked at."""
    verdict: Verdict
    """What the change is consistent with."""
    behaviour: BehaviourChange
    """The task's logit difference."""
    mechanism: Mechanism
    """The effects of all heads on the logits."""
    expressed: Expressed
    """Where the change shows in activations."""
    stored: Stored
    """Where it lies in the weights."""
    profiles: tuple[Profile, ...]
    """Twins, for the null of concentration."""
    tasks: Mapping[str, TaskChange]
    """Other tasks."""
    text: TextChange | None
    """Text that the first checkpoint wrote."""

    def document(self) -> dict[str, Any]:
        """Everything as JSON has it; a value that could not be computed is null beside its reason."""
        return {
            "verdict": asdict(self.verdict),
            "settings": asdict(self.settings),
            "n_prompts": self.n_prompts,
            "circuit": list(map(str, self.circuit)),
            "behaviour": {"status": status_of(self.behaviour.kept, self.settings.tolerance)}
            | _behaviour_document(self.behaviour),
            "mechanism": _mechanism_document(self.mechanism),
            "maps": self._maps(),
            "expressed": self._expressed_document(),
            "stored": self._stored_document(),
            "spared": {
                **{name: _task_document(each, self.settings.tolerance) for name, each in self.tasks.items()},
                TEXT: {"status": "undefined", "why": NO_TEXT}
                if self.text is None
                else _text_document(self.text, self.settings.tolerance),
            },
        }

    def _maps(self) -> dict[str, list[list[float]]]:
        """Means by layer and head: effects before and after, what each head undoes, and what it stores, in logits."""
        by_head = self.stored.split.ledger.by_head().mean(dim=2).double().numpy()
        grids = {
            "effects_start": self.mechanism.start.effects.mean(axis=1),
            "effects_end": self.mechanism.end.effects.mean(axis=1),
            "undoes": self.expressed.undoes[self.expressed.heads].mean(dim=1).double().numpy(),
            "stored": by_head,
        }
        return {name: np.reshape(grid, by_head.shape).tolist() for name, grid in grids.items()}

    def _expressed_document(self) -> dict[str, Any]:
        found = self.expressed
        weights = bootstrap_weights(self.n_prompts, self.settings.seed)
        rows = summarise(found, weights)
        order = found.undoes.mean(dim=1).abs().argsort(descending=True, stable=True).tolist()
        names = [str(found.parts[row]) for row in order]
        return {
            "circuit": {
                "undone": estimate_document(found.undone),
                "brought": estimate_document(found.brought),
                "null": _test_document(found.test),
                "localised": is_localised(found.undone, found.test),
            },
            "all_heads": estimate_document(found.all_heads),
            "concentration": {
                "gini": found.gini,
                "effective_number": found.effective_number,
                "n_parts": len(found.heads),
                "null": {
                    "gini": [each.expressed[0] for each in self.profiles],
                    "effective_number": [each.expressed[1] for each in self.profiles],
                },
            },
            "curves": [_curve_document(each) for each in found.curves],
            "parts": [
                {"name": name, "undoes": estimate_document(rows[name][0]), "brings": estimate_document(rows[name][1])}
                for name in names
            ],
        }

    def _stored_document(self) -> dict[str, Any]:
        found = self.stored
        order = found.split.by_part.mean(dim=1).abs().argsort(descending=True, stable=True).tolist()
        names = list(found.split.members)
        return {
            "ledger": {
                "change": float(found.split.ledger.change.mean()),
                "sum": float(found.split.ledger.shares.sum(dim=0).mean()),
                "error": found.split.ledger.error,
                "points": found.split.ledger.points,
            },
            "groups": {
                name: {
                    "share": estimate_document(share),
                    "null": {"share_of_squared_change": found.of_squares[name]},
                }
                for name, share in found.groups.items()
            },
            "sizes": {
                name: {"share": share, "null": [each.sizes[name] for each in self.profiles]}
                for name, share in found.split.of_sizes.items()
            },
            "circuit": {
                "share": estimate_document(found.circuit),
                "null": _test_document(found.test),
                "localised": is_localised(found.circuit, found.test),
            },
            "concentration": {
                "gini": found.split.gini,
                "effective_number": found.split.effective_number,
                "n_parts": len(found.split.members),
                "null": {
                    "gini": [each.stored[0] for each in self.profiles],
                    "effective_number": [each.stored[1] for each in self.profiles],
                },
            },
            "grafts": {name: estimate_document(each) for name, each in found.grafts.items()},
            "curves": [_curve_document(each) for each in found.curves],
            "parts": [{"name": names[row], "share": estimate_document(found.shares[names[row]])} for row in order],
        }


def unchanged_document() -> dict[str, Any]:
    """The document of two checkpoints with the same weights."""
    nothing = {"why": UNCHANGED.statement}
    names = ("behaviour", "mechanism", "expressed", "stored")
    return {"verdict": asdict(UNCHANGED)} | dict.fromkeys(names, nothing) | {"spared": {}}


def _behaviour_document(found: BehaviourChange) -> dict[str, Any]:
    return {
        "logit_diff": {"start": estimate_document(found.start), "end": estimate_document(found.end)},
        "accuracy": {"start": estimate_document(found.start_accuracy), "end": estimate_document(found.end_accuracy)},
        "change": estimate_document(found.change),
        "kept": estimate_document(found.kept),
        "null": {
            "n": len(found.drift),
            "mean": float(found.drift.mean()) if len(found.drift) else None,
            "range": [float(found.drift.min()), float(found.drift.max())] if len(found.drift) else None,
            "p_fall": found.p_fall,
            "p_rise": found.p_rise,
        },
    }


def _mechanism_document(found: Mechanism) -> dict[str, Any]:
    drift = found.drift[np.isfinite(found.drift)]
    return {
        "similarity": estimate_document(found.similarity),
        "distance": found.distance,
        "beyond_drift": found.is_beyond_drift,
        "null": {
            "n": len(found.drift),
            "distance_range": [float(drift.min()), float(drift.max())] if len(drift) else None,
            "p": found.p,
        },
        "gain": estimate_document(found.gain),
        "sign_flips": [
            {"name": flip.name, "start": estimate_document(flip.start), "end": estimate_document(flip.end)}
            for flip in found.flips
        ],
    }


def _task_document(found: TaskChange, tolerance: float) -> dict[str, Any]:
    why = {"why": found.behaviour.kept.why} if found.behaviour.kept.why else {}
    mechanism = _mechanism_document(found.mechanism)
    for name in ("distance", "beyond_drift", "null"):  # the twins' mechanism is that of the audited task only
        del mechanism[name]
    return {
        "status": found.status(tolerance),
        **why,
        **_behaviour_document(found.behaviour),
        "mechanism": mechanism,
    }


def _text_document(found: TextChange, tolerance: float) -> dict[str, Any]:
    return {
        "status": found.status(tolerance),
        "kept": estimate_document(found.kept),
        "kl_divergence": estimate_document(found.divergence),
        "perplexity": {
            "start": estimate_document(found.start_perplexity),
            "end": estimate_document(found.end_perplexity),
        },
        "null": {
            "n": len(found.drift),
            "kl_divergence_range": [float(found.drift.min()), float(found.drift.max())] if len(found.drift) else None,
            "p": found.p,
        },
    }


def _test_document(found: MatchedTest) -> dict[str, Any]:
    return {name: value for name, value in asdict(found).items() if name != "why" or value}


def _curve_document(found: Curve) -> dict[str, Any]:
    return {
        "order": found.order,
        "names": list(found.names),
        "sizes": list(found.sizes),
        "shares": [estimate_document(each) for each in found.shares],
        "area": found.area,
    }
