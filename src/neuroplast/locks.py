"""One writer a folder: a lock that the system takes back when its process ends, however it ends; and what it is for."""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from neuroplast.errors import InputError, NeuroplastError
from neuroplast.reading import parse_json
from neuroplast.storage import LOCK, disk_errors, load_json, make_folder, write_json

PATIENCE = 60.0
"""Seconds to wait for a worker that still writes a stage: one whose driver died is stopped by then."""
FOREVER = -1.0
"""For a folder that another process of the same study has work in, however long that takes."""

OTHER_FILES = 512
"""Files that a process has open beside its locks."""


@contextmanager
def writing(folder: Path, wait: float = 0) -> Generator[None]:
    """Holds a folder for this process alone while the block runs.

    The lock's file stays where it is: removing it would let two in.

    Args:
        folder: the folder; made where it is missing, and gone again where the block fails and left nothing.
        wait: seconds to wait for another process to end, or `FOREVER`.

    Raises:
        InputError: when another process holds it, or another part of this one.
        StorageError: when the folder cannot be written to.
    """
    is_new = not folder.exists()
    make_folder(folder)
    lock = FileLock(folder / LOCK)
    with disk_errors(folder), suppress(Timeout):
        lock.acquire(timeout=wait)
    if not lock.is_locked:
        raise InputError(
            f"{folder} is being written by another process: let it end or stop it, then run the same command again"
        )
    try:
        yield
    except NeuroplastError:
        if is_new and {entry.name for entry in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
        raise
    finally:
        lock.release()


def allow_locks(n: int) -> None:
    """Lets this process hold so many folders, each with a file that is open, as far as the system permits."""
    with suppress(ImportError):  # elsewhere than on Unix there is no such limit
        import resource

        few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = n + OTHER_FILES if most == resource.RLIM_INFINITY else min(n + OTHER_FILES, most)
        if few != resource.RLIM_INFINITY and few < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


@contextmanager
def claimed(out: Path, marker: str, what: str, provenance: Mapping[str, Any]) -> Generator[None]:
    """Writes down what a folder is for, or checks that it is the same; `is_begun` has looked at the folder before.

    Where the block finds that it was asked for something that cannot be, and has measured nothing, another may take the
    folder.

    Args:
        out: the folder.
        marker: name of the file that says it.
        what: what a run is called, such as `audit`.
        provenance: settings, weights and prompts, as JSON.

    Raises:
        InputError: when the folder was begun with others, or another process holds it.
        StorageError: when it cannot be written.
    """
    with writing(out):
        if not (out / marker).is_file():
            write_json(out / marker, provenance)
        elif load_json(out / marker) != parse_json(json.dumps(provenance)):
            raise InputError(f"{out} holds another {what} (other settings, prompts or weights); choose another --out")
        try:
            yield
        except InputError:
            _release(out, marker)
            raise


def _release(out: Path, marker: str) -> None:
    """Frees an output folder that a run claimed and has nothing measured in: another may take it."""
    others = [entry for entry in out.iterdir() if entry.name not in (marker, LOCK)]
    if not any(entry.is_file() or any(entry.iterdir()) for entry in others):
        for entry in others:
            entry.rmdir()
        (out / marker).unlink(missing_ok=True)
