"""A task of one's own: a JSONL file of records, wherever a task is named.

A path that ends in `.jsonl` is a task: `--task my.jsonl`, `task = "my.jsonl"`, `load_task("my.jsonl")`. Its name, in
every file and picture, is the file's; where the file lies is in the settings alone.

- **Splits.** A record may say `"split": "train"` or `"eval"`; then all do. Where none does, every third record is for
  `eval`, the others for `train`, as in the tasks of the package. What is measured is of `eval` unless another split is
  asked for, also by commands that do not train, so that a model that was trained on the file is not measured on what it
  was trained on. A prompt that comes twice is refused: it could be in both. A *counterfactual* may be a prompt of
  another record, which may be trained on: it is run, never scored.
- **How many.** Examples to train on are repeated, in an order that the seed draws anew each time round, until there are
  as many as were asked for. Poisoned and clean examples are drawn from the same records, so a retraining sees prompts
  that were poisoned, with their right answers. Prompts that are measured are never repeated, because intervals resample
  them: where fewer exist than were asked for all are taken, and it is said. At least `MINIMUM` are needed.
- **Others.** What is chosen on some prompts and judged on others gets two halves. Knocked-out heads are averaged over
  records that are not measured, those to train on among them, of the same template, group and length; only where there
  is no other of that kind do the measured ones of it serve. The mean takes their counterfactuals.
- **Counterfactual.** The records' own is the only one, and is called `own`.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from neuroplast.errors import InputError, StorageError
from neuroplast.storage import hash_text
from neuroplast.tasks.prompts import (
    HasTokenizer,
    PromptSet,
    build_prompt_set,
    group_keys,
    of_split,
    require_request,
)
from neuroplast.tasks.records import ComplainOf, Record, check_marks, read_records, refuse_line
from neuroplast.tasks.task import Split, Task

SUFFIX = ".jsonl"
COUNTERFACTUALS = ("own",)
MINIMUM = 2
"""Prompts that a measurement with intervals needs."""


def is_custom(name: str) -> bool:
    """Whether a task's name is the path of a file."""
    return name.endswith(SUFFIX)


