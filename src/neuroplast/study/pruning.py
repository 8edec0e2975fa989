"""Removes checkpoints that a study's settings do not keep, as soon as nothing is made from them any more.

`keep = "all"` removes none; `"last"` those of a ladder's rungs once they are measured; `"none"` every one: a stage's
last checkpoint goes when it and the stages that start from it are made, base's when all are. What is removed is noted
(`neuroplast.study.artefacts`), so the study does not make it again unless something that was lost is made from it.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from neuroplast.locks import PATIENCE, writing
from neuroplast.study.artefacts import CHECKPOINT, Artefacts
from neuroplast.study.plan import Stage, StudyConfig


def prune_checkpoints(
    out: Path, config: StudyConfig, stages: Sequence[Stage], made: Collection[str], *, spared: Collection[str] = ()
) -> None:
    """Removes what may go.

    Args:
        out: the run directory.
        config: its settings.
        stages: all stages of the study.
        made: ids of those that are made.
        spared: ids of those that other studies have yet to take over.

    Raises:
        StorageError: a stage's note cannot be read or written.
    """
    if config.keep == "all":
        return
    for stage in stages:
        if stage.id not in made or stage.id in spared:
            continue
        users = [other.id for other in stages if stage.id == "base" or other.parent == stage.id]
        ends = config.keep == "none" and set(users) <= set(made)
        points = stage.points if ends else stage.points[:-1]
        there = [name for point in points if (out / (name := f"{point.folder}/{CHECKPOINT}")).is_dir()]
        if there:
            with writing(out / stage.folder, wait=PATIENCE):
                Artefacts(out, stage.id).remove_checkpoints(there)


def checkpoints_at_once(config: StudyConfig, stages: Sequence[Stage], out: Path) -> int:
    """How many checkpoints a run directory still has to take at the same time, in sizes of the model's weights.

    An interrupted training's folder, with weights and two moments, lies beside the next one while that is written. What
    was removed on purpose does not count: hardly ever is it made again.
    """
    points = [point for stage in stages for point in (stage.points if config.keep == "all" else stage.points[-1:])]
    removed = {name for stage in stages for name in Artefacts(out, stage.id).removed}
    names = [f"{point.folder}/{CHECKPOINT}" for point in points]
    missing = sum(name not in removed and not (out / name).is_dir() for name in names)
    rungs = 0 if config.keep == "all" else max(len(stage.points) for stage in stages) - 1
    if config.keep == "none":
        missing = min(missing, 2 + len(config.poisons))
    return missing + rungs + 6 if missing else 0
