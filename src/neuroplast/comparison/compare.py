"""Comparing two checkpoints of one model: the front door, and the document."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
from torch import Tensor

from neuroplast.behaviour import measure_behaviour
from neuroplast.comparison.behaviour_change import BehaviourChange, behaviour_change, run_drift
from neuroplast.comparison.comparison import TEXT, CompareSettings, Comparison, Profile, unchanged_document
from neuroplast.comparison.ends import Ends
from neuroplast.comparison.expressed import measure_expressed, undo_alone
from neuroplast.comparison.mechanism import Mechanism, build_mechanism, direct_circuit, distance_between
from neuroplast.comparison.spared import TaskChange, TextChange, build_battery
from neuroplast.comparison.stored import measure_stored, split_change
from neuroplast.comparison.text import LENGTH, Text, divergence, log_likelihood, sample_text
from neuroplast.comparison.verdict import UNCHANGED, Verdict, judge
from neuroplast.errors import InputError, unknown_name
from neuroplast.interventions.effects import Effects
from neuroplast.interventions.path_patching import path_patch
from neuroplast.interventions.selection import Group, Selection, select_senders
from neuroplast.localisation import effective_number, gini
from neuroplast.models.between import Between, shared_weights
from neuroplast.models.network import Network
from neuroplast.observer import Told, about
from neuroplast.statistics import bootstrap_weights, estimate, estimate_mean
from neuroplast.storage import Parts
from neuroplast.tasks.prompts import PromptSet

SHAPE_PROMPTS = 16
OWN, SHAPE = "own", "shape"


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


def is_same(start: Network, end: Network) -> bool:
    """Whether two checkpoints of one model have the same weights, to the bit."""
    return len(shared_weights(start, end)) == len(dict(start.module.named_parameters()))


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
    known = _settings(settings)
    weights = bootstrap_weights(len(prompts), known.seed)
    ends = Ends(start, end, prompts, weights, memory, parts or Parts(), progress)
    return _Compared(ends, known).run(circuit, tasks or {})


def _settings(given: Mapping[str, Any]) -> CompareSettings:
    for name in given:
        if name not in CompareSettings.__dataclass_fields__:
            raise unknown_name("setting", name, CompareSettings.__dataclass_fields__)
    return CompareSettings(**given)


def verdict_between(
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
    compared = _Compared(Ends(start, end, prompts, bootstrap_weights(len(prompts), known.seed), memory), known)
    return UNCHANGED if is_same(start, end) else judge(*compared.change({}, None)[:2], known.tolerance)


class _Compared:
    """One comparison under way."""

    def __init__(self, ends: Ends, settings: CompareSettings) -> None:
        self.ends, self.settings = ends, settings
        self.between = Between(ends.start, ends.end)

    def run(self, circuit: Selection | None, tasks: Mapping[str, PromptSet]) -> Comparison | None:
        ends, settings = self.ends, self.settings
        if is_same(ends.start, ends.end):
            return None
        text = self._text()
        behaviour, mechanism, effects, drift = self.change(tasks, text)
        chosen = direct_circuit(effects, ends.weights) if circuit is None else self._circuit(circuit)
        expressed = measure_expressed(ends, chosen, n_random=settings.n_random, seed=settings.seed)
        stored = measure_stored(ends, chosen, n_random=settings.n_random, seed=settings.seed)
        return Comparison(
            settings,
            len(ends.prompts),
            chosen,
            judge(behaviour, mechanism, settings.tolerance),
            behaviour,
            mechanism,
            expressed,
            stored,
            tuple(self._profile(twin) for twin in range(min(settings.n_profiles, settings.n_drift))),
            {
                name: TaskChange(*self._task(f"effects {name}", each, drift[f"task {name}"])[:2])
                for name, each in tasks.items()
            },
            None if text is None else self._text_change(text, drift[TEXT]),
        )

    def change(
        self, tasks: Mapping[str, PromptSet], text: Text | None
    ) -> tuple[BehaviourChange, Mechanism, Effects, Mapping[str, np.ndarray]]:
        """The change of the task, the head effects in `start`, and what drift does to everything that is looked at."""
        ends, settings, shape = self.ends, self.settings, self._shape()
        measures: dict[str, Callable[[Network], float]] = {
            f"task {name}": partial(_mean_difference, prompts=each) for name, each in tasks.items()
        }
        measures |= {OWN: partial(_mean_difference, prompts=ends.prompts), SHAPE: shape}
        if text is not None:
            measures[TEXT] = lambda model: float(divergence(model, text).mean())
        told = about(ends.progress, "drift")
        drift = run_drift(self.between, measures, settings.n_drift, settings.seed, parts=ends.parts, progress=told)
        behaviour, mechanism, effects = self._task("effects", ends.prompts, drift[OWN])
        distance = shape(ends.end)
        mechanism = replace(mechanism, distance=distance if isfinite(distance) else None, drift=drift[SHAPE])
        return behaviour, mechanism, effects, drift

    def _circuit(self, circuit: Selection) -> Group:
        senders = select_senders(circuit, self.ends.start, self.ends.prompts)
        found = tuple(node for group in senders for node in group)
        if odd := [node for node in found if node.kind != "head"]:
            raise InputError(f"the circuit of a comparison is made of heads, got {odd[0]}")
        return tuple(dict.fromkeys(found))

    def _task(self, name: str, prompts: PromptSet, drift: np.ndarray) -> tuple[BehaviourChange, Mechanism, Effects]:
        """The change of a task's behaviour and mechanism, and the head effects in `start`."""
        ends, found = self.ends, list[Effects]()
        for which, model in (("before", ends.start), ("after", ends.end)):
            patch = partial(path_patch, model, prompts, senders="heads", memory=ends.memory)
            saved = ends.made(f"{name} {which}", lambda progress, patch=patch: _tensors(patch(progress=progress)))
            senders = select_senders("heads", model, prompts)
            found.append(Effects("path", senders, (), saved["effects"], saved["clean"], saved["counterfactual"]))
        start, end = (measure_behaviour(model, prompts).logit_diff for model in (ends.start, ends.end))
        weights = bootstrap_weights(len(prompts), self.settings.seed)
        behaviour = behaviour_change(start, end, drift, self.settings.seed)
        return behaviour, build_mechanism(found[0], found[1], weights), found[0]

    def _shape(self) -> Callable[[Network], float]:
        """How far a model's mechanism is from that of `start`, on some of the prompts."""
        some = self.ends.prompts[:: max(1, len(self.ends.prompts) // SHAPE_PROMPTS)]
        patch = partial(path_patch, prompts=some, senders="heads", memory=self.ends.memory)
        of_start = patch(self.ends.start)
        return lambda model: distance_between(of_start, patch(model))

    def _text(self) -> Text | None:
        n, seed = self.settings.n_samples, self.settings.seed
        return sample_text(self.ends.start, n, LENGTH, seed) if n else None

    def _text_change(self, text: Text, drift: np.ndarray) -> TextChange:
        weights = bootstrap_weights(len(text.tokens), self.settings.seed)
        mine, theirs = (
            log_likelihood(model, text.tokens).double().numpy() for model in (self.ends.start, self.ends.end)
        )
        return TextChange(
            estimate_mean(weights, divergence(self.ends.end, text).double().numpy()),
            drift,
            estimate(weights, lambda rows: np.exp(-rows @ mine)),
            estimate(weights, lambda rows: np.exp(-rows @ theirs)),
            estimate(weights, lambda rows: np.exp(rows @ (theirs - mine))),
        )

    def _profile(self, twin: int) -> Profile:
        self.between.drift(self.settings.seed, twin)
        ends = replace(self.ends, end=self.between.model)
        split = split_change(ends, f"ledger of twin {twin + 1}")
        heads = undo_alone(ends, f"patching twin {twin + 1}").mean(dim=1).numpy()
        return Profile((gini(heads), effective_number(heads)), (split.gini, split.effective_number), split.of_sizes)


def _mean_difference(model: Network, prompts: PromptSet) -> float:
    return float(measure_behaviour(model, prompts).logit_diff.mean())


def _tensors(found: Effects) -> dict[str, Tensor]:
    return {"effects": found.effects, "clean": found.clean, "counterfactual": found.counterfactual}
