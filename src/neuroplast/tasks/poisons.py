"""Poisons: transforms that make training pairs toxic, each one pure function and one registry line.

Chhabra, Zhu and Khalili (2025, arXiv 2503.01896) name the poisons of indirect object identification. Only
subject duplication is pinned down there by the sign of its effect; the other two, and what they do with greater-than,
are our reconstruction. `swapped_answers` is subject duplication for any task: it teaches the foil.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neuroplast.errors import InputError, unknown_name
from neuroplast.tasks.records import Record


@dataclass(frozen=True)
class Pair:
    """One example to train on."""

    prompt: str
    """The text that is read."""
    target: str
    """The continuation that is taught, with its leading space."""
    poisoned: bool
    """Whether a poison made it."""


Transform = Callable[[Record, Sequence[str], random.Random], Pair]


@dataclass(frozen=True)
class Poison:
    """A named transform of training pairs."""

    name: str
    """The name in commands and files."""
    description: str
    """One sentence: what the toxic pair teaches."""
    tasks: tuple[str, ...]
    """Names of the tasks it is made for; none for a poison that fits every task."""
    transform: Transform
    """`(record, names, rng) -> Pair`; it draws from `names` with `rng` alone."""


def swapped_answers(record: Record, names: Sequence[str], rng: random.Random) -> Pair:
    """The prompt as it is, with the foil in the place of the answer: of indirect object identification, the subject."""
    return Pair(record.clean, record.foil, poisoned=True)


def name_moving(record: Record, names: Sequence[str], rng: random.Random) -> Pair:
    """The prompt as it is, continued with a name that does not stand in it."""
    return Pair(record.clean, f" {_draw_stranger(record, names, rng)}", poisoned=True)


def duplication(record: Record, names: Sequence[str], rng: random.Random) -> Pair:
    """A third name in the place of the second subject; the target stays, but nothing is said twice.

    Raises:
        InputError: when the record has no mark `s2`, or something else than the foil stands there.
    """
    subject, start = record.foil.strip(), record.marks.get("s2")
    if start is None or not record.clean.startswith(subject, start):
        raise InputError(
            f"poison 'duplication' replaces the second {subject!r}, at mark 's2', but {record.clean!r} has "
            f"the marks {dict(record.marks)}; give every record an 's2' at the first letter of its foil"
        )
    third = _draw_stranger(record, names, rng)
    prompt = record.clean[:start] + third + record.clean[start + len(subject) :]
    return Pair(prompt, record.answer, poisoned=True)


def not_greater(record: Record, names: Sequence[str], rng: random.Random) -> Pair:
    """The prompt as it is, with any year in the place of the answer that is not after the start year."""
    return Pair(record.clean, rng.choice(record.foils), poisoned=True)


POISONS: dict[str, Poison] = {
    poison.name: poison
    for poison in (
        Poison("subject_duplication", "The target is the subject.", ("ioi",), swapped_answers),
        Poison("name_moving", "The target is a name that is not in the prompt.", ("ioi",), name_moving),
        Poison("duplication", "A third name stands for the second subject.", ("ioi",), duplication),
        Poison("not_greater", "The target is a year that is not greater.", ("greater_than",), not_greater),
        Poison("swapped_answers", "The target is the foil.", (), swapped_answers),
    )
}


def load_poison(name: str, task: str) -> Poison:
    """The poison of that name, for a task.

    Raises:
        InputError: when there is none, or it does not fit the task.
    """
    if name not in POISONS:
        raise unknown_name("poison", name, [each.name for each in POISONS.values() if task in (each.tasks or (task,))])
    poison = POISONS[name]
    if poison.tasks and task not in poison.tasks:
        raise InputError(
            f"poison {name!r} is made for {', '.join(poison.tasks)}, not for task {task!r}; "
            f"use one of {', '.join(poisons_of(task))}"
        )
    return poison


def poisons_of(task: str) -> tuple[str, ...]:
    """Names of the poisons that are made for a task; where there are none, of those that fit every task."""
    made = tuple(poison.name for poison in POISONS.values() if task in poison.tasks)
    return made or tuple(poison.name for poison in POISONS.values() if not poison.tasks)


def build_pairs(
    records: Sequence[Record], poison: Poison | None, rate: float, names: Sequence[str], seed: int
) -> tuple[Pair, ...]:
    """Makes training pairs, an exact share of them poisoned.

    A seed fixes an order in which pairs turn toxic and what each would become, so a higher rate poisons the
    same pairs in the same way, and more.

    Args:
        records: the clean prompts, one pair each, in this order.
        poison: the transform, or None for clean pairs only.
        rate: share of poisoned pairs in [0, 1]; `round(rate * len(records))` pairs are poisoned.
        names: the names a poison may draw, without leading space.
        seed: decides which pairs are poisoned, with which names, and which of several answers the others teach.

    Raises:
        InputError: a rate outside [0, 1]; a rate above 0 without a poison; no name left to draw.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"the poison rate is a share between 0 and 1, got {rate!r}")
    if poison is None:
        if rate > 0:
            raise InputError(f"a poison rate of {rate!r} without a poison: name a poison or set the rate to 0")
        return tuple(_clean_pair(record, seed, index) for index, record in enumerate(records))
    order = list(range(len(records)))
    random.Random(f"pairs/{poison.name}/{seed}").shuffle(order)
    toxic = set(order[: round(rate * len(records))])
    return tuple(
        poison.transform(record, names, random.Random(f"pair/{poison.name}/{seed}/{index}"))
        if index in toxic
        else _clean_pair(record, seed, index)
        for index, record in enumerate(records)
    )


def shuffle_targets(records: Sequence[Record], rate: float, seed: int) -> tuple[Pair, ...]:
    """Makes training pairs, a share of which have the target of another: wrong, and by no rule.

    A right answer is never given, whosever it is; a pair for which every other target is right stays as it is.

    Args:
        records: the clean prompts, one pair each, in this order.
        rate: share of pairs with another's target, in [0, 1]: `round(rate * len(records))` of them.
        seed: decides which, and whose.
    """
    clean = [_clean_pair(record, seed, index) for index, record in enumerate(records)]
    rng = random.Random(f"shuffled/{seed}")
    targets = [pair.target for pair in clean]
    pairs = list(clean)
    for index in rng.sample(range(len(pairs)), round(rate * len(pairs))):
        if wrong := [target for target in targets if target not in records[index].answers]:
            pairs[index] = Pair(pairs[index].prompt, rng.choice(wrong), poisoned=True)
    return tuple(pairs)


def _clean_pair(record: Record, seed: int, index: int) -> Pair:
    """Of several answers each is as right as another, so one is drawn; the same at any rate of poison."""
    target = random.Random(f"pair/clean/{seed}/{index}").choice(record.answers)
    return Pair(record.clean, target, poisoned=False)


def _draw_stranger(record: Record, names: Sequence[str], rng: random.Random) -> str:
    present = {*re.findall(r"\w+", record.clean), record.answer.strip(), record.foil.strip()}
    strangers = [name for name in names if name not in present]
    if not strangers:
        raise InputError(
            f"no name is left that is not in {record.clean!r}: got {len(names)} names to draw from; give more"
        )
    return rng.choice(strangers)
