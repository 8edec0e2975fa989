"""What a run was made with: versions, hardware, hashes, and how long each stage took."""

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neuroplast.errors import InputError, StorageError
from neuroplast.machine import hardware, now
from neuroplast.storage import hash_file, load_json, write_json
from neuroplast.study.artefacts import Artefacts
from neuroplast.study.plan import Stage, StudyConfig

MANIFEST = "manifest.json"


class Manifest:
    """`manifest.json` of a run, written whenever something is noted."""

    def __init__(self, out: Path, document: dict[str, Any]) -> None:
        self._out, self._document = out, document

    @property
    def model(self) -> dict[str, Any]:
        """The base, as the summary has it."""
        return {name: value for name, value in self._document["model"].items() if name != "source"}

    @property
    def task_sha256(self) -> str | None:
        """Of the records of a task that is a file."""
        return self._document.get("task_sha256")

    def gather(self, stages: Iterable[Stage]) -> None:
        """Notes what stages left, and the time that they took.

        Args:
            stages: those that may have been made.
        """
        for stage in stages:
            artefacts = Artefacts(self._out, stage.id)
            if artefacts.files:
                seconds, following = artefacts.seconds
                self._document["stages"][stage.id] = {
                    "seconds": seconds,
                    "following_seconds": following,
                    "weights_sha256": artefacts.files.get(f"{stage.folder}/checkpoint/model.safetensors"),
                    "files": dict(artefacts.files),
                }
        prompts = sorted((self._out / "prompts").glob("*.jsonl"))
        self._document["prompts"] = {file.name: hash_file(file) for file in prompts}
        self._write()

    def finish(self) -> None:
        """Notes that everything is done."""
        self._document["finished"] = now()
        self._write()

    def _write(self) -> None:
        write_json(self._out / MANIFEST, self._document)


def load_manifest(out: Path) -> Manifest:
    """Reads the manifest of a run.

    Raises:
        StorageError: the file is missing or damaged.
    """
    try:
        document = load_json(out / MANIFEST)
    except StorageError:
        document = {}
    fits = isinstance(document, dict) and {"model", "stages", "prompts"} <= set(document)
    if not (fits and all(isinstance(document[name], dict) for name in ("model", "stages"))):
        raise StorageError(f"{out / MANIFEST} is damaged; remove it, then run the same command again")
    return Manifest(out, document)


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
        manifest = load_manifest(out)
        if manifest.model.get("weights_sha256") != model["weights_sha256"]:
            raise InputError(f"{out} was begun with other weights of {config.model!r}; choose another --out")
        if manifest.task_sha256 != task_sha256:
            raise InputError(
                f"{out} was begun with other records in {config.task!r}: put them back, or choose another --out"
            )
        return manifest
    document = {
        "command": command,
        "started": now(),
        "finished": None,
        "versions": {name: version(name) for name in ("neuroplast", "torch", "transformers")}
        | {"python": platform.python_version()},
        "hardware": (found := hardware(config.device)) | {"threads": config.threads or found["cpus"]},
        "model": {**model, "source": source},
        "config": config.model_dump(),
        "names": dict(names),
        "stages": {},
        "prompts": {},
    } | ({} if task_sha256 is None else {"task_sha256": task_sha256})
    write_json(path, document)
    return Manifest(out, document)
