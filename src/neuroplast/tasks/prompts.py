"""The prompt, before and after a tokenizer has seen it.

A `Record` is text only: it fits any tokenizer and is one line of JSONL. A `PromptSet` is records made into
tensors for one model. Mixed lengths are right-padded; under causal attention what stands after a prompt's
last token changes nothing before it.

A prompt has one right and one wrong continuation, or sets of them, such as all years after another; what is compared
then is in `neuroplast.tasks.metric`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Protocol, TypeGuard, TypeVar, cast

import torch
from jaxtyping import Int
from torch import Tensor

from neuroplast.errors import InputError, unknown_name
from neuroplast.storage import load_jsonl, write_jsonl

T = TypeVar("T")

_MARK = re.compile(r"[^\s,@+<>]+(\+\d+)?")
"""Names of positions that a selection can spell: `s2`, `s1+1`."""

RESERVED = ("each", "other")
"""What a selection says for every named position, and for all that have no name."""

REFERENCE_SEED = 1_000_003
"""Added to the seed of the prompts that are measured, for those that knocked-out heads are averaged over."""

ANCHOR = "to"
"""A text that a continuation is encoded after."""

NO_TOKEN = -1
"""Stands where a prompt has fewer answers or foils than another."""


class HasTokenizer(Protocol):
    """Anything that carries a Hugging Face fast tokenizer, such as `neuroplast.load_model(...)` gives."""

    @property
    def tokenizer(self) -> Any:
        """A fast tokenizer (`PreTrainedTokenizerFast`)."""
        ...


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

    def __post_init__(self) -> None:
        for name in ("clean", "counterfactual", "answer", "foil"):
            if not getattr(self, name).strip():
                raise InputError(f"a record's {name!r} is empty: {self!r}")
        if not all(text.strip() for text in (*self.more_answers, *self.more_foils)):
            raise InputError(f"one of the more answers or foils of {shown(self.clean)} is empty")
        if both := set(self.answers) & set(self.foils):
            raise InputError(f"answer and foil are both {min(both)!r}: nothing to compare")
        for name, texts in (("answers", self.answers), ("foils", self.foils)):
            text, times = Counter(texts).most_common(1)[0]
            if times > 1:
                raise InputError(f"{text!r} is among the {name} twice")
        if "end" in self.marks:
            raise InputError("mark 'end' is the prompt's last token and set by itself: leave it out")
        for name, offset in self.marks.items():
            if name in RESERVED or name.isdecimal() or not _MARK.fullmatch(name):
                raise InputError(
                    f"mark {name[:40]!r} cannot be named in a selection; expected a name such as s2 or s1+1, "
                    "not a number, not 'each' or 'other', and no comma, space, @, < or >"
                )
            if not 0 <= offset < len(self.clean):
                raise InputError(f"mark {name!r} at {shown(offset)} lies outside the prompt {self.clean!r}")

    @property
    def answers(self) -> tuple[str, ...]:
        """All right continuations, `answer` first."""
        return (self.answer, *self.more_answers)

    @property
    def foils(self) -> tuple[str, ...]:
        """All wrong ones, `foil` first."""
        return (self.foil, *self.more_foils)

    def row(self) -> dict[str, Any]:
        """The record as a line of JSONL has it: more answers and foils only where there are any."""
        return {name: value for name, value in asdict(self).items() if value or not name.startswith("more_")}


@dataclass(frozen=True)
class PromptSet:
    """Prompts as tensors for one tokenizer, right-padded to one width."""

    task: str
    """The task's name."""
    records: tuple[Record, ...]
    """The texts, in the same order; empty when built from token ids."""
    clean: Int[Tensor, "prompt pos"]
    """Token ids, beginning with the model's BOS token where it has one."""
    counterfactual: Int[Tensor, "prompt pos"]
    """Token ids of the counterfactuals, aligned with `clean` token by token."""
    answer: Int[Tensor, "prompt"]
    """Token id of the right continuation; of several, the first."""
    foil: Int[Tensor, "prompt"]
    """Token id of the wrong one; of several, the first."""
    positions: Mapping[str, Int[Tensor, "prompt"]]
    """Index of each named position; always has `end`, the last token of the prompt."""
    more_answers: Int[Tensor, "prompt more"] | None = None
    """Token ids of other right continuations, padded with `NO_TOKEN`; None where every prompt has one."""
    more_foils: Int[Tensor, "prompt more"] | None = None
    """Token ids of other wrong ones, likewise."""

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def width(self) -> int:
        """Tokens up to the last END."""
        return int(self.positions["end"].max()) + 1

    @property
    def answers(self) -> Int[Tensor, "prompt choice"]:
        """Token ids of all right continuations, `answer` first, padded with `NO_TOKEN`."""
        return _beside(self.answer, self.more_answers)

    @property
    def foils(self) -> Int[Tensor, "prompt choice"]:
        """Token ids of all wrong ones, `foil` first, padded with `NO_TOKEN`."""
        return _beside(self.foil, self.more_foils)

    def __getitem__(self, rows: slice) -> "PromptSet":
        return self.pick(torch.arange(len(self))[rows])

    def pick(self, rows: Int[Tensor, "row"]) -> "PromptSet":
        """Some of the prompts, in the order of their indices."""
        return PromptSet(
            self.task,
            tuple(self.records[int(row)] for row in rows) if self.records else (),
            self.clean[rows],
            self.counterfactual[rows],
            self.answer[rows],
            self.foil[rows],
            {name: index[rows] for name, index in self.positions.items()},
            None if self.more_answers is None else self.more_answers[rows],
            None if self.more_foils is None else self.more_foils[rows],
        )

    def to(self, device: torch.device) -> "PromptSet":
        """The same on a device."""
        return PromptSet(
            self.task,
            self.records,
            self.clean.to(device),
            self.counterfactual.to(device),
            self.answer.to(device),
            self.foil.to(device),
            {name: index.to(device) for name, index in self.positions.items()},
            None if self.more_answers is None else self.more_answers.to(device),
            None if self.more_foils is None else self.more_foils.to(device),
        )


