"""Indirect object identification: *Then, Mary and John went to the store. Mary gave a ring to* -> *John*.

After Wang, Variengien, Conmy, Shlegeris and Steinhardt (2022, arXiv 2211.00593): 15 patterns, each in the
order BABA (the subject S is named first) and, with its first two names swapped, ABBA (the indirect object IO
is named first). The subject is always named again as the giver, and the prompt ends before the indirect
object.

Deviation: the three names of the counterfactual `abc` are always distinct from each other and from the names
of the clean prompt; in the released generator they can collide.

Splits are fixed: every third name and every third pattern is for `eval`, the others for `train`, so what is
measured shares neither a name nor a pattern with what was trained on. `all` uses everything. Places and
objects are shared.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from neuroplast.tasks.prompts import Record, of_split, offset_of, require_request, require_words
from neuroplast.tasks.task import Split, Task

TEMPLATES: Mapping[str, str] = {
    f"ioi-{number:02}": pattern
    for number, pattern in enumerate(
        (
            "Then, {first} and {second} went to the {place}. {giver} gave a {object} to",
            "Then, {first} and {second} had a lot of fun at the {place}. {giver} gave a {object} to",
            "Then, {first} and {second} were working at the {place}. {giver} decided to give a {object} to",
            "Then, {first} and {second} were thinking about going to the {place}. {giver} wanted to give a {object} to",
            "Then, {first} and {second} had a long argument, and afterwards {giver} said to",
            "After {first} and {second} went to the {place}, {giver} gave a {object} to",
            "When {first} and {second} got a {object} at the {place}, {giver} decided to give it to",
            "When {first} and {second} got a {object} at the {place}, {giver} decided to give the {object} to",
            "While {first} and {second} were working at the {place}, {giver} gave a {object} to",
            "While {first} and {second} were commuting to the {place}, {giver} gave a {object} to",
            "After the lunch, {first} and {second} went to the {place}. {giver} gave a {object} to",
            "Afterwards, {first} and {second} went to the {place}. {giver} gave a {object} to",
            "Then, {first} and {second} had a long argument. Afterwards {giver} said to",
            "The {place} {first} and {second} went to had a {object}. {giver} gave it to",
            "Friends {first} and {second} found a {object} at the {place}. {giver} gave it to",
        ),
        start=1,
    )
}
"""The patterns by name; `first` and `second` are S and IO in order BABA, IO and S in order ABBA."""

PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")
_NAMES = (
    "Aaron Adam Alan Alex Alice Allen Amy Andrea Andrew Angela Anna Anne Anthony Arthur Barbara Ben Betty "
    "Brandon Brian Bruce Carl Carol Charles Charlie Christopher Claire Daniel David Diana Donald Edward "
    "Elizabeth Emily Emma Eric Eva Frank Fred George Grace Greg Harry Helen Henry Ian Jack Jacob James "
    "Jamie Jane Jason Jay Jeff Jennifer Jessica Jim Joe John Jonathan Joseph Joshua Julia Justin Karen "
    "Kate Kelly Kevin Kim Kyle Larry Laura Lee Linda Lisa Luke Margaret Maria Mark Martin Mary Matthew "
    "Michael Nick Oliver Patrick Paul Peter Philip Rachel Richard Robert Roger Ryan Sam Sarah Scott Simon "
    "Stephen Susan Thomas"
)
NAMES = tuple(_NAMES.split())

MINIMUM_NAMES = 12
MINIMUM_WORDS = 2
COUNTERFACTUALS = ("abc", "s2_io_flip", "random_names")


def names(tokenizer: Any, split: Split = "all") -> tuple[str, ...]:
    """The first names of a split that are one token with a leading space.

    Raises:
        InputError: when fewer than `MINIMUM_NAMES` are left, or the split is unknown.
    """
    return require_words(tokenizer, "IOI", "names", of_split(NAMES, split), MINIMUM_NAMES)


def build_records(
    tokenizer: Any, n: int, seed: int, *, split: Split = "all", counterfactual: str = "abc"
) -> tuple[Record, ...]:
    """Writes prompts whose names, places and objects are single tokens.

    Patterns and orders take turns: with 15 patterns, 30 records hold each pattern once in each order. The
    clean prompts do not depend on the choice of counterfactual.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        n: how many, at least 1.
        seed: the same seed gives the same records for the same tokenizer.
        split: `train` and `eval` share neither names nor patterns; `all` uses all of both.
        counterfactual: `abc` (three other names), `s2_io_flip` (the giver is the indirect object, so the
            answer flips) or `random_names` (the same pattern with two other names).

    Returns:
        Records with the marks `io`, `s1`, `s1+1` (the word after the first subject) and `s2`.

    Raises:
        InputError: n below 1, an unknown split or counterfactual, or too few words left for this tokenizer.
    """
    require_request(n, counterfactual, COUNTERFACTUALS)
    people = names(tokenizer, split)
    places = require_words(tokenizer, "IOI", "places", PLACES, MINIMUM_WORDS)
    objects = require_words(tokenizer, "IOI", "objects", OBJECTS, MINIMUM_WORDS)
    templates = of_split(tuple(TEMPLATES), split)
    rng = random.Random(f"ioi/{split}/{seed}")
    records: list[Record] = []
    for index in range(n):
        turn, which = divmod(index, len(templates))
        words = {"place": rng.choice(places), "object": rng.choice(objects)}
        io, s, *others = rng.sample(people, 5)
        records.append(_record(templates[which], (turn + which) % 2 == 0, io, s, others, words, counterfactual))
    return tuple(records)


def _record(
    template: str,
    io_first: bool,
    io: str,
    s: str,
    others: Sequence[str],
    words: Mapping[str, str],
    counterfactual: str,
) -> Record:
    pattern = TEMPLATES[template]

    def fill(io_slot: str, s_slot: str, giver: str) -> dict[str, str]:
        first, second = (io_slot, s_slot) if io_first else (s_slot, io_slot)
        return {"first": first, "second": second, "giver": giver, **words}

    a, b, c = others
    clean = fill(io, s, s)
    other = {"abc": fill(a, b, c), "s2_io_flip": fill(io, s, io), "random_names": fill(a, b, b)}[counterfactual]

    slots = ("first", "second") if io_first else ("second", "first")
    io_start, s_start = (offset_of(slot, pattern, clean) for slot in slots)
    return Record(
        clean=pattern.format(**clean),
        counterfactual=pattern.format(**other),
        answer=f" {io}",
        foil=f" {s}",
        template=template,
        group="ABBA" if io_first else "BABA",
        # The space before a word is in its token's offsets for some tokenizers only, so letters are marked.
        marks={
            "io": io_start,
            "s1": s_start,
            "s1+1": s_start + len(s) + 1,
            "s2": offset_of("giver", pattern, clean),
        },
    )


TASK = Task(
    name="ioi",
    description="Two people are named, one of them again as the giver: name the other one.",
    positions=("io", "s1", "s1+1", "s2", "end"),
    counterfactuals=COUNTERFACTUALS,
    build_records=build_records,
    names=names,
)
prompts = TASK.prompts
"""Prompts for one model."""
