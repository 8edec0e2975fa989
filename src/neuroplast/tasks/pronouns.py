"""Gendered pronouns: *So Mary is a really great friend, isn't* -> *she*, not *he*.

After Mathwin, Corlouer, Kran, Barez and Nanda (2023, "Identifying a Preliminary Circuit for Predicting Gendered
Pronouns in GPT-2 Small"). The counterfactual `other_gender` has a name of the other gender, so the answer flips.

Deviations: more templates than the paper's one; the names are our own lists of first names that are rarely given to
the other gender. What is measured is what a model makes of a name, not what anybody's pronoun is.

Splits share neither names nor templates.
"""

import random
from typing import Any

from neuroplast.tasks.prompts import Record, of_split, offset_of, require_request, require_words
from neuroplast.tasks.task import Split, Task

TEMPLATES = {
    f"pronouns-{number:02}": pattern
    for number, pattern in enumerate(
        (
            "So {name} is a really great friend, isn't",
            "So {name} was a very good student, wasn't",
            "So {name} has been a wonderful teacher, hasn't",
            "I heard that {name} is a really good cook, isn't",
            "Well, {name} has become a famous writer, hasn't",
            "Yesterday {name} stayed at home because",
            "In the end, {name} was very happy, wasn't",
            "When we met {name} last week, we saw that",
            "Everybody likes {name} a lot because",
        ),
        start=1,
    )
}
"""The patterns by name."""
FEMALE, MALE = (
    tuple(text.split())
    for text in (
        "Mary Anna Emma Sarah Alice Emily Lisa Laura Julia Karen Susan Linda Jennifer Jessica Rachel Helen Jane Kate "
        "Amy Maria Margaret Elizabeth Barbara Nancy Diana Betty Carol Claire Anne Eva Sophie Rose Lucy Grace Andrea "
        "Angela Michelle Nicole Rebecca Victoria",
        "John James David Michael Robert William Richard Thomas Mark Paul Peter George Andrew Brian Kevin Steven Jason "
        "Eric Frank Henry Jack Adam Daniel Matthew Joseph Edward Charles Martin Philip Simon Stephen Scott Arthur Carl "
        "Fred Larry Roger Luke Tom Oliver",
    )
)
"""First names, by the pronoun that a model is expected to give."""
PRONOUNS = ("she", "he")

MINIMUM_NAMES = 6
COUNTERFACTUALS = ("other_gender",)


def names(tokenizer: Any, split: Split = "all") -> tuple[str, ...]:
    """The two pronouns; the same in all splits.

    Raises:
        InputError: when they are not one token each, or the split is unknown.
    """
    of_split(PRONOUNS, split)
    return require_words(tokenizer, "the pronoun task", "pronouns", PRONOUNS, 2)


def build_records(
    tokenizer: Any, n: int, seed: int, *, split: Split = "all", counterfactual: str = "other_gender"
) -> tuple[Record, ...]:
    """Writes prompts whose names are single tokens.

    Templates take turns, and the two genders do so within them.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        n: how many, at least 1.
        seed: the same seed gives the same records for the same tokenizer.
        split: `train` and `eval` share neither names nor templates; `all` uses all of both.
        counterfactual: `other_gender` (a name of the other list).

    Returns:
        Records with the mark `name`, grouped by the pronoun that is right.

    Raises:
        InputError: n below 1, an unknown split or counterfactual, or too few names left for this tokenizer.
    """
    require_request(n, counterfactual, COUNTERFACTUALS)
    pronouns = names(tokenizer, split)
    people = [
        require_words(tokenizer, "the pronoun task", f"{kind} names", of_split(each, split), MINIMUM_NAMES)
        for kind, each in (("female", FEMALE), ("male", MALE))
    ]
    templates = of_split(tuple(TEMPLATES), split)
    rng = random.Random(f"pronouns/{split}/{seed}")
    records: list[Record] = []
    for index in range(n):
        turn, which = divmod(index, len(templates))
        right = (turn + which) % 2
        mine, other = (rng.choice(people[gender]) for gender in (right, 1 - right))
        pattern = TEMPLATES[templates[which]]
        records.append(
            Record(
                clean=pattern.format(name=mine),
                counterfactual=pattern.format(name=other),
                answer=f" {pronouns[right]}",
                foil=f" {pronouns[1 - right]}",
                template=templates[which],
                group=pronouns[right],
                marks={"name": offset_of("name", pattern, {"name": mine})},
            )
        )
    return tuple(records)


TASK = Task(
    name="pronouns",
    description="A person is named: refer to her or him by the pronoun that goes with the name.",
    positions=("name", "end"),
    counterfactuals=COUNTERFACTUALS,
    build_records=build_records,
    names=names,
)
prompts = TASK.prompts
"""Prompts for one model."""