def build_prompt_set(tokenizer: Any, task: str, records: Sequence[Record]) -> PromptSet:
    """Tokenises records for one model.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        task: the task's name, kept with the prompts.
        records: at least one; every record must name the same marks.

    Raises:
        InputError: no records; a continuation that is not one token, or the same token as another; a counterfactual
            with another number of tokens than its prompt; marks that differ between records.
    """
    if not records:
        raise InputError("0 prompts: a measurement needs at least 1")
    names = set(records[0].marks)
    clean: list[list[int]] = []
    counterfactual: list[list[int]] = []
    positions: dict[str, list[int]] = {name: [] for name in (*records[0].marks, "end")}
    token = cache(partial(single_token, tokenizer))
    choices = [tuple([token(text) for text in texts] for texts in (each.answers, each.foils)) for each in records]
    for record, (answers, foils) in zip(records, choices, strict=True):
        if len({*answers, *foils}) < len(answers) + len(foils):
            raise InputError(f"two of the answers and foils of {shown(record.clean)} are one token for this tokenizer")
    for record in records:
        if set(record.marks) != names:
            raise InputError(f"records name different marks: {sorted(names)} and {sorted(record.marks)}")
        ids, offsets = _encode(tokenizer, record.clean)
        other, _ = _encode(tokenizer, record.counterfactual)
        if len(ids) != len(other):
            raise InputError(
                f"a counterfactual must have as many tokens as its prompt: {shown(record.clean)} has {len(ids)}, "
                f"{shown(record.counterfactual)} has {len(other)}"
            )
        clean.append(ids)
        counterfactual.append(other)
        for name, character in record.marks.items():
            positions[name].append(_token_at(offsets, character, f"mark {name!r} in {record.clean!r}"))
        positions["end"].append(len(ids) - 1)
    return PromptSet(
        task=task,
        records=tuple(records),
        clean=_pad(clean),
        counterfactual=_pad(counterfactual),
        answer=torch.tensor([answers[0] for answers, _ in choices]),
        foil=torch.tensor([foils[0] for _, foils in choices]),
        positions={name: torch.tensor(index) for name, index in positions.items()},
        more_answers=_others([answers for answers, _ in choices]),
        more_foils=_others([foils for _, foils in choices]),
    )


def single_token(tokenizer: Any, text: str) -> int:
    """The id of a text that is exactly one token.

    Raises:
        InputError: when the tokenizer splits the text, or does not know it.
    """
    ids = _continuation(tokenizer, text)
    if len(ids) != 1:
        raise InputError(f"{text!r} is {len(ids)} tokens for this tokenizer; a continuation must be one")
    if ids[0] == tokenizer.unk_token_id:
        raise InputError(f"{text!r} is unknown to this tokenizer; a continuation must be a token of its own")
    return int(ids[0])


def is_single_token(tokenizer: Any, text: str) -> bool:
    """Whether `single_token` gives an id."""
    ids = _continuation(tokenizer, text)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def keep_single_tokens(tokenizer: Any, words: Iterable[str]) -> tuple[str, ...]:
    """The words that are one token with a leading space, in order; words the tokenizer lacks are not."""
    return tuple(word for word in words if is_single_token(tokenizer, f" {word}"))


def require_words(tokenizer: Any, task: str, kind: str, words: Sequence[str], minimum: int) -> tuple[str, ...]:
    """The words that are one token with a leading space, in order.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        task: the task as the message calls it.
        kind: what the words are.
        words: all of them.
        minimum: how many the task needs.

    Raises:
        InputError: when fewer are left.
    """
    kept = keep_single_tokens(tokenizer, words)
    require_enough(task, kind, len(kept), len(words), minimum)
    return kept


