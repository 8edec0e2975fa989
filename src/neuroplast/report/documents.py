"""Reading saved JSON with the path to each value kept, so that a broken file is named to the very key."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from neuroplast.errors import InputError
from neuroplast.reading import read_json

REMEDY = "run the same study command again with this --out to finish it"


@dataclass(frozen=True)
class Document:
    """One value inside a JSON file; reading a key gives another one."""

    where: str
    """File and keys down to here, for messages."""
    value: Any
    """The value itself: what `read_json` gives; None also for a key that is absent."""

    def __getitem__(self, key: str) -> "Document":
        """The value under `key`; absent and null read the same.

        Raises:
            InputError: when this is no JSON object.
        """
        where = f"{self.where}: {key[:60] if key.isprintable() else ascii(key[:60])}"
        return Document(where, None if self.value is None else self._typed(dict, "an object").get(key))

    def __bool__(self) -> bool:
        return self.value is not None

    def items(self) -> Iterator[tuple[str, "Document"]]:
        """Keys and values of an object in their order; nothing where the object is absent."""
        keys: list[str] = list(self._typed(dict, "an object")) if self else []
        return ((key, self[key]) for key in keys)

    def elements(self) -> "list[Document]":
        """The elements of a list; none where the list is absent."""
        values: list[Any] = self._typed(list, "a list") if self else []
        return [Document(f"{self.where}[{index}]", value) for index, value in enumerate(values)]

    def text(self) -> str:
        """A string."""
        return self._typed(str, "a string")

    def number(self) -> float:
        """A finite number."""
        value = self._typed((int, float), "a number")
        # Whole numbers may have hundreds of digits: they are compared before anything is made of them.
        if isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise self._unexpected("a finite number")
        return value

    def integer(self) -> int:
        """A whole number."""
        value = self.number()
        if value != int(value):
            raise self._unexpected("a whole number")
        return int(value)

    def number_or_none(self) -> float | None:
        """A finite number, or None for null and for an absent key."""
        return self.number() if self else None

    def text_or_none(self) -> str | None:
        """A string, or None for null and for an absent key."""
        return self.text() if self else None

    def interval(self) -> tuple[float, float] | None:
        """`[low, high]`; None where it, or one of its ends, is null."""
        ends = self.elements()
        if self and len(ends) != 2:
            raise self._unexpected("[low, high]")
        if not all(ends) or not ends:
            return None
        return ends[0].number(), ends[1].number()

    def matrix(self, n_rows: int, n_columns: int) -> tuple[tuple[float, ...], ...]:
        """A list of `n_rows` lists of `n_columns` numbers."""
        rows = tuple(tuple(value.number() for value in row.elements()) for row in self.elements())
        if len(rows) != n_rows or any(len(row) != n_columns for row in rows):
            shape = f"{len(rows)} x {sorted({len(row) for row in rows})}"
            raise InputError(f"{self.where}: expected {n_rows} layers x {n_columns} heads, got {shape}; {REMEDY}")
        return rows

    def _typed(self, kind: type | tuple[type, ...], expected: str) -> Any:
        if not isinstance(self.value, kind):
            raise self._unexpected(expected)
        return self.value

    def _unexpected(self, expected: str) -> InputError:
        got = repr(self.value)
        short = got if len(got) <= 60 else got[:57] + "..."
        return InputError(f"{self.where}: expected {expected}, got {short}; {REMEDY}")


def load_document(run: Path, name: str) -> Document:
    """Reads a JSON object of a run.

    Args:
        run: the run directory.
        name: the file's path inside it.

    Raises:
        InputError: when the file is missing or does not hold a JSON object.
    """
    path = run / name
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        if not run.is_dir():
            raise InputError(f"there is no folder {run}: give the run directory of a study") from error
        raise InputError(f"{run} is no finished run: it has no {name}; {REMEDY}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{run} is no finished run: {name} cannot be read ({error}); {REMEDY}") from error
    if not isinstance(value, dict):
        raise InputError(f"{run} is no finished run: {name} holds no JSON object; {REMEDY}")
    return Document(name, cast(Any, value))