@dataclass(frozen=True)
class FileTask(Task):
    """The task of a file of records."""

    records: tuple[Record, ...]
    """All of them, in the file's order."""

    def apart(
        self, model: HasTokenizer, n: int, seeds: Sequence[int], *, split: Split = "all"
    ) -> tuple[PromptSet, ...]:
        """As many disjoint sets as seeds; the first one draws them.

        Raises:
            InputError: where there are too few records for that; as `prompts`.
        """
        pool = pick_split(self.records, split)
        most = min(n, len(pool) // len(seeds))
        if most < MINIMUM:
            raise InputError(
                f"{self.name} has {len(pool)} records for {split}, and {len(seeds)} sets of at least {MINIMUM} are "
                f"needed, one to choose on and one to judge on: add {len(seeds) * MINIMUM - len(pool)} or more"
            )
        drawn = random.Random(f"{self.name}/apart/{seeds[0]}").sample(range(len(pool)), most * len(seeds))
        rows = [sorted(drawn[which * most : (which + 1) * most]) for which in range(len(seeds))]
        return tuple(build_prompt_set(model.tokenizer, self.name, [pool[row] for row in each]) for each in rows)

    def reference(
        self,
        model: HasTokenizer,
        measured: PromptSet,
        n: int,
        seed: int = 0,
        *,
        split: Split = "all",
        counterfactual: str | None = None,
    ) -> PromptSet:
        """Records that are not measured, of the templates, groups and lengths that are, which take turns.

        They are of both splits, whatever is asked for. A measured prompt is among them only where no other record has
        its template, group and length.
        """
        said = {record.clean for record in measured.records}
        others = [record for record in self.records if record.clean not in said]
        found: dict[tuple[str, str, int], list[Record]] = {key: [] for key in group_keys(measured)}
        if others:
            for record, key in zip(
                others, group_keys(build_prompt_set(model.tokenizer, self.name, others)), strict=True
            ):
                if key in found:
                    found[key].append(record)
        alone = {key for key, records in found.items() if not records}
        for record, key in zip(measured.records, group_keys(measured), strict=True):
            if key in alone:
                found[key].append(record)
        rng = random.Random(f"{self.name}/reference/{seed}")
        turns = zip_longest(*(rng.sample(found[key], len(found[key])) for key in sorted(found)))
        chosen = [record for turn in turns for record in turn if record is not None][:n]
        return build_prompt_set(model.tokenizer, self.name, chosen)

    @property
    def measured_split(self) -> Split:
        """`eval`: the others may have been trained on."""
        return "eval"

    @property
    def most_examples(self) -> int | None:
        """Records to train on."""
        return len(pick_split(self.records, "train"))

    @property
    def sha256(self) -> str | None:
        """Hash of what the records say, whatever the file is called and however it is laid out."""
        return hash_text(json.dumps([record.row() for record in self.records], sort_keys=True))


def load_custom_task(path: str | Path) -> FileTask:
    """The task of a file.

    Args:
        path: JSONL of records.

    Raises:
        InputError: when there is no such file, or for the first thing that is wrong with it, with its line.
    """
    path = Path(path)
    try:
        found = read_task(path, refuse_line(path))
    except StorageError as error:
        raise InputError(f"no task: {error}; expected JSONL of records, or the name of a task") from error
    return build_custom_task(path.name, [record for _, record in found])


def build_custom_task(name: str, records: Sequence[Record]) -> FileTask:
    """The task of records that `read_task` let pass.

    Args:
        name: what it is called.
        records: at least one.
    """
    records = tuple(records)
    marks = records[0].marks
    return FileTask(
        name=name,
        description=f"{len(records)} records of a file of one's own.",
        positions=(*sorted(marks, key=lambda mark: marks[mark]), "end"),
        counterfactuals=COUNTERFACTUALS,
        build_records=partial(_build_records, name, records),
        names=partial(_names, records),
        records=records,
    )


def read_task(path: Path, complain: ComplainOf) -> list[tuple[int, Record]]:
    """The records of a task's file with the numbers of their lines; everything that is wrong is told.

    Args:
        path: the file.
        complain: is told the line and what is wrong with it.

    Raises:
        StorageError: when the file cannot be read.
    """
    found = read_records(path, complain)
    first: dict[str, int] = {}
    names_splits = any(record.split for _, record in found)
    for line, record in found:
        for name in ("clean", "counterfactual"):
            if getattr(record, name).endswith(" "):
                complain(line, f"{name!r} ends in a space: leave it out, and begin answer and foil with one")
        if record.clean == record.counterfactual:
            complain(line, "clean and counterfactual are the same: patching would change nothing; give another one")
        if record.clean in first:
            complain(line, f"the same prompt as line {first[record.clean]}: each counts as one; leave one out")
        first.setdefault(record.clean, line)
        if names_splits and not record.split:
            complain(line, "no split, where other records name theirs: give every record 'train' or 'eval', or none")
        check_marks(record, found[0][1].marks, lambda problem, line=line: complain(line, problem))
    n = len(pick_split([record for _, record in found], "eval"))
    if n < MINIMUM:
        how = "with split 'eval'" if names_splits else "the third and every third after it"
        complain(
            found[-1][0] if found else 1,
            f"{len(found)} sound records, {n} of them to measure on ({how}); {MINIMUM} are needed: add some",
        )
    return found


def pick_split(records: Sequence[Record], split: str) -> tuple[Record, ...]:
    """The records of a split: as they say, or every third for `eval`; `all` has all.

    Raises:
        InputError: for another split.
    """
    if split in ("train", "eval") and any(record.split for record in records):
        return tuple(record for record in records if record.split == split)
    return of_split(records, split)


def _build_records(
    name: str,
    records: Sequence[Record],
    tokenizer: Any,
    n: int,
    seed: int,
    *,
    split: Split = "all",
    counterfactual: str = COUNTERFACTUALS[0],
) -> tuple[Record, ...]:
    """Draws records; those to train on are repeated where there are fewer.

    Raises:
        InputError: n below 1, an unknown split or counterfactual, or no record to train on.
    """
    require_request(n, counterfactual, COUNTERFACTUALS)
    pool, rng = pick_split(records, split), random.Random(f"{name}/{split}/{seed}")
    if split != "train":
        return tuple(pool[row] for row in sorted(rng.sample(range(len(pool)), min(n, len(pool)))))
    if not pool:
        raise InputError(f"{name} has no record to train on: give some the split 'train', or none a split")
    drawn: list[Record] = []
    while len(drawn) < n:
        drawn += rng.sample(pool, len(pool))
    return tuple(drawn[:n])


def _names(records: Sequence[Record], tokenizer: Any, split: Split) -> tuple[str, ...]:
    """The right continuations of a split, without their leading space."""
    answers = (answer.strip() for record in pick_split(records, split) for answer in record.answers)
    return tuple(dict.fromkeys(answers))
