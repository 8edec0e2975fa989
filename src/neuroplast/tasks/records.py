"""The prompt as text: one line of JSONL, whatever the tokenizer.

What a record may be is said once, here. A check is given someone to complain to: building a record raises the first
thing that is wrong with it, and `neuroplast tasks --check` collects them all.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any, cast

from neuroplast.errors import InputError, unknown_name
from neuroplast.storage import read_jsonl, write_jsonl

_MARK = re.compile(r"[^\s,@+<>]+(\+\d+)?")
"""Names of positions that a selection can spell: `s2`, `s1+1`."""

RESERVED = ("each", "other")
"""What a selection says for every named position, and for all that have no name."""

REQUIRED = ("clean", "counterfactual", "answer", "foil")
"""Keys that every record has."""
_TEXTS, _LISTS = ("template", "group", "split"), ("more_answers", "more_foils")
_OPTIONAL: dict[str, Any] = dict.fromkeys(_TEXTS, "") | {"marks": {}} | dict.fromkeys(_LISTS, ())
"""The others, as they are where they are left out."""

Complain = Callable[[str], object]
"""Is told what is wrong, in a sentence: it raises, or takes note and lets the checks go on."""
ComplainOf = Callable[[int, str], object]
"""The same, of a line of a file."""


@dataclass(frozen=True)
class Record:
    """One prompt as text, with its counterfactual and the continuations that are compared."""

    clean: str
    """The prompt up to, and without, its continuation; no trailing space."""
    counterfactual: str
    """The prompt that breaks the task, with as many tokens as `clean`."""
    answer: str
    """The right continuation, with its leading space where the text has one; one token."""
    foil: str
    """The wrong continuation that the answer is compared with; one token."""
    template: str = ""
    """The pattern's name: knockouts average within it."""
    group: str = ""
    """A split that is reported apart, such as the order of names (`ABBA`, `BABA`)."""
    marks: Mapping[str, int] = field(default_factory=dict[str, int])
    """Named positions: the offset, in characters, of a character of the word in `clean`. `end` is implied."""
    more_answers: tuple[str, ...] = ()
    """Other right continuations, where there are several; one token each."""
    more_foils: tuple[str, ...] = ()
    """Other wrong ones."""
    split: str = ""
    """`train` or `eval`, where a file of records says so itself; see `neuroplast.tasks.custom`."""

    def __post_init__(self) -> None:
        _check_values(vars(self), refuse)

    @property
    def answers(self) -> tuple[str, ...]:
        """All right continuations, `answer` first."""
        return (self.answer, *self.more_answers)

    @property
    def foils(self) -> tuple[str, ...]:
        """All wrong ones, `foil` first."""
        return (self.foil, *self.more_foils)

    def row(self) -> dict[str, Any]:
        """The record as a line of JSONL has it: more answers and foils, and a split, only where there are any."""
        return {name: value for name, value in asdict(self).items() if value or name not in (*_LISTS, "split")}


def refuse(problem: str) -> None:
    """Raises what is wrong.

    Raises:
        InputError: always.
    """
    raise InputError(problem)


def _check_values(values: Mapping[str, Any], complain: Complain) -> None:
    """Tells everything that is wrong with the values of a record, whose types are right."""
    clean, marks = values["clean"], values["marks"]
    for name in REQUIRED:
        if not values[name].strip():
            complain(f"{name!r} is empty: expected a text, got {shown(values[name])}")
    if not all(text.strip() for text in (*values["more_answers"], *values["more_foils"])):
        complain(f"one of the more answers or foils of {shown(clean)} is empty: leave it out")
    answers, foils = ((values[name], *values[f"more_{name}s"]) for name in ("answer", "foil"))
    if both := set(answers) & set(foils):
        complain(f"answer and foil are both {min(both)!r}: nothing to compare; give another foil")
    for name, texts in (("answers", answers), ("foils", foils)):
        text, times = Counter(texts).most_common(1)[0]
        if times > 1:
            complain(f"{text!r} is among the {name} twice: name it once")
    if "end" in marks:
        complain("mark 'end' is the prompt's last token and set by itself: leave it out")
    for name, offset in marks.items():
        if name in RESERVED or name.isdecimal() or not _MARK.fullmatch(name):
            complain(
                f"mark {name[:40]!r} cannot be named in a selection; expected a name such as s2 or s1+1, "
                "not a number, not 'each' or 'other', and no comma, space, @, < or >"
            )
        if not 0 <= offset < len(clean):
            complain(
                f"mark {name[:40]!r} at {shown(offset)} lies outside the prompt {shown(clean)}; "
                f"expected a character from 0 to {len(clean) - 1}"
            )
    if values["split"] not in ("", "train", "eval"):
        complain(f"split {shown(values['split'])} is unknown: expected 'train' or 'eval', or none")


