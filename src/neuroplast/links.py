"""Links that lead out of a folder: a stranger's folder may hold them, and what is written there would go elsewhere."""

import os
from collections.abc import Iterable
from pathlib import Path

from neuroplast.errors import InputError


def require_inside(folder: Path, what: str) -> None:
    """Checks that nothing that is written into a folder lands outside of it; the folder itself may be a link.

    Args:
        folder: it need not exist.
        what: what the folder is, for the message.

    Raises:
        InputError: naming the first link in it, or in a folder of it, that leads out.
    """
    within = Path(os.path.realpath(folder))
    for root, folders, files in os.walk(within):
        if found := first_leading_out((Path(root, name) for name in sorted((*folders, *files))), (within,)):
            raise InputError(
                f"{what} {folder} holds the link {found.relative_to(within)}, which leads out of it: nothing is "
                "written through it; remove the link, or choose another folder"
            )


def first_leading_out(paths: Iterable[Path], within: Iterable[Path]) -> Path | None:
    """The first link among some paths whose end lies in none of some folders, which are no links themselves."""
    within = tuple(within)
    for path in paths:
        if path.is_symlink():
            end = Path(os.path.realpath(path))
            if not any(end.is_relative_to(folder) for folder in within):
                return path
    return None
