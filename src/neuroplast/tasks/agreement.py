"""Subject-verb agreement: *The keys near the cabinet* -> *are*, not *is*.

After Linzen, Dupoux and Goldberg (2016, arXiv 1611.01368): the verb agrees with the subject, not with the noun that
stands right before it, the attractor. Half of the prompts have an attractor of the other number, which is where models
err. The counterfactual `other_number` changes the number of the subject and nothing else, so the answer flips.

Deviations: sentences are written from templates, where the paper takes them from a corpus and has an auxiliary task of
its own; one attractor a sentence; the verb is one of three pairs, each with its templates.

Splits share neither nouns nor templates. Verbs are shared.
"""

import random
from collections.abc import Sequence
from typing import Any

from neuroplast.tasks.prompts import (
    Record,
    keep_single_tokens,
    of_split,
    offset_of,
    require_enough,
    require_request,
)
from neuroplast.tasks.task import Split, Task

TEMPLATES = {
    f"agreement-{number:02}": row
    for number, row in enumerate(
        (
            ("The {subject} near the {attractor}", ("is", "are")),
            ("The {subject} behind the {attractor}", ("was", "were")),
            ("I know that the {subject} beside the {attractor}", ("is", "are")),
            ("After all these years, the {subject} near the {attractor}", ("has", "have")),
            ("Last year the {subject} next to the {attractor}", ("was", "were")),
            ("They say that the {subject} behind the {attractor}", ("has", "have")),
            ("The {subject} that belonged to the {attractor}", ("was", "were")),
            ("At the moment the {subject} beside the {attractor}", ("is", "are")),
            ("It seems that the {subject} next to the {attractor}", ("is", "are")),
        ),
        start=1,
    )
}
"""Patterns by name, each with its verb for one subject and for several."""
_NOUNS = (
    "key keys,cabinet cabinets,book books,car cars,house houses,tree trees,dog dogs,cat cats,bird birds,horse horses,"
    "teacher teachers,doctor doctors,student students,friend friends,brother brothers,sister sisters,farmer farmers,"
    "king kings,soldier soldiers,artist artists,worker workers,driver drivers,player players,writer writers,"
    "table tables,chair chairs,door doors,window windows,picture pictures,letter letters,box boxes,bottle bottles,"
    "road roads,bridge bridges,building buildings,church churches,garden gardens,river rivers,mountain mountains,"
    "island islands,ship ships,boat boats,train trains,plane planes,computer computers,phone phones,camera cameras,"
    "machine machines,guard guards,judge judges,lawyer lawyers,officer officers,engineer engineers,manager managers,"
    "girl girls,boy boys,man men,woman women,child children,animal animals,flower flowers,stone stones,wall walls"
)
NOUNS = tuple((one, several) for one, several in (pair.split() for pair in _NOUNS.split(",")))
"""Nouns, for one and for several."""

MINIMUM_NOUNS = 6
COUNTERFACTUALS = ("other_number",)


def names(tokenizer: Any, split: Split = "all") -> tuple[str, ...]:
    """The verbs of a split's templates.

    Raises:
        InputError: when no pair of verbs is two tokens for this tokenizer, or the split is unknown.
    """
    return tuple(dict.fromkeys(verb for name in _templates(tokenizer, split) for verb in TEMPLATES[name][1]))


def build_records(
    tokenizer: Any, n: int, seed: int, *, split: Split = "all", counterfactual: str = "other_number"
) -> tuple[Record, ...]:
    """Writes prompts whose nouns and verbs are single tokens.

    Templates take turns; one or several subjects, and an attractor of the same or the other number, do so within them.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        n: how many, at least 1.
        seed: the same seed gives the same records for the same tokenizer.
        split: `train` and `eval` share neither nouns nor templates; `all` uses all of both.
        counterfactual: `other_number` (the subject is several instead of one, or one instead of several).

    Returns:
        Records with the mark `subject`, grouped by whether the attractor has the subject's number.

    Raises:
        InputError: n below 1, an unknown split or counterfactual, or too few nouns or verbs left for this tokenizer.
    """
    require_request(n, counterfactual, COUNTERFACTUALS)
    of_its_own = of_split(NOUNS, split)
    nouns = [pair for pair in of_its_own if keep_single_tokens(tokenizer, pair) == pair]
    require_enough("agreement", "nouns, with their plurals,", len(nouns), len(of_its_own), MINIMUM_NOUNS)
    templates = _templates(tokenizer, split)
    rng = random.Random(f"agreement/{split}/{seed}")
    records: list[Record] = []
    for index in range(n):
        turn, which = divmod(index, len(templates))
        subject, attractor = rng.sample(nouns, 2)
        records.append(_record(templates[which], subject, attractor, (turn + which) % 2, (turn // 2 + which) % 2 == 0))
    return tuple(records)


def _record(template: str, subject: Sequence[str], attractor: Sequence[str], number: int, same: bool) -> Record:
    pattern, verbs = TEMPLATES[template]
    words = {"subject": subject[number], "attractor": attractor[number if same else 1 - number]}
    return Record(
        clean=pattern.format(**words),
        counterfactual=pattern.format(**words | {"subject": subject[1 - number]}),
        answer=f" {verbs[number]}",
        foil=f" {verbs[1 - number]}",
        template=template,
        group="attractor of the same number" if same else "attractor of the other number",
        marks={"subject": offset_of("subject", pattern, words)},
    )


def _templates(tokenizer: Any, split: Split) -> tuple[str, ...]:
    of_its_own = of_split(tuple(TEMPLATES), split)
    kept = tuple(name for name in of_its_own if len(keep_single_tokens(tokenizer, TEMPLATES[name][1])) == 2)
    require_enough("agreement", "templates' verbs", len(kept), len(of_its_own), 1)
    return kept


TASK = Task(
    name="agreement",
    description="A verb follows a noun that is not its subject: let it agree with the subject.",
    positions=("subject", "end"),
    counterfactuals=COUNTERFACTUALS,
    build_records=build_records,
    names=names,
)
prompts = TASK.prompts
"""Prompts for one model."""