def check_marks(record: Record, names: Iterable[str], complain: Complain) -> None:
    """Tells when a record names other marks than those."""
    if set(record.marks) != set(names):
        complain(
            f"records name different marks: {sorted(names)} and {sorted(record.marks)}; every record needs the same"
        )


def save_records(path: Path, records: Iterable[Record]) -> None:
    """Writes records as JSONL, one a line."""
    write_jsonl(path, (record.row() for record in records))


def load_records(path: Path) -> tuple[Record, ...]:
    """Reads records from JSONL.

    Raises:
        InputError: naming the line that is no record, and the key that is missing, unknown or of the wrong type.
        StorageError: when the file cannot be read.
    """
    return tuple(record for _, record in read_records(path, refuse_line(path)))


def refuse_line(path: Path) -> ComplainOf:
    """Raises what is wrong with a line of a file."""
    return lambda line, problem: refuse(f"{path}:{line}: {problem}")


def read_records(path: Path, complain: ComplainOf) -> list[tuple[int, Record]]:
    """The records of JSONL with the numbers of their lines; everything that is wrong with the others is told.

    Raises:
        StorageError: when the file cannot be read.
    """
    found: list[tuple[int, Record]] = []
    for line, row in read_jsonl(path):
        if isinstance(row, str):
            complain(line, row)
        elif record := _read_record(row, lambda problem, line=line: complain(line, problem)):
            found.append((line, record))
    return found


def _read_record(row: Mapping[str, Any], complain: Complain) -> Record | None:
    """A JSON object as a record; None where it is none, and everything that is wrong with it is told."""
    told: list[str] = []

    def tell(problem: str) -> None:
        told.append(problem)
        complain(problem)

    for name in sorted(set(row) - {*REQUIRED, *_OPTIONAL}):
        tell(str(unknown_name("key", name[:40], (*REQUIRED, *_OPTIONAL))))
    for name in REQUIRED:
        if name not in row:
            tell(f"key {name!r} is missing: every record has {', '.join(REQUIRED)}")
    values = {name: row[name] for name in (*REQUIRED, *_OPTIONAL) if name in row}
    for name, value in list(values.items()):
        if name == "marks":
            wanted, is_so = "map names to character offsets", _are_marks(value)
        elif name in _LISTS:
            wanted, is_so = "be a list of texts", _are_texts(value)
        else:
            wanted, is_so = "be a text", _is_text(value)
        if not is_so:
            tell(f"{name!r} must {wanted}, got {shown(value)}")
            del values[name]
    if set(REQUIRED) <= set(values):  # what else is wrong with it can be told
        values = _OPTIONAL | values
        values |= {"marks": dict(values["marks"]), **{name: tuple(values[name]) for name in _LISTS}}
        _check_values(values, tell)
    return None if told else Record(**values)


def _is_text(value: object) -> bool:
    # JSON can spell half a surrogate pair, which no tokenizer and no file takes.
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, cast(list[object], value)))


def _are_marks(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    marks = cast(dict[object, object], value)
    return all(_is_text(name) and type(offset) is int for name, offset in marks.items())
