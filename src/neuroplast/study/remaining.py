"""What a study has still to make, by the files that are there.

Nothing is loaded or hashed: a file that is damaged counts as there, and is found when the study goes on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neuroplast.plasticity.trajectory import build_schedule
from neuroplast.report.looks import HEADS, PATTERNS
from neuroplast.storage import LOCK
from neuroplast.study.artefacts import ARTEFACTS, CHECKPOINT, MADE_WITH, Artefacts
from neuroplast.study.circuits import CIRCUIT, CRITERIA, EDGES
from neuroplast.study.context import COMPARISON
from neuroplast.study.following import RAW, TRAJECTORY
from neuroplast.study.plan import Stage, StudyConfig
from neuroplast.training.saves import last_save

State = Literal["made", "partly", "nothing"]
EFFECTS, MEASURES = "effects.safetensors", "measures.json"


@dataclass(frozen=True)
class Remaining:
    """What is left to make of a stage."""

    stage: Stage
    """The stage."""
    state: State
    """Whether all, some or none of it is there."""
    checkpoint: bool
    """Whether it has still to be trained, or of base saved."""
    steps: int
    """Optimizer steps that are left."""
    followed: int
    """Steps on the way that have still to be measured."""
    way: bool
    """Whether the means of the way are missing."""
    measured: int
    """Points whose head effects are missing."""
    circuits: int
    """Points whose circuit is to be found."""
    edges: int
    """Points whose edges are to be found."""
    judged: int
    """Points whose circuit is to be judged."""
    inside: int
    """Circuits of other stages that are to be tried in a model."""
    documents: int
    """Points whose numbers are to be summed up."""
    look: bool
    """Whether its heads are to be looked at."""
    compare: bool
    """Whether it is to be compared with base."""


def remaining(config: StudyConfig, stage: Stage, out: Path) -> Remaining:
    """What is left to make of a stage.

    Args:
        config: the study.
        stage: the stage.
        out: the run directory, which need not be there.

    Raises:
        StorageError: the note of the stage's files is damaged.
    """
    there = _There(stage, out)
    follows = stage.kind in config.follow_stages and stage.parent is not None
    compares = stage.kind in config.compare_stages and stage.parent is not None
    own = stage.kind in config.circuit_stages
    of_base = stage.parent is not None and "base" in config.circuit_stages
    transfers = own and of_base and stage.kind in ("recovered", "control")
    points = [point for point in stage.points if not there.has(point.folder, MEASURES)]
    judged = [point for point in points if (own or of_base) and not there.has(point.folder, CRITERIA)]
    look = stage.kind in config.look_stages and not all(there.has(stage.folder, name) for name in (PATTERNS, HEADS))
    compare = compares and not there.has(stage.folder, COMPARISON)
    way = follows and not there.has(stage.folder, TRAJECTORY)
    whole = not (points or look or compare or way)
    trains = not (whole or there.is_trained)
    return Remaining(
        stage=stage,
        state="made" if whole else "partly" if there.is_begun else "nothing",
        checkpoint=trains,
        steps=there.steps_left if trains else 0,
        followed=there.unfollowed(config) if trains and follows else 0,
        way=way,
        measured=sum(not there.has(point.folder, EFFECTS) for point in points),
        circuits=sum(not there.has(point.folder, CIRCUIT) for point in judged) if own else 0,
        edges=sum(not there.has(point.folder, EDGES) for point in judged) if own and config.circuit_edges else 0,
        judged=len(judged) if own else 0,
        inside=len(judged) * (of_base + transfers),
        documents=len(points),
        look=look,
        compare=compare,
    )


class _There:
    """Which files of a stage a study that goes on would take as they are."""

    def __init__(self, stage: Stage, out: Path) -> None:
        self._stage, self._out = stage, out
        self._folder = out / stage.folder
        gone = [Path(name) for name in Artefacts(out, stage.id).files if not (out / name).is_file()]
        gone = [path for path in gone if CHECKPOINT not in path.parts]
        # What is gone takes with it what was made with it.
        self._lost = {*gone, *(path.parent / other for path in gone for other in MADE_WITH.get(path.name, ()))}
        untrained = Path(stage.folder) / CHECKPOINT in self._lost or any(path.parent.name == RAW for path in gone)
        *rungs, end = stage.points
        self.is_trained = (
            not untrained
            and (out / end.folder / CHECKPOINT).is_dir()
            and all((out / rung.folder / CHECKPOINT).is_dir() or self.has(rung.folder, MEASURES) for rung in rungs)
        )
        """Whether the weights are there; those of a rung may be gone once it is measured."""

    @property
    def is_begun(self) -> bool:
        """Whether there is any file."""
        files = (path for path in self._folder.rglob("*") if path.is_file())
        return any(path.name not in (ARTEFACTS, LOCK) for path in files)

    @property
    def steps_left(self) -> int:
        """Steps from the last save on."""
        saved = last_save(self._folder)
        done = int(saved.name.removeprefix("step-")) if saved else 0
        return self._stage.points[-1].step - done

    def unfollowed(self, config: StudyConfig) -> int:
        """Steps on the way that were not measured yet."""
        schedule = build_schedule(self._stage.points[-1].step, config.follow_points)
        return sum(not (self._folder / RAW / f"step-{step:06d}.safetensors").is_file() for step in schedule)

    def has(self, folder: str, name: str) -> bool:
        """Whether a file is there, and what it was made with."""
        path = Path(folder) / name
        return path not in self._lost and (self._out / path).is_file()
