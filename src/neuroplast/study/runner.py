"""Runs a study, stage by stage, and continues one that was interrupted.

What exists is held against its hash and not made again, so the same command after a kill does only what is missing,
and the numbers are those of an undisturbed run.
"""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from neuroplast.errors import InputError, StorageError
from neuroplast.locks import writing
from neuroplast.memory import show_size
from neuroplast.models.sources import weights_sha256
from neuroplast.observer import Observer, Silent
from neuroplast.storage import is_begun, make_folder, nearest_folder, write_text
from neuroplast.study.context import Context, load_network
from neuroplast.study.manifest import MANIFEST, load_manifest, open_manifest
from neuroplast.study.outcome import StudyResult, finish_study, grow_report
from neuroplast.study.plan import StudyConfig, load_config
from neuroplast.study.pruning import checkpoints_at_once, prune_checkpoints
from neuroplast.study.stage_runner import StageRunner
from neuroplast.tasks.custom import is_custom
from neuroplast.tasks.records import save_records

SETTINGS = "study.toml"


def run_study(
    config: StudyConfig,
    out: str | Path,
    observer: Observer | None = None,
    command: str = "",
    *,
    growing: bool = False,
) -> StudyResult:
    """Runs, or continues, a study.

    Args:
        config: the settings.
        out: the run directory; new, empty, or of the same study.
        observer: is told how it goes; by default nobody is.
        command: the command line, for the manifest.
        growing: writes the report after every stage, with what there is by then.

    Raises:
        InputError: `out` holds something else or is being written by another process, the model cannot be had, or too
            little disk space is free.
        TrainingDivergedError: a fine-tuning's loss stopped being a number.
        StorageError: the disk refused.
    """
    out, observer = Path(out), observer or Silent()
    claim_folder(config, out)
    with writing(out), threads(config.threads):
        runner = begin_study(config, out, observer, command)
        manifest, stages = load_manifest(out), runner.context.stages
        for index, stage in enumerate(stages):
            observer.stage(stage.id, index, len(stages))
            is_new = runner.run(stage)
            manifest.gather(stages)
            if growing and is_new:
                grow_report(runner, index + 1)
            prune_checkpoints(out, config, stages, [each.id for each in stages[: index + 1]])
        return finish_study(runner)


def begin_study(config: StudyConfig, out: Path, observer: Observer, command: str = "") -> StageRunner:
    """Prepares a run directory that this process holds: settings, manifest, prompts.

    Args:
        config: the settings.
        out: the run directory, which `claim_folder` has looked at.
        observer: is told how it goes.
        command: the command line, for the manifest.

    Raises:
        InputError: the model cannot be had, or is not the one that the run was begun with.
        StorageError: too little space is free, or the disk refused.
    """
    base = load_network(config, config.model, observer)
    context = Context(config, out, observer, base)
    names = {split: len(context.task.names(base.tokenizer, split)) for split in ("all", "train", "eval")}
    observer.say(
        f"{names['all']} words can be the answer and are one token for {config.model}: "
        f"{names['train']} to train on, {names['eval']} to measure on"
    )
    require_space(context, sum(parameter.nbytes for parameter in base.module.parameters()))
    make_folder(out)
    model = {
        "name": config.model,
        "architecture": base.architecture,
        "n_layers": base.n_layers,
        "n_heads": base.n_heads,
        "weights_sha256": weights_sha256(base),
    }
    sha256 = context.task.sha256
    open_manifest(config, out, model, source=base.source, command=command, names=names, task_sha256=sha256)
    if not (out / SETTINGS).exists():
        write_text(out / SETTINGS, config.toml())
    save_records(out / "prompts" / "measured.jsonl", context.prompts.records)
    return StageRunner(context)


def open_study(config: StudyConfig, out: Path, observer: Observer) -> StageRunner:
    """Goes on with a run directory that was begun: its base comes from there, if it still is there.

    Args:
        config: the settings.
        out: the run directory.
        observer: is told how it goes.

    Raises:
        StorageError: base's checkpoint is damaged.
    """
    base = out / "stages/base/checkpoint"
    return StageRunner(
        Context(config, out, observer, load_network(config, base if base.is_dir() else config.model, observer))
    )


@contextmanager
def threads(n: int) -> Generator[None]:
    """Computes with so many processor threads inside the block; 0 leaves it to torch."""
    former = torch.get_num_threads()
    torch.set_num_threads(n or former)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def require_space(context: Context, size: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Args:
        context: of the study.
        size: bytes of the model's weights.

    Raises:
        StorageError: too little space is free.
    """
    out = context.out
    needed = size * checkpoints_at_once(context.config, context.stages, out)
    if (free := shutil.disk_usage(nearest_folder(out)).free) < needed:
        raise StorageError(
            f"no disk space: {out} has {show_size(free)} free, this study needs {show_size(needed)} for its "
            "checkpoints; free some, keep fewer (--set keep=last or none), or choose another --out"
        )


def claim_folder(config: StudyConfig, out: Path) -> None:
    """Refuses a run directory that is not this study's; makes nothing, so that a refusal leaves nothing.

    Raises:
        InputError: so it is.
    """
    if not is_begun(out, SETTINGS, "study", [MANIFEST]):
        return
    settings = out / SETTINGS
    try:
        # A setting that this version has more than the one that began the run was at its default there.
        former = StudyConfig().model_dump() | load_config(settings)
    except InputError as error:
        raise InputError(f"{error}; choose another --out") from error
    ours = config.model_dump()
    for each in (ours, former):
        if is_custom(str(each["task"])):
            each["task"] = Path(each["task"]).name  # wherever it lies: the manifest knows what is in it
    different = sorted(key for key in ours | former if ours.get(key) != former.get(key))
    if different:
        key = different[0]
        raise InputError(
            f"{out} holds a different study: its {key} is {former.get(key)!r}, this one's is {ours.get(key)!r}; "
            "choose another --out, or repeat the command that began it"
        )
