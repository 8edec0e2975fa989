"""Greater-than: *The war lasted from the year 1732 to the year 17* -> *33*, or any later year.

After Hanna, Liu and Variengien (2023, arXiv 2305.00586). An event begins in the year XXYY, and the prompt ends after
the century XX of the year it ends in. All years after YY are answers, all up to YY are foils; the probability
difference of the two is the paper's metric, and `prob_diff` of `measure_behaviour`. The counterfactual is the paper's:
the start year XX01, after which nearly every year comes.

Steps: find the form that the tokenizer supports; keep the nouns that are one token and the years that are written in
that form, with XX01; centuries take turns; noun and YY are drawn.

- **two digits** (GPT-2, `tiny`), as in the paper: the tokenizer splits a year as [XX][YY], and the next token is a
  whole YY' of 00 to 99.
- **one digit** (SmolLM2, Llama), a deviation: the tokenizer splits a year into single digits, so the next token is the
  tens digit only. Greater tens digits are answers and smaller ones foils; the same tens digit is neither, because it
  is right or wrong by a digit that is not said yet. YY is then 10 to 89, so that there are some of both.

Of the answers the one right after YY comes first, and of the foils the one right before: those two are the cutoff.

Other deviations: the nouns are our own list of events, and no noun and no century is shared by the splits.
"""

import random
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from jaxtyping import Float
from torch import Tensor

from neuroplast.errors import InputError
from neuroplast.tasks.prompts import (
    PromptSet,
    Record,
    encode_with_bos,
    is_single_token,
    of_split,
    offset_of,
    require_request,
    require_words,
)
from neuroplast.tasks.task import Split, Task

TEMPLATE = "The {noun} lasted from the year {century}{yy} to the year {century}"
CENTURIES = tuple(map(str, range(11, 18)))
YEARS = tuple(f"{year:02}" for year in range(100))
EARLY = "01"
"""YY of the counterfactual's start year."""
_NOUNS = (
    "abduction accord affair agreement alliance argument assault attack attempt battle blockade boom boycott "
    "bombing campaign case ceremony championship chase clash coalition collaboration competition conference "
    "confrontation conflict conquest contest contract controversy convention course crisis crusade cycle deal debate "
    "decline demonstration depression development dialogue dictatorship discussion dispute drought dynasty "
    "earthquake education effort emergency empire engagement epidemic era evaluation exercise exhibition expedition "
    "experiment exploration famine festival feud fight flood friendship game growth hunt illness improvement "
    "incident investigation invasion journey kingdom lawsuit marriage migration mission mutiny negotiation occupation "
    "offensive operation outbreak partnership peace pilgrimage plague practice presidency process program progress "
    "project protest pursuit quest raid rebellion reform reign relationship research resistance revolt revolution "
    "rivalry rule ruling search siege slavery strike struggle study survey talks terror tour tournament "
    "treaty trial trip truce turmoil uprising violence visit voyage war work"
)
NOUNS = tuple(_NOUNS.split())

MINIMUM_NOUNS = 8
MINIMUM_YEARS = 20
COUNTERFACTUALS = ("year_01",)


@dataclass(frozen=True)
class _Form:
    """How a tokenizer may write the two digits after the century."""

    continuations: tuple[str, ...]
    """What the next token may be, in order."""
    starts: tuple[str, ...]
    """Every YY that some of these are greater than, and some smaller."""

    @property
    def width(self) -> int:
        """Digits that the next token says."""
        return len(self.continuations[0])

    def is_written(self, tokenizer: Any, century: str, yy: str) -> bool:
        """Whether the tokenizer writes a year in this form."""
        before, whole = (encode_with_bos(tokenizer, f"the year {century}{digits}") for digits in ("", yy))
        return whole[: len(before)] == before and len(whole) - len(before) == len(yy) // self.width


_FORMS = (_Form(YEARS, YEARS[2:99]), _Form(tuple("0123456789"), YEARS[10:90]))


