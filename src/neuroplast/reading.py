"""Files are read here, within limits: a regular file, no larger than one of its kind may be, nested no deeper.

Everything that the package reads by itself goes through this module and `storage.py`; `tests/test_architecture.py`
keeps it so. What is wrong with a file is an `OSError` of the disk or a `ValueError` of one line, and whoever asked for
it says what to do.
"""

import json
import math
import re
import stat
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neuroplast.memory import show_size

LARGEST = 512 * 2**20
"""Bytes of the largest file of text, JSON or pictures that is read."""
LARGEST_SETTINGS = 2**18
"""Bytes of the largest file of settings."""
MOST_DIGITS = 300
"""Digits of the largest whole number that is read of a file of ours; a float holds as many."""
MOST_DOTS = 1000
"""Dots in a line of TOML: a key of many parts takes a time that grows with their square."""
DEEPEST = 100
"""Levels of the most deeply nested JSON that is read."""

_HALF_A_PAIR = re.compile(r"\\u[dD][89abcdefABCDEF]")


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """A file's bytes.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is no regular file (a pipe would be waited for), or larger.
    """
    require_size(path, most)
    with path.open("rb") as handle:
        content = handle.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it grew beyond {show_size(most)} while it was read")
    return content


def read_start(path: Path, length: int) -> bytes:
    """The first bytes of a file, however large it is.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is no regular file.
    """
    require_size(path, sys.maxsize)
    with path.open("rb") as handle:
        return handle.read(length)


def require_size(path: Path, most: int) -> None:
    """Checks what a file is before it is opened; folders are left to what opens them.

    Raises:
        OSError: when there is none.
        ValueError: when it is a pipe or a device, or has more bytes than that.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > most:
        raise ValueError(f"it has {show_size(found.st_size)}; {show_size(most)} is the most that is read")


def read_text(path: Path, most: int = LARGEST) -> str:
    """A file's UTF-8 text, without a byte order mark; lines end in a line feed.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is too large, or not UTF-8.
    """
    text = read_bytes(path, most).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_json(path: Path, most: int = LARGEST) -> Any:
    """A JSON document, as `parse_json` takes it.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is too large, or no such document.
    """
    return parse_json(read_text(path, most))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML document.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is too large, or no such document.
    """
    return parse_toml(read_text(path, LARGEST_SETTINGS))


def parse_json(
    text: str, *, strict: bool = True, pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None
) -> Any:
    """What a JSON text says.

    Args:
        text: the text.
        strict: whether NaN, infinity, whole numbers beyond every float and half a surrogate pair are refused, which no
            file of ours has.
        pairs: makes an object of its names and values.

    Raises:
        ValueError: when it is not JSON, or nested too deeply.
    """
    try:
        if strict:
            value = json.loads(
                text, object_pairs_hook=pairs, parse_float=_finite, parse_int=_whole, parse_constant=_finite
            )
        else:
            value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from error
    require_depth(value, DEEPEST)
    if strict and _HALF_A_PAIR.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def require_depth(value: Any, deepest: int) -> None:
    """Checks how deeply a JSON value is nested, in a time that grows with its size alone.

    Raises:
        ValueError: when it is nested more deeply.
    """
    level: list[Any] = [value]
    for _ in range(deepest + 1):
        inner = [each for each in level if isinstance(each, dict | list)]
        if not inner:
            return
        level = [child for each in inner for child in (each.values() if isinstance(each, dict) else each)]
    raise ValueError(f"it is nested more than {deepest} levels deep")


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML text says.

    Raises:
        ValueError: when it is not TOML, nested too deeply, or holds a number that is not finite.
    """
    if any(line.count(".") > MOST_DOTS for line in text.split("\n")):
        raise ValueError(f"a line of it has more than {MOST_DOTS} dots")
    try:
        value = tomllib.loads(text, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from error
    require_depth(value, DEEPEST)
    return value


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:20]}, which is no finite number")
    return value