def require_enough(task: str, kind: str, n: int, among: int, minimum: int) -> None:
    """Checks that a task has as many words of a kind as it needs.

    Raises:
        InputError: when it has fewer.
    """
    if n < minimum:
        raise InputError(
            f"{n} of {among} {kind} are one token for this tokenizer, and {task} needs at least {minimum}: "
            "choose a model with a larger vocabulary"
        )


def require_request(n: int, counterfactual: str, counterfactuals: Sequence[str]) -> None:
    """Checks what a task is asked for.

    Raises:
        InputError: for fewer than 1 prompt, or a counterfactual that is not among the task's.
    """
    if n < 1:
        raise InputError(f"{n} prompts: a measurement needs at least 1")
    if counterfactual not in counterfactuals:
        raise unknown_name("counterfactual", counterfactual, counterfactuals)


def of_split(items: Sequence[T], split: str) -> tuple[T, ...]:
    """The items of a split: every third is for `eval`, the others for `train`; `all` has all.

    Raises:
        InputError: for another split.
    """
    if split not in ("all", "train", "eval"):
        raise unknown_name("split", split, ("all", "train", "eval"))
    return tuple(item for index, item in enumerate(items) if split == "all" or (index % 3 == 2) == (split == "eval"))


def offset_of(slot: str, pattern: str, words: Mapping[str, str]) -> int:
    """Where the word of a slot begins, in characters, once a pattern's slots are filled; at its first place."""
    return len(pattern.partition(f"{{{slot}}}")[0].format(**words))


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as it continues another: some tokenizers treat the beginning of a text apart."""
    before = tokenizer.encode(ANCHOR, add_special_tokens=False)
    ids = tokenizer.encode(ANCHOR + text, add_special_tokens=False)
    # Where the anchor's last token grew into the text, no token is the continuation's own.
    return list(ids[len(before) :]) if ids[: len(before)] == before else []


def encode_with_bos(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the model's BOS token first where it has one."""
    return _encode(tokenizer, text)[0]


def save_records(path: Path, records: Iterable[Record]) -> None:
    """Writes records as JSONL, one a line."""
    write_jsonl(path, (record.row() for record in records))


def load_records(path: Path) -> tuple[Record, ...]:
    """Reads records from JSONL.

    Raises:
        InputError: naming the line and the key that is missing, unknown or of the wrong type.
        StorageError: when the file cannot be read.
    """
    records: list[Record] = []
    for number, row in enumerate(load_jsonl(path), start=1):
        where = f"{path} record {number}"
        fields = Record.__dataclass_fields__
        if unknown := sorted(set(row) - set(fields)):
            raise InputError(f"{where}: unknown key {unknown[0]!r}; a record has {', '.join(fields)}")
        texts = {
            "clean": None,
            "counterfactual": None,
            "answer": None,
            "foil": None,
            "template": "",
            "group": "",
        }
        for name, default in texts.items():
            if not _is_text(value := row.get(name, default)):
                raise InputError(f"{where}: {name!r} must be a text, got {shown(value)}")
        if not _are_marks(marks := row.get("marks", {})):
            raise InputError(f"{where}: 'marks' must map names to character offsets, got {shown(marks)}")
        more: dict[str, Any] = {}
        for name in ("more_answers", "more_foils"):
            if not _are_texts(value := row.get(name, [])):
                raise InputError(f"{where}: {name!r} must be a list of texts, got {shown(value)}")
            more[name] = tuple(value)
        try:
            records.append(Record(**{**row, **more}))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return tuple(records)


def _is_text(value: object) -> bool:
    # JSON can spell half a surrogate pair, which no tokenizer and no file takes.
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(map(_is_text, cast(list[object], value)))


def _are_marks(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    marks = cast(dict[object, object], value)
    return all(_is_text(name) and type(offset) is int for name, offset in marks.items())


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    if tokenizer.bos_token_id is None:
        return ids, offsets
    return [int(tokenizer.bos_token_id), *ids], [(0, 0), *offsets]


def _token_at(offsets: Sequence[tuple[int, int]], character: int, what: str) -> int:
    for index, (start, end) in enumerate(offsets):
        if start <= character < end:
            return index
    raise InputError(
        f"{what} at character {character} falls between this tokenizer's tokens; mark a letter, not a space"
    )


def _pad(rows: Sequence[Sequence[int]], filler: int = 0) -> Int[Tensor, "prompt pos"]:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def _others(rows: Sequence[Sequence[int]]) -> Int[Tensor, "prompt more"] | None:
    return _pad([row[1:] for row in rows], NO_TOKEN) if any(len(row) > 1 for row in rows) else None


def _beside(first: Int[Tensor, "prompt"], others: Int[Tensor, "prompt more"] | None) -> Int[Tensor, "prompt choice"]:
    return first[:, None] if others is None else torch.cat([first[:, None], others], dim=1)