def names(tokenizer: Any, split: Split = "all") -> tuple[str, ...]:
    """What may come after the century: the years 00 to 99, or the tens digits 0 to 9; the same in all splits.

    Raises:
        InputError: when the tokenizer writes years in neither form.
    """
    return _find_form(tokenizer, split)[0].continuations


def build_records(
    tokenizer: Any, n: int, seed: int, *, split: Split = "all", counterfactual: str = "year_01"
) -> tuple[Record, ...]:
    """Writes prompts whose nouns are single tokens and whose years are written in one form.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        n: how many, at least 1.
        seed: the same seed gives the same records for the same tokenizer.
        split: `train` and `eval` share neither nouns nor centuries; `all` uses all of both.
        counterfactual: `year_01` (the start year is XX01).

    Returns:
        Records with the marks `noun` and `yy` (the first token after the start year's century), grouped by century.

    Raises:
        InputError: n below 1, an unknown split or counterfactual, too few nouns left for this tokenizer, or years that
            it writes in neither form.
    """
    require_request(n, counterfactual, COUNTERFACTUALS)
    nouns = require_words(tokenizer, "greater-than", "nouns", of_split(NOUNS, split), MINIMUM_NOUNS)
    form, years = _find_form(tokenizer, split)
    rng = random.Random(f"greater_than/{split}/{seed}")
    turns = islice(cycle(years.items()), n)
    return tuple(_record(form, rng.choice(nouns), century, rng.choice(starts)) for century, starts in turns)


def cutoff_sharpness(logits: Float[Tensor, "prompt vocab"], prompts: PromptSet) -> Float[Tensor, "prompt"]:
    """How sharply the answers begin: p(YY+1) - p(YY-1), or the same of tens digits.

    Args:
        logits: at END, as `Network.logits` gives them.
        prompts: of this task.
    """
    p = logits.float().softmax(dim=1)
    after, before = (p.gather(1, token[:, None].to(p.device))[:, 0] for token in (prompts.answer, prompts.foil))
    return after - before


def _record(form: _Form, noun: str, century: str, yy: str) -> Record:
    at = form.continuations.index(yy[: form.width])
    greater, equal = form.continuations[at + 1 :], form.continuations[at]
    smaller = form.continuations[:at][::-1]
    # The first foil is the one right before; an equal one is a foil where nothing is left to be said.
    foils = (*smaller, equal) if form.width == len(yy) else smaller
    words = {"noun": noun, "century": century, "yy": yy}
    return Record(
        clean=TEMPLATE.format(**words),
        counterfactual=TEMPLATE.format(**words | {"yy": EARLY}),
        answer=greater[0],
        foil=foils[0],
        template="greater-than-01",
        group=f"{century}00s",
        marks={name: offset_of(name, TEMPLATE, words) for name in ("noun", "yy")},
        more_answers=greater[1:],
        more_foils=foils[1:],
    )


def _find_form(tokenizer: Any, split: Split) -> tuple[_Form, dict[str, list[str]]]:
    """The form that the tokenizer writes years in, and by century the YY of the years that it does."""
    for form in _FORMS:
        if not all(is_single_token(tokenizer, text) for text in form.continuations):
            continue
        years = {
            century: [yy for yy in form.starts if form.is_written(tokenizer, century, yy)]
            for century in of_split(CENTURIES, split)
            if form.is_written(tokenizer, century, EARLY)
        }
        years = {century: starts for century, starts in years.items() if starts}
        if sum(map(len, years.values())) >= MINIMUM_YEARS:
            return form, years
    written = tokenizer.tokenize("the year 1732")
    raise InputError(
        f"this tokenizer writes 'the year 1732' as {written}, and greater-than needs 17 and 32, or single digits: "
        "choose another model"
    )


TASK = Task(
    name="greater_than",
    description="An event begins in a year: name a later one for its end.",
    positions=("noun", "yy", "end"),
    counterfactuals=COUNTERFACTUALS,
    build_records=build_records,
    names=names,
)
prompts = TASK.prompts
"""Prompts for one model."""
