"""The way of a mechanism, moment by moment, as the page's timeline moves along it.

A *way* is what became of one model: base, then each step of a training that was measured on the way, or each rung of
the ladder where none was, then the training after it. At each moment: the logit difference, the likeness to base, the
direct effect of every head, and how strong each node of base's circuit is beside base. That is, of a head that acts on
the logits, its own direct effect; of another head with a role, what is lost when all heads of its role are patched at
once. 1 is as in base, 0 is nothing, below 0 it works the other way round; undefined where the interval of base's own
strength includes 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuroplast.circuits.circuit import Circuit
from neuroplast.report import style
from neuroplast.report.measured import load_measured
from neuroplast.report.results import Estimate, Matrix, Stage, StudyResults, numbers
from neuroplast.report.trajectories import FollowedStage, step_file

NOTHING = Estimate(None)


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
    totals: Mapping[str, Estimate]
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
        InputError: when a measurement on the way does not hold what it should.
        StorageError: when one is missing or cannot be read.
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
    start, shape = 0, (results.n_layers, results.n_heads)
    # A way without its first step has no base among its moments, so it is told by its stages.
    whole = all(stage.id in followed for stage in trained) and followed[trained[0].id].points[0].step == 0
    for stage in trained:
        if whole:
            moments += _followed(run, shape, followed[stage.id], start, base if not moments else None)
        else:
            moments += [_measured(point, start) for point in results.points if point.id == stage.id]
        start += stage.step
    if not whole:
        moments.insert(0, _measured(base, 0))
    name = end.poison or end.id.rpartition("/")[2]
    name += " and recovery" if end.kind == "recovered" else ""
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


def _followed(run: Path, shape: tuple[int, int], stage: FollowedStage, start: int, base: Stage | None) -> list[Moment]:
    """The steps of a stage; its step 0 is the end of the stage before, and told only of base."""
    found: list[Moment] = []
    for point in stage.points:
        if point.step == 0 and base is None:
            continue
        (effects,) = load_measured(run / step_file(stage.id, point.step), {"effects": (*shape, None)})
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
                effects=tuple(map(tuple, effects.mean(axis=-1).tolist())),
                totals={role: each["total"] for role, each in point.roles.items() if "total" in each},
            )
        )
    return found


def strengths(way: TimelineWay, circuit: Circuit, base: Stage) -> dict[str, list[float | None]]:
    """By head of base's circuit, its strength at each moment as a share of that in base; None where there is none.

    Args:
        way: the way.
        circuit: base's.
        base: whose intervals say whether there is a strength to hold others against.
    """
    found: dict[str, list[float | None]] = {}
    for node in circuit.heads:
        role = circuit.roles.get(node)
        layer, head = node.layer or 0, node.head or 0
        if node in circuit.acting:
            values: list[float | None] = [moment.effects[layer][head] for moment in way.moments]
            interval = (base.effects.low[layer][head], base.effects.high[layer][head])
        else:
            totals = [moment.totals.get(role.name if role else "", NOTHING) for moment in way.moments]
            values, interval = [total.value for total in totals], totals[0].interval
        start = values[0]
        holds = start is not None and interval is not None and not interval[0] <= 0 <= interval[1]
        found[str(node)] = [value / start if holds and start and value is not None else None for value in values]
    return found


def timeline_data(ways: Sequence[TimelineWay], circuit: Circuit | None, base: Stage) -> dict[str, Any]:
    """What the page's script moves along; effects are whole thousandths of `bound`.

    Args:
        ways: from `build_ways`.
        circuit: base's; None where it has none.
        base: the stage.
    """
    largest = [float(np.abs(np.array(moment.effects)).max()) for way in ways for moment in way.moments]
    bound = max(largest, default=0.0) or 1.0
    return {
        "bound": bound,
        "acting": list(map(str, circuit.acting)) if circuit else [],
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
                        "ld": numbers(moment.logit_diff),
                        "accuracy": moment.accuracy,
                        "similarity": numbers(moment.similarity),
                        "effects": np.rint(np.array(moment.effects) / bound * 1000).astype(int).ravel().tolist(),
                    }
                    for moment in way.moments
                ],
                "strengths": {
                    node: [None if value is None else round(value, 3) for value in values]
                    for node, values in (strengths(way, circuit, base) if circuit else {}).items()
                },
            }
            for way in ways
        ],
    }
