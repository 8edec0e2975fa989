"""One writer a folder: a lock that the system takes back when its process ends, however it ends."""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from neuroplast.errors import InputError, NeuroplastError
from neuroplast.storage import disk_errors, make_folder

LOCK = ".lock"
"""Its file; empty, and left where it is, since removing it would let two in."""


@contextmanager
def writing(folder: Path, wait: float = 0) -> Generator[None]:
    """Holds a folder for this process alone while the block runs.

    Args:
        folder: the folder; made where it is missing, and gone again where the block fails and left nothing.
        wait: seconds to wait for another process to end.

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
