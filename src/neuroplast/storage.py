"""Files on disk: everything is written under a temporary name and renamed, so a name means a whole file.

An interrupted write leaves only a `*.partial` sibling, which the next write removes.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from safetensors import SafetensorError

from neuroplast.errors import InputError, StorageError, one_line
from neuroplast.links import require_inside
from neuroplast.reading import parse_json, read_json, read_text, require_size

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"
FORMER = ".former"
LOCK = ".lock"
"""The file by which one process holds a folder; see `neuroplast.locks`."""


@contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Gives a temporary path beside `path`; renames it to `path` when the block ends without an error.

    Raises:
        StorageError: when the disk is full, read-only or unreachable.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # it may be a link, which would be written through
        try:
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Gives an empty temporary folder; renames it to `path`, replacing what was there, when the block ends.

    Raises:
        StorageError: when the disk is full, read-only or unreachable.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        former = path.with_name(path.name + FORMER)
        try:
            yield temporary
            shutil.rmtree(former, ignore_errors=True)
            if path.exists():
                path.rename(former)
            temporary.rename(path)
            shutil.rmtree(former, ignore_errors=True)
        finally:
            if former.exists() and not path.exists():
                former.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents where they are missing.

    Raises:
        StorageError: when it cannot be made.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def is_begun(out: Path, marker: str, what: str, others: Sequence[str] = ()) -> bool:
    """Whether an output folder holds a run already, by its marker file; makes nothing, so a refusal leaves nothing.

    Args:
        out: the folder that a user named.
        marker: name of the file that a run writes first.
        what: what a run is called, such as `study`.
        others: files that may lie there before the marker does.

    Raises:
        InputError: when the folder cannot be made, or holds something else, or a link that leads out of it.
    """
    try:
        require_inside(out, "--out")
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file; expected a new folder or one of the same {what}")
        if (out / marker).is_file():
            return True
        if not nearest_folder(out).is_dir() or (out.is_symlink() and not out.exists()):
            raise InputError(f"--out {out} cannot be made: a file or a broken link stands in its way; choose another")
        ours = {LOCK, *(name + end for name in (marker, *others) for end in ("", PARTIAL))}
        if out.is_dir() and any(entry.name not in ours for entry in out.iterdir()):
            raise InputError(f"{out} is not empty and holds no {what}; choose another --out")
    except OSError as error:
        raise InputError(f"--out cannot be used: {error.strerror}; choose another") from error
    return False


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Says of what the disk refuses inside the block what to do about it.

    Raises:
        StorageError: so it is.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "Free some space" if full else "See to it"
        raise StorageError(
            f"could not write {path}: {reason}; nothing half-written was kept. "
            f"{advice} or choose another --out, then run the same command again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes indented JSON atomically; NaN and infinity are refused (a missing value is null)."""
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def load_json(path: Path) -> Any:
    """Reads a JSON document.

    Raises:
        StorageError: when the file is missing, unreadable or not JSON.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise StorageError(f"could not read {path}: {one_line(error)}") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: Path, *, strict: bool = False) -> Generator[tuple[int, dict[str, Any] | str]]:
    """Gives the number of every line that is not blank with its JSON object, or with what is wrong with it.

    Args:
        path: the file.
        strict: as in `parse_json`.

    Raises:
        StorageError: when the file cannot be read.
    """
    try:
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise StorageError(f"could not read {path}: {one_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, strict=strict)
        except ValueError as error:
            why = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            yield number, f"not JSON ({why}); expected one JSON object a line"
            continue
        yield number, row if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}"


def load_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line; blank lines are skipped.

    Raises:
        StorageError: naming the line that is not a JSON object.
    """
    rows: list[dict[str, Any]] = []
    for number, row in read_jsonl(path, strict=True):
        if isinstance(row, str):
            raise StorageError(f"{path} line {number}: {row}")
        rows.append(row)
    return rows


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically; `metadata`, its provenance, is one JSON text under `neuroplast`.

    One text, because the format keeps several in no fixed order, and equal results shall be equal files.
    """
    from safetensors.torch import save_file  # torch is slow to import and most of this module needs none

    with atomic_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {"neuroplast": json.dumps(dict(metadata))},
        )
        temporary.chmod(mode)  # as readable as every other file, which the library does not leave it


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Reads a safetensors file.

    Raises:
        StorageError: when the file is missing or no safetensors file.
    """
    from safetensors.torch import load_file

    try:
        if not path.is_file():
            raise StorageError(f"{path} is missing; run the same command again")
        require_size(path, psutil.virtual_memory().total)
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(
            f"could not read {path}: {one_line(error)}; remove it, then run the same command again"
        ) from error


@contextmanager
def telling(path: Path) -> Generator[None]:
    """Tells what was read from a result; where its content does not fit what is told, the file is named.

    Raises:
        StorageError: so it is.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise StorageError(
            f"{path} could not be told: {error!r}; remove it, then run the same command again"
        ) from error


class Parts:
    """Measurements that are kept until the whole is done, so that an interrupted run makes each only once."""

    def __init__(self, folder: Path | None = None) -> None:
        """Keeps them in a folder of the same run, or nowhere."""
        self._folder = folder

    def made(self, name: str, make: "Callable[[], dict[str, Tensor]]") -> "dict[str, Tensor]":
        """What `make` gives, from the folder where it is there already.

        Raises:
            StorageError: when the folder cannot be read or written.
        """
        if self._folder is None:
            return make()
        path = self._folder / (re.sub(r"[^a-z0-9+]+", "-", name.lower()).strip("-") + ".safetensors")
        if not path.is_file():
            write_tensors(path, make(), {})
        return load_tensors(path)

    def remove(self) -> None:
        """Forgets them all."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def load_metadata(path: Path) -> dict[str, str]:
    """Reads the provenance that `write_tensors` kept in a safetensors file.

    Raises:
        StorageError: when the file is missing, no safetensors file, or without it.
    """
    from safetensors import safe_open

    try:
        require_size(path, psutil.virtual_memory().total)
        with safe_open(path, "pt") as handle:
            kept = parse_json((handle.metadata() or {})["neuroplast"])
        if not isinstance(kept, dict):
            raise ValueError("its provenance is no JSON object")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StorageError(
            f"could not read {path}: {one_line(error)}; remove it, then run the same command again"
        ) from error
    return {str(name): str(text) for name, text in kept.items()}


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        StorageError: it is no regular file: reading a pipe would not end.
    """
    if not path.is_file():
        raise StorageError(f"could not read {path}: it is no regular file")
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_text(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_state(state: "Mapping[str, Tensor]") -> str:
    """The SHA-256 of a model's weights: names, types, shapes and bytes, in order of name."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
