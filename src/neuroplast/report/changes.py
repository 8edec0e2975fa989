"""What the report derives from the saved numbers: heads that changed sides, and the one training axis."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from neuroplast.circuits.circuit import Circuit
from neuroplast.components import Node
from neuroplast.report.results import Estimate, Stage, StudyResults, TrainingRow


@dataclass(frozen=True)
class SignFlip:
    """A head whose effect has opposite signs in base and in a stage, both intervals excluding zero."""

    stage: Stage
    """The stage compared with base."""
    head: str
    """Name of the head, `a23.h3`."""
    base: Estimate
    """Its effect in base."""
    effect: Estimate
    """Its effect in the stage."""

    @property
    def size(self) -> float:
        """How far the effect moved."""
        return abs(self.effect.known - self.base.known)


@dataclass(frozen=True)
class TrainingPath:
    """The logged steps of one stage, placed after those of the stages that it was trained from."""

    stage: Stage
    """The stage."""
    start: int
    """Steps from base to where this fine-tuning began."""
    rows: tuple[TrainingRow, ...]
    """Its training log."""

    @property
    def end(self) -> int:
        """Steps from base to the stage."""
        return self.start + self.stage.step

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        """Steps from base and the logit difference logged there, where it was."""
        return tuple((self.start + row.step, row.logit_diff) for row in self.rows if row.logit_diff is not None)


def head_name(layer: int, head: int) -> str:
    """`a23.h3`."""
    return str(Node("head", layer, head))


def node_frequency(circuit: Circuit) -> Mapping[str, float]:
    """Share of the bootstrap resamples that find each node, by name; empty where that was not measured."""
    stability = circuit.provenance.get("stability")
    found = cast(Mapping[str, Any], stability).get("frequency") if isinstance(stability, Mapping) else None
    shares = cast(Mapping[str, Any], found if isinstance(found, Mapping) else {})
    return {name: share for name, share in shares.items() if isinstance(share, int | float)}


def head_effects(stage: Stage) -> tuple[tuple[str, Estimate], ...]:
    """Every head's name and effect, layer by layer."""
    effects = stage.effects
    return tuple(
        (head_name(layer, head), Estimate(mean, (effects.low[layer][head], effects.high[layer][head])))
        for layer, row in enumerate(effects.mean)
        for head, mean in enumerate(row)
    )


def sign_flips(stage: Stage, base: Stage) -> tuple[SignFlip, ...]:
    """The heads that flipped sign between base and `stage`, the largest move first."""
    pairs = zip(head_effects(base), head_effects(stage), strict=True)
    flips = [
        SignFlip(stage, name, before, after) for (name, before), (_, after) in pairs if _side(before) * _side(after) < 0
    ]
    return tuple(sorted(flips, key=lambda flip: -flip.size))


def _side(effect: Estimate) -> int:
    """Which side of zero the whole interval lies on: −1, 1, or 0 when it holds zero."""
    low, high = effect.interval or (0.0, 0.0)
    return int(low > 0) - int(high < 0)


def largest_effect(results: StudyResults) -> float:
    """The bound of the one colour scale: the largest absolute head effect over all final stages."""
    return max((abs(v) for s in results.stages for row in s.effects.mean for v in row), default=0.0) or 1.0


def training_paths(results: StudyResults) -> tuple[TrainingPath, ...]:
    """Every trained stage on one axis of steps from base, parents before children."""
    stages = {stage.id: stage for stage in results.stages}
    logs = dict(results.training)
    return tuple(
        TrainingPath(stage, _start(stage, stages), logs.get(stage.id, ()))
        for stage in results.stages
        if stage.kind != "base"
    )


def _start(stage: Stage, stages: Mapping[str, Stage]) -> int:
    start, parent = 0, stages.get(stage.parent or "")
    # At most as many generations as stages, so that a cycle of parents ends too.
    for _ in range(len(stages)):
        if parent is None:
            break
        start += parent.step
        parent = stages.get(parent.parent or "")
    return start
