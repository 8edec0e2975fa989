"""Prompts as a tokenizer has them, and the words that it has for them.

A `Record` is text only. A `PromptSet` is records made into tensors for one model. Mixed lengths are right-padded; under
causal attention what stands after a prompt's last token changes nothing before it.

A prompt has one right and one wrong continuation, or sets of them, such as all years after another; what is compared
then is in `neuroplast.tasks.metric`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from reprlib import repr as shown
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from neuroplast.errors import InputError, unknown_name
from neuroplast.tasks.records import Complain, Record, check_marks, refuse

T = TypeVar("T")

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
    names = list(records[0].marks)
    for record in records:
        check_marks(record, names, refuse)
    encode = Encoder(tokenizer)
    rows = [row for record in records if (row := encode(record, refuse))]
    return PromptSet(
        task=task,
        records=tuple(records),
        clean=_pad([row.clean for row in rows]),
        counterfactual=_pad([row.counterfactual for row in rows]),
        answer=torch.tensor([row.answers[0] for row in rows]),
        foil=torch.tensor([row.foils[0] for row in rows]),
        positions={name: torch.tensor([row.positions[name] for row in rows]) for name in (*names, "end")},
        more_answers=_others([row.answers for row in rows]),
        more_foils=_others([row.foils for row in rows]),
    )


@dataclass(frozen=True)
class Encoded:
    """A record for one tokenizer, as token ids."""

    clean: list[int]
    """The prompt."""
    counterfactual: list[int]
    """The counterfactual, as long."""
    answers: list[int]
    """The right continuations."""
    foils: list[int]
    """The wrong ones."""
    positions: Mapping[str, int]
    """Index of each mark, and of `end`."""


class Encoder:
    """Reads records with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Remembers continuations: records share them."""
        self._tokenizer = tokenizer
        self._token = cache(lambda text: _token_or_why(tokenizer, text))

    def __call__(self, record: Record, complain: Complain) -> Encoded | None:
        """A record as token ids; None where it does not fit the tokenizer, and everything that is wrong is told."""
        told: list[str] = []

        def tell(problem: str) -> None:
            told.append(problem)
            complain(problem)

        tokens = {text: self._token(text) for text in (*record.answers, *record.foils)}
        for token in tokens.values():
            if isinstance(token, str):
                tell(token)
        known = {text: token for text, token in tokens.items() if isinstance(token, int)}
        if len(set(known.values())) < len(known):
            tell(f"two of the answers and foils of {shown(record.clean)} are one token for this tokenizer: keep one")
        ids, offsets = _encode(self._tokenizer, record.clean)
        other, _ = _encode(self._tokenizer, record.counterfactual)
        if len(ids) != len(other):
            tell(
                f"a counterfactual must have as many tokens as its prompt: {shown(record.clean)} has {len(ids)}, "
                f"{shown(record.counterfactual)} has {len(other)}; take a word of as many tokens"
            )
        positions = {"end": len(ids) - 1}
        for name, character in record.marks.items():
            if (at := _token_at(offsets, character)) is None:
                tell(
                    f"mark {name!r} in {record.clean!r} at character {character} falls between this tokenizer's "
                    "tokens; mark a letter, not a space"
                )
            else:
                positions[name] = at
        if told:
            return None
        answers, foils = ([known[text] for text in texts] for texts in (record.answers, record.foils))
        return Encoded(ids, other, answers, foils, positions)


def keep_fitting(tokenizer: Any, records: Iterable[Record]) -> tuple[Record, ...]:
    """The records that fit a tokenizer, in order: `build_prompt_set` takes them."""
    encode = Encoder(tokenizer)
    return tuple(record for record in records if encode(record, lambda _: None))


def group_keys(prompts: PromptSet) -> Sequence[tuple[str, str, int]]:
    """The template, the group (such as the order of names) and END of each prompt: what means are taken within."""
    ends = prompts.positions["end"].tolist()
    if not prompts.records:
        return [("", "", end) for end in ends]
    return [(record.template, record.group, end) for record, end in zip(prompts.records, ends, strict=True)]


def single_token(tokenizer: Any, text: str) -> int:
    """The id of a text that is exactly one token.

    Raises:
        InputError: when the tokenizer splits the text, or does not know it.
    """
    token = _token_or_why(tokenizer, text)
    if isinstance(token, str):
        raise InputError(token)
    return token


def is_single_token(tokenizer: Any, text: str) -> bool:
    """Whether `single_token` gives an id."""
    return isinstance(_token_or_why(tokenizer, text), int)


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


def _token_or_why(tokenizer: Any, text: str) -> int | str:
    """The id of a text that is one token, or why it is none."""
    ids = _continuation(tokenizer, text)
    if len(ids) > 1:
        pieces = ", ".join(repr(tokenizer.decode([each])) for each in ids[:8]) + (", …" if len(ids) > 8 else "")
        return f"{shown(text)} is {len(ids)} tokens for this tokenizer ({pieces}); a continuation must be one"
    if not ids:
        return f"{shown(text)} is no token of its own after a word; a continuation must be one: begin it with a space"
    if ids[0] == tokenizer.unk_token_id:
        return f"{shown(text)} is unknown to this tokenizer; a continuation must be a token of its own"
    return int(ids[0])


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as it continues another: some tokenizers treat the beginning of a text apart."""
    before = tokenizer.encode(ANCHOR, add_special_tokens=False)
    ids = tokenizer.encode(ANCHOR + text, add_special_tokens=False)
    # Where the anchor's last token grew into the text, no token is the continuation's own.
    return list(ids[len(before) :]) if ids[: len(before)] == before else []


def encode_with_bos(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the model's BOS token first where it has one."""
    return _encode(tokenizer, text)[0]


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    if tokenizer.bos_token_id is None:
        return ids, offsets
    return [int(tokenizer.bos_token_id), *ids], [(0, 0), *offsets]


def _token_at(offsets: Sequence[tuple[int, int]], character: int) -> int | None:
    """The token that a character belongs to; None between tokens."""
    return next((index for index, (start, end) in enumerate(offsets) if start <= character < end), None)


def _pad(rows: Sequence[Sequence[int]], filler: int = 0) -> Int[Tensor, "prompt pos"]:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def _others(rows: Sequence[Sequence[int]]) -> Int[Tensor, "prompt more"] | None:
    return _pad([row[1:] for row in rows], NO_TOKEN) if any(len(row) > 1 for row in rows) else None


def _beside(first: Int[Tensor, "prompt"], others: Int[Tensor, "prompt more"] | None) -> Int[Tensor, "prompt choice"]:
    return first[:, None] if others is None else torch.cat([first[:, None], others], dim=1)
