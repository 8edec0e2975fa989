"""What a run was made with: versions, hardware, hashes, and how long each stage took."""

import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neuroplast.errors import InputError, StorageError
from neuroplast.storage import hash_file, load_json, write_json
from neuroplast.study.plan import Stage, StudyConfig

MANIFEST = "manifest.json"


class Manifest:
    """`manifest.json` of a run, written whenever something is noted."""

    def __init__(self, out: Path, document: dict[str, Any]) -> None:
        self._out, self._document = out, document

    def has(self, stage: Stage) -> bool:
        """Whether a stage was noted before."""
        return stage.id in self._document["stages"]

    def note_stage(self, stage: Stage, seconds: float, following_seconds: float) -> None:
        """Notes what a stage left, and adds to the time that it took.

        Args:
            stage: the stage.
            seconds: time spent on it just now.
            following_seconds: of that, the time for measuring on the way of its training.
        """
        folder = self._out / stage.folder
        noted = self._document["stages"].get(stage.id, {"seconds": 0.0, "following_seconds": 0.0})
        files = (*sorted((folder / "checkpoint").glob("*.safetensors")), folder / "effects.safetensors")
        self._document["stages"][stage.id] = {
            "seconds": round(noted["seconds"] + seconds, 1),
            "following_seconds": round(noted["following_seconds"] + following_seconds, 1),
            "files": {file.name: hash_file(file) for file in files},
        }
        prompts = sorted((self._out / "prompts").glob("*.jsonl"))
        self._document["prompts"] = {file.name: hash_file(file) for file in prompts}
        self._write()

    def finish(self) -> None:
        """Notes that everything is done."""
        self._document["finished"] = _now()
        self._write()

    def _write(self) -> None:
        write_json(self._out / MANIFEST, self._document)


def open_manifest(
    config: StudyConfig,
    out: Path,
    model: Mapping[str, Any],
    *,
    source: str,
    command: str,
    names: Mapping[str, int],
    task_sha256: str | None = None,
) -> Manifest:
    """Begins the manifest of a run, or goes on with that of an interrupted one.

    Args:
        config: the study.
        out: the run directory.
        model: the base, as the summary has it.
        source: where its weights came from.
        command: the command line.
        names: how many words can be the answer, by split.
        task_sha256: of the records of a task that is a file.

    Raises:
        InputError: the run was begun with other weights, or another task of that name.
        StorageError: the file is damaged, or cannot be written.
    """
    path = out / MANIFEST
    if path.is_file() and (out / "study.toml").is_file():
        document = load_json(path)
        if not (isinstance(document, dict) and {"model", "stages", "prompts"} <= set(document)):
            raise StorageError(f"{path} is damaged; remove it, then run the same command again")
        if document["model"].get("weights_sha256") != model["weights_sha256"]:
            raise InputError(f"{out} was begun with other weights of {config.model!r}; choose another --out")
        if document.get("task_sha256") != task_sha256:
            raise InputError(
                f"{out} was begun with other records in {config.task!r}: put them back, or choose another --out"
            )
        return Manifest(out, document)
    document = {
        "command": command,
        "started": _now(),
        "finished": None,
        "versions": {name: version(name) for name in ("neuroplast", "torch", "transformers")}
        | {"python": platform.python_version()},
        "hardware": {"platform": platform.platform(), "device": config.device, "cpus": _cpus()},
        "model": {**model, "source": source},
        "config": config.model_dump(),
        "names": dict(names),
        "stages": {},
        "prompts": {},
    } | ({} if task_sha256 is None else {"task_sha256": task_sha256})
    write_json(path, document)
    return Manifest(out, document)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
