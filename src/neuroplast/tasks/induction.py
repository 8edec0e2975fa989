"""Induction: *apple river stone … apple river* -> *stone*, on random words that are said once and then again.

After Elhage et al. (2021, "A Mathematical Framework for Transformer Circuits") and Olsson et al. (2022, arXiv
2209.11895): a sequence that means nothing is repeated, so nothing but the earlier occurrence tells what comes next.

Steps: say `LENGTH` different words, then the first few again. The answer is the word that followed last time, the foil
another word of the sequence. In the counterfactual `unrepeated` the first half is other words, so there is nothing to
copy, and neither answer nor foil has been said.

Deviations: words are the nouns of the other tasks that are one token with a leading space, where the papers draw any
tokens, so that a prompt is text, survives a tokenizer and can be shown; and no word comes twice in one half.

How many words are said again is the template: knocked-out heads are averaged among prompts that end at one place.
"""

import random
from typing import Any

from neuroplast.tasks import agreement, greater_than, ioi
from neuroplast.tasks.prompts import Record, of_split, require_request, require_words
from neuroplast.tasks.task import Split, Task

LENGTH = 10
"""Words in a sequence."""
REPEATED = range(4, LENGTH)
"""How many of them are said again, the last of which is the last token of the prompt."""
WORDS = tuple(dict.fromkeys((*ioi.PLACES, *ioi.OBJECTS, *greater_than.NOUNS, *(noun for noun, _ in agreement.NOUNS))))
MINIMUM_WORDS = 2 * LENGTH
COUNTERFACTUALS = ("unrepeated",)


def names(tokenizer: Any, split: Split = "all") -> tuple[str, ...]:
    """The words of a split that are one token with a leading space.

    Raises:
        InputError: when fewer than `MINIMUM_WORDS` are left, or the split is unknown.
    """
    return require_words(tokenizer, "induction", "words", of_split(WORDS, split), MINIMUM_WORDS)


def build_records(
    tokenizer: Any, n: int, seed: int, *, split: Split = "all", counterfactual: str = "unrepeated"
) -> tuple[Record, ...]:
    """Writes prompts of random words.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        n: how many, at least 1.
        seed: the same seed gives the same records for the same tokenizer.
        split: `train` and `eval` share neither words nor templates; `all` uses all of both.
        counterfactual: `unrepeated` (the first half is other words).

    Returns:
        Records with the marks `first` (where the last word stood before) and `first+1` (what followed it: the answer).

    Raises:
        InputError: n below 1, an unknown split or counterfactual, or too few words left for this tokenizer.
    """
    require_request(n, counterfactual, COUNTERFACTUALS)
    words = names(tokenizer, split)
    lengths = of_split(REPEATED, split)
    rng = random.Random(f"induction/{split}/{seed}")
    return tuple(_record(rng.sample(words, 2 * LENGTH), lengths[at % len(lengths)], rng) for at in range(n))


def _record(words: list[str], repeated: int, rng: random.Random) -> Record:
    said, others = words[:LENGTH], words[LENGTH:]
    again = said[:repeated]
    last = repeated - 1
    foil = rng.choice([word for at, word in enumerate(said) if at not in (last, repeated)])
    # A space before each word, the first one too: it is the same token both times.
    start = sum(len(word) + 1 for word in said[:last]) + 1
    return Record(
        clean="".join(f" {word}" for word in (*said, *again)),
        counterfactual="".join(f" {word}" for word in (*others, *again)),
        answer=f" {said[repeated]}",
        foil=f" {foil}",
        template=f"induction-{repeated:02}",
        marks={"first": start, "first+1": start + len(said[last]) + 1},
    )


TASK = Task(
    name="induction",
    description="Random words are said again in the same order: say the one that came next.",
    positions=("first", "first+1", "end"),
    counterfactuals=COUNTERFACTUALS,
    build_records=build_records,
    names=names,
)
prompts = TASK.prompts
"""Prompts for one model."""
