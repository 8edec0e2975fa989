"""The way of a mechanism, moment by moment, as the page's timeline moves along it.

A *way* is what became of one model: base, then each step of a training that was measured on the way, or each rung of
the ladder where none was, then the training after it. At each moment: the logit difference, the likeness to base, the
direct effect of every head, and how strong each node of base's circuit is beside base. That is, of a head that acts on
the logits, its own direct effect; of another head with a role, what is lost when all heads of its role are patched at
once. 1 is as in base, 0 is nothing, below 0 it works the other way round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.circuits.circuit import Circuit
from neuroplast.report import style
from neuroplast.report.results import Estimate, Matrix, Stage, StudyResults
from neuroplast.report.trajectories import FollowedStage, step_file
from neuroplast.storage import load_tensors

STEADY = 0.01
"""Least strength in base, as a share of base's logit difference, that others are held against: less is noise."""


@dataclass(frozen=True)
class Moment:
    """One measured moment of a model."""

    stage: str
    """Id of the stage."""
    kind: str
    """Kind of the stage."""
    step: int
    """Optimizer steps of the stage's training."""
    at: int
    """Steps from base."""
    logit_diff: Estimate
    """Mean logit difference."""
    accuracy: float | None
    """Share of prompts with a positive logit difference."""
    similarity: Estimate
    """Correlation of head effects with base's."""
    effects: Matrix
    """Mean direct effect of every head, [layer][head]."""
    totals: Mapping[str, float]
    """By role, what is lost when all its heads are patched at once; empty where that was not measured."""


@dataclass(frozen=True)
class TimelineWay:
    """One model's way from base."""

    name: str
    """What was done, in words."""
    seed: int
    """The seed of its training."""
    moments: tuple[Moment, ...]
    """Base first."""
    n_prompts: int | None
    """Prompts that every moment was measured on; None where that differs."""


def build_ways(run: Path, results: StudyResults, followed: Mapping[str, FollowedStage]) -> tuple[TimelineWay, ...]:
    """The ways of a run: each poison's damage and recovery first, then clean trainings from base.

    Raises:
        StorageError: when a measurement on the way is missing or damaged.
    """
    stages = {stage.id: stage for stage in results.stages}
    parents = {stage.parent for stage in results.stages}
    ends = [stage for stage in style.reading_order(results) if stage.kind != "base" and stage.id not in parents]
    ends.sort(key=lambda stage: (stage.seed, stage.poison is None))
    ways: list[TimelineWay] = []
    for end in ends:
        line = [end]
        while (parent := stages.get(line[0].parent or "")) and parent not in line:
            line.insert(0, parent)
        if line[0].kind != "base":
            continue
        ways.append(_way(run, results, line, followed))
    return tuple(ways)


def _way(run: Path, results: StudyResults, line: Sequence[Stage], followed: Mapping[str, FollowedStage]) -> TimelineWay:
    base, trained, end = line[0], line[1:], line[-1]
    moments: list[Moment] = []
    start = 0
    whole = all(stage.id in followed for stage in trained)
    for stage in trained:
        if whole:
            moments += _followed(run, followed[stage.id], start, base if not moments else None)
        else:
            moments += [_measured(point, start) for point in results.points if point.id == stage.id]
        start += stage.step
    if not whole:
        moments.insert(0, _measured(base, 0))
    name = " ".join(filter(None, (end.poison, "and recovery"))) if end.poison else end.id.rpartition("/")[2]
    n_prompts = followed[end.id].n_prompts if whole else end.n_prompts
    return TimelineWay(name.replace("_", " "), end.seed, tuple(moments), n_prompts)


def _measured(point: Stage, start: int) -> Moment:
    return Moment(
        stage=point.id,
        kind=point.kind,
        step=point.step,
        at=start + point.step,
        logit_diff=point.behaviour.logit_diff,
        accuracy=point.behaviour.accuracy.value,
        similarity=point.similarity,
        effects=point.effects.mean,
        totals={},
    )


def _followed(run: Path, stage: FollowedStage, start: int, base: Stage | None) -> list[Moment]:
    """The steps of a stage; its step 0 is the end of the stage before, and told only of base."""
    found: list[Moment] = []
    for point in stage.points:
        if point.step == 0 and base is None:
            continue
        effects = load_tensors(run / step_file(stage.id, point.step))["effects"].double().mean(dim=-1)
        is_base = base is not None and point.step == 0
        found.append(
            Moment(
                stage=base.id if base is not None and is_base else stage.id,
                kind="base" if is_base else stage.kind,
                step=point.step,
                at=start + point.step,
                logit_diff=point.logit_diff,
                accuracy=point.accuracy,
                similarity=point.similarity,
                effects=tuple(map(tuple, effects.tolist())),
                totals={
                    role: total.value
                    for role, each in point.roles.items()
                    if (total := each.get("total")) and total.value is not None
                },
            )
        )
    return found


def strengths(way: TimelineWay, circuit: Circuit) -> dict[str, list[float | None]]:
    """By head of base's circuit, its strength at each moment as a share of that in base; None where there is none.

    Args:
        way: the way.
        circuit: base's.
    """
    acting = {edge.source for edge in circuit.edges if edge.destination.kind == "logits"}
    least = STEADY * abs(way.moments[0].logit_diff.known)
    found: dict[str, list[float | None]] = {}
    for node in circuit.heads:
        role = circuit.roles.get(node)
        if node in acting:
            values: list[float | None] = [m.effects[node.layer or 0][node.head or 0] for m in way.moments]
        else:
            values = [m.totals.get(role.name) if role else None for m in way.moments]
        base = values[0]
        steady = base is not None and abs(base) >= least
        found[str(node)] = [value / base if steady and base and value is not None else None for value in values]
    return found


def timeline_data(ways: Sequence[TimelineWay], circuit: Circuit | None) -> dict[str, Any]:
    """What the page's script moves along; effects are whole thousandths of `bound`.

    Args:
        ways: from `build_ways`.
        circuit: base's; None where it has none.
    """
    largest = [float(np.abs(np.array(moment.effects)).max()) for way in ways for moment in way.moments]
    bound = max(largest, default=0.0) or 1.0
    return {
        "bound": bound,
        "ways": [
            {
                "name": way.name,
                "n_prompts": way.n_prompts,
                "moments": [
                    {
                        "stage": moment.stage,
                        "kind": moment.kind,
                        "step": moment.step,
                        "at": moment.at,
                        "ld": _numbers(moment.logit_diff),
                        "accuracy": moment.accuracy,
                        "similarity": _numbers(moment.similarity),
                        "effects": np.rint(np.array(moment.effects) / bound * 1000).astype(int).ravel().tolist(),
                    }
                    for moment in way.moments
                ],
                "strengths": {
                    node: [None if value is None else round(value, 3) for value in values]
                    for node, values in (strengths(way, circuit) if circuit else {}).items()
                },
            }
            for way in ways
        ],
    }


def _numbers(found: Estimate) -> list[float] | None:
    """Value, and the interval where there is one."""
    if found.value is None:
        return None
    return [round(number, 4) for number in (found.value, *(found.interval or ()))]
