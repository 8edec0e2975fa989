"""Comparing two checkpoints of one model: the front door, and the document."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuroplast.behaviour import measure_behaviour
from neuroplast.circuits.evaluate import estimate_document
from neuroplast.comparison.behaviour_change import BehaviourChange, behaviour_change, run_drift
from neuroplast.comparison.expressed import Curve, Expressed, measure_expressed, summarise, undo_alone
from neuroplast.comparison.mechanism import Mechanism, build_mechanism, direct_circuit, distance_between
from neuroplast.comparison.spared import TaskChange, TextChange, build_battery
from neuroplast.comparison.stored import Stored, measure_stored, split_change
from neuroplast.comparison.text import LENGTH, SAMPLES, Text, divergence, log_likelihood, sample_text
from neuroplast.comparison.verdict import TOLERANCE, UNCHANGED, Verdict, judge, status_of
from neuroplast.errors import InputError, unknown_name
from neuroplast.interventions.effects import Effects
from neuroplast.interventions.path_patching import path_patch
from neuroplast.interventions.selection import Group, Selection, select_senders
from neuroplast.localisation import MatchedTest, effective_number, gini, is_localised
from neuroplast.models.between import Between
from neuroplast.models.network import Network
from neuroplast.observer import Told, about
from neuroplast.statistics import bootstrap_weights, estimate, estimate_mean
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

SHAPE_PROMPTS = 16
OWN, SHAPE, TEXT = "own", "shape", "text"
NO_TEXT = "no text was sampled"


@dataclass(frozen=True)
class CompareSettings:
    """How two checkpoints are compared."""

    n_drift: int = 19
    """Twins that drift as far in random directions; with fewer than 19 nothing is beyond drift at a level of 0.05."""
    n_profiles: int | None = None
    """Of these, how many are patched and split as well, to see how concentrated drift is; None takes up to 2."""
    n_random: int = 1000
    """Matched random sets of heads."""
    n_samples: int = SAMPLES
    """Samples of text; 0 leaves text out."""
    tolerance: float = TOLERANCE
    """Share of a task, or of a mechanism's likeness, up to which a change does not count."""
    seed: int = 0
    """Seed of everything drawn."""

    def __post_init__(self) -> None:
        if self.n_profiles is None:
            object.__setattr__(self, "n_profiles", min(2, self.n_drift))
        for name in ("n_drift", "n_profiles", "n_random", "n_samples", "seed"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise InputError(f"{name} must be a whole number from 0, got {value!r}")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance must lie between 0 and 1, got {self.tolerance!r}")
        if self.profiles > self.n_drift:
            raise InputError(f"n_profiles is {self.n_profiles}, but only {self.n_drift} twins are made (n_drift)")

    @property
    def profiles(self) -> int:
        """How many twins are patched and split."""
        return self.n_profiles or 0


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


def compare_document(
    start: Network, end: Network, prompts: PromptSet, *, battery: int, task: str, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """The document of `compare` with the battery of other tasks; of the same weights, that nothing changed.

    Args:
        start: the one checkpoint.
        end: the other.
        prompts: prompts of the task.
        battery: prompts of each other task; 0 leaves them out, and text.
        task: the task's name.
        seed: seed of everything drawn.
        options: of `compare`.
    """
    tasks, missing = build_battery(start, battery, seed, task) if battery else ({}, {})
    if not battery:
        options["n_samples"] = 0
    found = compare(start, end, prompts, tasks=tasks, seed=seed, **options)
    if found is None:
        return unchanged_document()
    document = found.document()
    document["spared"] |= {name: {"status": "undefined", "why": why} for name, why in missing.items()}
    return document


def unchanged_document() -> dict[str, Any]:
    """The document of two checkpoints with the same weights."""
    nothing = {"why": UNCHANGED.statement}
    names = ("behaviour", "mechanism", "expressed", "stored")
    return {"verdict": asdict(UNCHANGED)} | dict.fromkeys(names, nothing) | {"spared": {}}


def is_same(start: Network, end: Network) -> bool:
    """Whether two checkpoints have the same weights, to the bit."""
    theirs = dict(end.module.named_parameters())
    return all(torch.equal(weight, theirs[name]) for name, weight in start.module.named_parameters())


def compare(
    start: Network,
    end: Network,
    prompts: PromptSet,
    *,
    circuit: Selection | None = None,
    tasks: Mapping[str, PromptSet] | None = None,
    memory: str | int | None = None,
    parts: Parts | None = None,
    progress: Told | None = None,
    **settings: Any,
) -> Comparison | None:
    """Compares two checkpoints of one model: what changed, where it is expressed and stored, and what was spared.

    Args:
        start: the one checkpoint, such as the base.
        end: the other.
        prompts: clean prompts of the task with their counterfactuals.
        circuit: heads whose share of the change is looked at; None takes those that act on the logits in `start`.
        tasks: prompts of other tasks, to see whether they were spared.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        parts: keeps what is measured, so that an interrupted comparison goes on.
        progress: called with (activity, done, total).
        settings: the fields of `CompareSettings`.

    Returns:
        None where the two have the same weights: nothing changed.

    Raises:
        InputError: when the models are not checkpoints of one, or for a wrong setting or circuit.
    """
    return _Compared(start, end, _settings(settings), memory, parts or Parts(), progress).run(
        prompts, circuit, tasks or {}
    )


def _settings(given: Mapping[str, Any]) -> CompareSettings:
    for name in given:
        if name not in CompareSettings.__dataclass_fields__:
            raise unknown_name("setting", name, CompareSettings.__dataclass_fields__)
    return CompareSettings(**given)


def compare_behaviour(
    start: Network, end: Network, prompts: PromptSet, *, memory: str | int | None = None, **settings: Any
) -> Verdict:
    """The verdict of `compare` alone, many times cheaper: whether a change is amplification, corruption or drift.

    Args:
        start: the one checkpoint, such as the base.
        end: the other.
        prompts: clean prompts of the task with their counterfactuals.
        memory: bound on the process's memory, such as `4GiB`; None takes what is free.
        settings: the fields of `CompareSettings`.

    Raises:
        InputError: when the models are not checkpoints of one.
    """
    known = _settings(settings | {"n_samples": 0})
    compared = _Compared(start, end, known, memory, Parts(), None)
    return UNCHANGED if is_same(start, end) else judge(*compared.change(prompts, {}, None)[:2], known.tolerance)


class _Compared:
    """One comparison under way."""

    def __init__(
        self,
        start: Network,
        end: Network,
        settings: CompareSettings,
        memory: str | int | None,
        parts: Parts,
        progress: Told | None,
    ) -> None:
        self.start, self.end, self.settings = start, end, settings
        self.memory, self.parts, self.progress = memory, parts, progress
        self.between = Between(start, end)

    def run(self, prompts: PromptSet, circuit: Selection | None, tasks: Mapping[str, PromptSet]) -> Comparison | None:
        if is_same(self.start, self.end):
            return None
        settings = self.settings
        weights = bootstrap_weights(len(prompts), settings.seed)
        text = self._text()
        behaviour, mechanism, effects, drift = self.change(prompts, tasks, text)
        chosen = direct_circuit(effects, weights) if circuit is None else self._circuit(circuit, prompts)
        options: dict[str, Any] = {
            "seed": settings.seed,
            "memory": self.memory,
            "parts": self.parts,
            "progress": self.progress,
            "n_random": settings.n_random,
        }
        expressed = measure_expressed(self.start, self.end, prompts, chosen, weights, **options)
        stored = measure_stored(self.start, self.end, prompts, chosen, weights, **options)
        return Comparison(
            settings,
            len(prompts),
            chosen,
            judge(behaviour, mechanism, settings.tolerance),
            behaviour,
            mechanism,
            expressed,
            stored,
            tuple(self._profile(twin, prompts) for twin in range(settings.profiles)),
            {
                name: TaskChange(*self._task(f"effects {name}", each, drift[f"task {name}"])[:2])
                for name, each in tasks.items()
            },
            None if text is None else self._text_change(text, drift[TEXT]),
        )

    def change(
        self, prompts: PromptSet, tasks: Mapping[str, PromptSet], text: Text | None
    ) -> tuple[BehaviourChange, Mechanism, Effects, Mapping[str, np.ndarray]]:
        """The change of the task, the head effects in `start`, and what drift does to everything that is looked at."""
        shape = self._shape(prompts)
        measures: dict[str, Callable[[Network], float]] = {
            f"task {name}": partial(_mean_difference, prompts=each) for name, each in tasks.items()
        }
        measures |= {OWN: partial(_mean_difference, prompts=prompts), SHAPE: shape}
        if text is not None:
            measures[TEXT] = lambda model: float(divergence(model, text).mean())
        told = about(self.progress, "drift")
        drift = run_drift(
            self.between, measures, self.settings.n_drift, self.settings.seed, parts=self.parts, progress=told
        )
        behaviour, mechanism, effects = self._task("effects", prompts, drift[OWN])
        distance = shape(self.end)
        mechanism = replace(mechanism, distance=distance if isfinite(distance) else None, drift=drift[SHAPE])
        return behaviour, mechanism, effects, drift

    def _circuit(self, circuit: Selection, prompts: PromptSet) -> Group:
        found = tuple(node for group in select_senders(circuit, self.start, prompts) for node in group)
        if odd := [node for node in found if node.kind != "head"]:
            raise InputError(f"the circuit of a comparison is made of heads, got {odd[0]}")
        return tuple(dict.fromkeys(found))

    def _task(self, name: str, prompts: PromptSet, drift: np.ndarray) -> tuple[BehaviourChange, Mechanism, Effects]:
        """The change of a task's behaviour and mechanism, and the head effects in `start`."""
        found: list[Effects] = []
        for which, model in (("before", self.start), ("after", self.end)):
            said = f"{name} {which}"
            patch = partial(
                path_patch, model, prompts, senders="heads", memory=self.memory, progress=about(self.progress, said)
            )
            saved = self.parts.made(said, lambda patch=patch: _tensors(patch()))
            senders = select_senders("heads", model, prompts)
            found.append(Effects("path", senders, (), saved["effects"], saved["clean"], saved["counterfactual"]))
        start, end = (measure_behaviour(model, prompts).logit_diff for model in (self.start, self.end))
        weights = bootstrap_weights(len(prompts), self.settings.seed)
        behaviour = behaviour_change(start, end, drift, self.settings.seed)
        return behaviour, build_mechanism(found[0], found[1], weights), found[0]

    def _shape(self, prompts: PromptSet) -> Callable[[Network], float]:
        """How far a model's mechanism is from that of `start`, on some of the prompts."""
        some = prompts[:: max(1, len(prompts) // SHAPE_PROMPTS)]
        of_start = path_patch(self.start, some, senders="heads", memory=self.memory)
        return lambda model: distance_between(of_start, path_patch(model, some, senders="heads", memory=self.memory))

    def _text(self) -> Text | None:
        n, seed = self.settings.n_samples, self.settings.seed
        return sample_text(self.start, n, LENGTH, seed) if n else None

    def _text_change(self, text: Text, drift: np.ndarray) -> TextChange:
        weights = bootstrap_weights(len(text.tokens), self.settings.seed)
        mine, theirs = (log_likelihood(model, text.tokens).double().numpy() for model in (self.start, self.end))
        return TextChange(
            estimate_mean(weights, divergence(self.end, text).double().numpy()),
            drift,
            estimate(weights, lambda rows: np.exp(-rows @ mine)),
            estimate(weights, lambda rows: np.exp(-rows @ theirs)),
            estimate(weights, lambda rows: np.exp(rows @ (theirs - mine))),
        )

    def _profile(self, twin: int, prompts: PromptSet) -> Profile:
        self.between.drift(self.settings.seed, twin)
        model, told = self.between.model, (self.memory, self.progress)
        pair = (self.start, model, prompts, self.parts)
        split = split_change(f"ledger of twin {twin + 1}", *pair, *told)
        undoes = undo_alone(f"patching twin {twin + 1}", *pair, *told)
        heads = undoes.mean(dim=1).numpy()
        return Profile((gini(heads), effective_number(heads)), (split.gini, split.effective_number), split.of_sizes)


def _mean_difference(model: Network, prompts: PromptSet) -> float:
    return float(measure_behaviour(model, prompts).logit_diff.mean())


def _tensors(found: Effects) -> dict[str, Tensor]:
    return {"effects": found.effects, "clean": found.clean, "counterfactual": found.counterfactual}


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
