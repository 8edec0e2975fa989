"""The way that a stage's training took: measured on the way, and what became of the mechanism.

A followed stage's folder has `trajectory/`, what was measured at each step of the schedule prompt by prompt, and
`trajectory.json`, the means with their intervals. The run's `plasticity.json` puts the two ways of each poison
together: when the mechanism breaks, when it heals, how closely strength goes with behaviour, and whether it comes back
the same way.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.evaluate import estimate_document
from neuroplast.circuits.roles import HINDERING, MOVERS
from neuroplast.components import Node
from neuroplast.localisation import MatchedTest, draw_matched, matched_test
from neuroplast.models.network import Network
from neuroplast.observer import Observer
from neuroplast.plasticity.dynamics import Way, coupling, half_way, half_way_of_mean, hysteresis, random_couplings
from neuroplast.plasticity.restoration import Sample, within_noise
from neuroplast.plasticity.trajectory import (
    QUANTITIES,
    TOTAL,
    Trajectory,
    TrajectoryFolder,
    build_schedule,
    classes_of,
    measure_point,
)
from neuroplast.statistics import (
    Estimate,
    Weights,
    bootstrap_weights,
    estimate,
    estimate_known_mean,
    estimate_mean,
    interval,
    row_correlations,
)
from neuroplast.study.plan import Stage, StudyConfig
from neuroplast.tasks.prompts import PromptSet
from neuroplast.training.finetune import Visit

TRAJECTORY, RAW, PLASTICITY = "trajectory.json", "trajectory", "plasticity.json"
DIRECT = "direct"
NO_CIRCUIT = "base has no circuit with roles, or none was looked for: its measures.json says which"
NO_NULL = "no null: random sets would have to be patched at every step"
IN_CIRCUIT = 0.02
"""Least direct effect of a head that acts on the logits, as a share of base's LD (Wang et al. 2022); at every step the
same, so that a mechanism does not come and go with the LD of its model."""


Statistic = Callable[[Float[np.ndarray, "some prompt"]], NDArray[np.float64]]
"""A number of the prompts, for weights of them a row each."""


class FollowStudy:
    """Follows the stages of a study through their training."""

    def __init__(self, config: StudyConfig, prompts: PromptSet, observer: Observer) -> None:
        self.config, self.observer = config, observer
        n = min(config.follow_prompts, len(prompts))
        drawn = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seeds[0]))[:n]
        self.rows: np.ndarray = drawn.sort().values.numpy()
        """Which of the study's prompts are followed, drawn at random."""
        self.prompts = prompts.pick(torch.from_numpy(self.rows))
        self.weights: Weights = bootstrap_weights(n, config.seeds[0], config.resamples)
        self.seconds = 0.0
        """Time that measuring on the way took, in this process."""

    def schedule(self, stage: Stage) -> tuple[int, ...]:
        """The steps at which a stage is measured."""
        return build_schedule(stage.points[-1].step, self.config.follow_points)

    def visit(self, stage: Stage, folder: Path, circuit: Circuit | None) -> Visit | None:
        """What training is to do on the way; None for a stage that is not followed."""
        if stage.kind not in self.config.follow_stages:
            return None
        steps = self.schedule(stage)
        into = TrajectoryFolder(folder / RAW)

        def measure(model: Network, step: int) -> None:
            self.observer.progress("measuring on the way", steps.index(step) + 1, len(steps))
            started = time.monotonic()
            into.visit(step, lambda: measure_point(model, self.prompts, circuit))
            self.seconds += time.monotonic() - started

        return Visit(frozenset(steps), measure)

    def load(self, stage: Stage, folder: Path) -> Trajectory:
        """A stage's trajectory, read back.

        Raises:
            StorageError: when a step is missing or damaged.
        """
        return TrajectoryFolder(folder / RAW).load(self.schedule(stage))

    def trajectory_document(
        self, found: Trajectory, base_effects: Float[np.ndarray, "layer head prompt"], circuit: Circuit | None
    ) -> dict[str, Any]:
        """The means of a trajectory with their intervals, step by step.

        Args:
            found: the trajectory.
            base_effects: direct effects of base's heads on all prompts of the study.
            circuit: base's.
        """
        classes = {} if circuit is None else classes_of(circuit)
        like_base = self._similarities(found, base_effects)
        points = [
            {
                "step": int(step),
                "logit_diff": estimate_document(estimate_mean(self.weights, found.logit_diff[row])),
                "accuracy": float((found.logit_diff[row] > 0).mean()),
                "similarity_to_base": estimate_document(estimate(self.weights, like_base[row])),
                "circuit_logit_diff": estimate_document(
                    Estimate(None, None, NO_CIRCUIT)
                    if found.circuit is None
                    else estimate_mean(self.weights, found.circuit[row])
                ),
                "circuit_faithfulness": self._share_of_ld(found, found.circuit, row),
                "roles": {name: self._role_document(found, name, heads, row) for name, heads in classes.items()},
            }
            for row, step in enumerate(found.steps)
        ]
        return {
            "steps": found.steps.tolist(),
            "n_prompts": len(self.prompts),
            "prompts": self.rows.tolist(),
            "roles": {name: list(map(str, heads)) for name, heads in classes.items()},
            "points": points,
        } | ({} if classes else {"why": {"roles": NO_CIRCUIT}})

    def plasticity_document(
        self,
        there: Trajectory,
        back: Trajectory,
        base: Float[np.ndarray, "prompt"],
        base_effects: Float[np.ndarray, "layer head prompt"],
        circuit: Circuit | None,
    ) -> dict[str, Any]:
        """How one poison broke the mechanism, and how it healed.

        Args:
            there: the poisoning.
            back: the recovery from it.
            base: base's LD on all prompts of the study.
            base_effects: direct effects of base's heads on them.
            circuit: base's.
        """
        goal = base[self.rows]
        broken, healed = (self._similarities(each, base_effects) for each in (there, back))
        undefined = self._undamaged(base_effects, there)
        times = {
            "break": {
                "logit_diff": half_way_of_mean(there.steps, there.logit_diff, there.logit_diff[-1], self.weights),
                "mechanism": undefined or half_way(there.steps, _each(broken), broken[-1], self.weights),
            },
            "heal": {
                "logit_diff": half_way_of_mean(back.steps, back.logit_diff, goal, self.weights),
                "mechanism": undefined
                or half_way(back.steps, _each(healed), lambda rows: np.ones(len(rows)), self.weights),
            },
        }
        classes = {} if circuit is None else classes_of(circuit)
        return {
            "half_way_steps": {
                way: {name: estimate_document(each) for name, each in mine.items()} for way, mine in times.items()
            },
            "roles": {name: self._coupling_document(there, back, name, heads) for name, heads in classes.items()},
            "heads": self._changes(there, back, float(goal.mean()), circuit),
            "n_prompts": len(self.prompts),
        } | ({} if classes else {"why": {"roles": NO_CIRCUIT}})

    def _similarities(self, found: Trajectory, base_effects: Float[np.ndarray, "layer head prompt"]) -> list[Statistic]:
        """By step, the correlation of mean head effects with base's, for given weights of the prompts."""
        ours = base_effects[..., self.rows].reshape(-1, len(self.rows))

        def similarity(effects: Float[np.ndarray, "head prompt"]) -> Statistic:
            return lambda rows: row_correlations(rows @ effects.T, rows @ ours.T)

        return [similarity(each) for each in found.effects.reshape(len(found.steps), -1, len(self.rows))]

    def _undamaged(self, base_effects: Float[np.ndarray, "layer head prompt"], there: Trajectory) -> Estimate | None:
        """Why the mechanism has no half-way steps: the poison left it as it was, as far as the prompts tell."""
        base, poisoned = (
            Sample(there.logit_diff[row], effects.reshape(-1, len(self.rows)))
            for row, effects in ((0, base_effects[..., self.rows]), (-1, there.effects[-1]))
        )
        why = within_noise(base, poisoned, self.config.resamples, self.config.seeds[0])
        return Estimate(None, None, why) if why else None

    def _share_of_ld(self, found: Trajectory, part: np.ndarray | None, row: int) -> dict[str, Any]:
        """A part of LD ÷ LD, of means; undefined where the interval of LD reaches 0."""
        if part is None:
            return estimate_document(Estimate(None, None, NO_CIRCUIT))
        whole = found.logit_diff[row]
        low, high = interval(self.weights @ whole)
        if low <= 0 <= high:
            return estimate_document(Estimate(None, None, "undefined: the logit difference is within the noise of 0"))
        ratio = (self.weights @ part[row]) / (self.weights @ whole)
        low, high = interval(ratio)
        return estimate_document(Estimate(float(part[row].mean() / whole.mean()), (float(low), float(high))))

    def _role_document(self, found: Trajectory, name: str, heads: Sequence[Node], row: int) -> dict[str, Any]:
        document: dict[str, Any] = {}
        direct = found.direct(heads)
        if name in MOVERS:
            document[DIRECT] = estimate_document(estimate_mean(self.weights, direct[row]))
            document["share"] = self._share_of_ld(found, direct, row)
        for quantity in QUANTITIES:
            values = found.by_role.get((quantity, name))
            if values is not None:
                document[quantity] = estimate_document(estimate_known_mean(self.weights, values[row]))
        return document

    def _coupling_document(
        self, there: Trajectory, back: Trajectory, name: str, heads: Sequence[Node]
    ) -> dict[str, Any]:
        """How the strength of a role goes with LD on both ways, and at the same LD.

        The strength of heads that hinder is what they take from LD, so that it is positive in base too.
        """
        acts = name in MOVERS
        sign = -1.0 if name in HINDERING else 1.0

        def strength(found: Trajectory) -> np.ndarray:
            return sign * (found.direct(heads) if acts else found.by_role[TOTAL, name])

        breaking, healing = (Way(each.steps, each.logit_diff, strength(each)) for each in (there, back))
        found = coupling([breaking, healing], self.weights)
        null = MatchedTest(0, why=NO_NULL)
        if acts and found.value is not None:
            null = self._null(there, back, heads, sign, found.value)
        return {
            "strength": {
                "quantity": DIRECT if acts else TOTAL,
                "sign": sign,
                "base": float(breaking.strength[0].mean()),
            },
            "coupling": estimate_document(found),
            "coupling_null": asdict(null),
            "coupling_breaking": estimate_document(coupling([breaking], self.weights)),
            "coupling_healing": estimate_document(coupling([healing], self.weights)),
            "hysteresis": estimate_document(hysteresis(breaking, healing, self.weights)),
        }

    def _null(
        self, there: Trajectory, back: Trajectory, heads: Sequence[Node], sign: float, value: float
    ) -> MatchedTest:
        """The coupling of random sets of as many heads in the same layers."""
        n_heads = there.effects.shape[2]
        drawn = draw_matched(heads, n_heads, self.config.follow_random, self.config.seeds[0])
        if not drawn:
            return matched_test(value, np.empty(0))
        strengths = np.stack([np.concatenate([sign * way.direct(each) for way in (there, back)]) for each in drawn])
        return matched_test(value, random_couplings(np.concatenate([there.logit_diff, back.logit_diff]), strengths))

    def _changes(
        self, there: Trajectory, back: Trajectory, logit_diff: float, circuit: Circuit | None
    ) -> list[dict[str, Any]]:
        """The heads whose direct effect came, went or turned round, with the steps after which it did."""
        known = {} if circuit is None else circuit.roles
        roles = {node.at(None): role.name for node, role in known.items() if node.position in ("end", None)}
        bound = IN_CIRCUIT * abs(logit_diff)
        states: list[tuple[str, int, np.ndarray, np.ndarray]] = []
        for way, found in (("breaking", there), ("healing", back)):
            for row, step in enumerate(found.steps):
                if way == "breaking" or row:  # a recovery begins where the poisoning ended
                    effects = found.effects[row].reshape(-1, len(self.rows))
                    low, high = interval(self.weights @ effects.T)
                    mean = effects.mean(axis=1)
                    state = np.sign(mean) * ((np.abs(mean) >= bound) & ((low > 0) | (high < 0)))
                    states.append((way, int(step), state, mean))
        sides = np.stack([state for _, _, state, _ in states])
        n_heads = there.effects.shape[2]
        words = {-1: "helps", 0: "out", 1: "hinders"}
        end_there = len(there.steps) - 1
        changed: list[dict[str, Any]] = []
        for index in np.flatnonzero((sides != sides[0]).any(axis=0)):
            layer, place = divmod(int(index), n_heads)
            head = Node("head", layer, place)
            mine = sides[:, index]
            changed.append(
                {
                    "head": str(head),
                    "role": roles.get(head),
                    "base": words[int(mine[0])],
                    "poisoned": words[int(mine[end_there])],
                    "recovered": words[int(mine[-1])],
                    "effects": [float(states[row][3][index]) for row in (0, end_there, -1)],
                    "changes": [
                        {"way": states[row][0], "step": states[row][1], "to": words[int(mine[row])]}
                        for row in np.flatnonzero(np.diff(mine)) + 1
                    ],
                }
            )
        return sorted(changed, key=lambda each: -max(map(abs, each["effects"])))


def _each(statistics: Sequence[Statistic]) -> Callable[[Float[np.ndarray, "some prompt"]], NDArray[np.float64]]:
    """Several statistics of the same prompts, a column each."""
    return lambda rows: np.stack([each(rows) for each in statistics], axis=1)
