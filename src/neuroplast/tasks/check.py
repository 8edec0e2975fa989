"""Everything that is wrong with a file of records, at once: what `neuroplast tasks --check` does.

The checks are those that refuse a file where it is used (`custom.read_task`) and those that refuse records that do not
fit a tokenizer (`prompts.Encoder`); here they are noted instead. A warning is of what may be meant so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from neuroplast.tasks.custom import build_custom_task, pick_split, read_task
from neuroplast.tasks.prompts import Encoder, is_single_token
from neuroplast.tasks.records import Record


@dataclass(frozen=True)
class Problem:
    """Something to mend, or to look at."""

    line: int
    """The line of the file, from 1."""
    text: str
    """What was got, what was expected, what to do."""


@dataclass(frozen=True)
class Check:
    """What was found in a file of records."""

    path: Path
    """The file."""
    records: tuple[Record, ...]
    """The records that are sound by themselves."""
    problems: tuple[Problem, ...]
    """What is wrong, by line."""
    warnings: tuple[Problem, ...]
    """What may be meant so, by line."""

    def lines(self) -> list[str]:
        """The problems and warnings, one a line, as `FILE:LINE: …`."""
        told = [(each.line, each.text) for each in self.problems]
        told += [(each.line, f"warning: {each.text}") for each in self.warnings]
        return [f"{self.path}:{line}: {text}" for line, text in sorted(told, key=lambda each: each[0])]

    def document(self) -> dict[str, Any]:
        """What was found, as JSON."""
        records = self.records
        return {
            "file": str(self.path),
            "problems": [vars(each) for each in self.problems],
            "warnings": [vars(each) for each in self.warnings],
            "records": len(records),
            "templates": list(dict.fromkeys(record.template for record in records)),
            "groups": list(dict.fromkeys(record.group for record in records)),
            "positions": list(build_custom_task(self.path.name, records).positions) if records else [],
            "splits": {split: len(pick_split(records, split)) for split in ("train", "eval")},
        }

    def summary(self) -> str:
        """What the file has, in a sentence."""
        found = self.document()
        return (
            f"{self.path}: records {found['records']}, templates {len(found['templates'])}, groups "
            f"{len(found['groups'])}, positions {', '.join(found['positions'])}; {found['splits']['train']} records to "
            f"train on, {found['splits']['eval']} to measure on."
        )


def check_file(path: str | Path, tokenizer: Any = None, context: int | None = None) -> Check:
    """Looks at a file of records.

    Args:
        path: JSONL of records.
        tokenizer: a Hugging Face fast tokenizer that they have to fit; None asks for none.
        context: the most tokens that a prompt may have; None sets no bound.

    Raises:
        StorageError: when the file cannot be read.
    """
    problems: list[Problem] = []
    warnings: list[Problem] = []

    def noting(line: int, into: list[Problem]) -> Callable[[str], None]:
        return lambda text: into.append(Problem(line, text))

    found = read_task(Path(path), lambda line, text: problems.append(Problem(line, text)))
    if found and not pick_split([record for _, record in found], "train"):
        noting(found[-1][0], warnings)("no record to train on: give some the split 'train', or only measure")
    if tokenizer is not None:
        encode = Encoder(tokenizer)
        for line, record in found:
            encoded = encode(record, noting(line, problems))
            if encoded and context is not None and len(encoded.clean) > context:
                noting(line, problems)(f"the prompt has {len(encoded.clean)} tokens, the model's context {context}")
            _look_for_spaces(tokenizer, record, noting(line, warnings))
    by_line = (tuple(sorted(each, key=lambda problem: problem.line)) for each in (problems, warnings))
    return Check(Path(path), tuple(record for _, record in found), *by_line)


def _look_for_spaces(tokenizer: Any, record: Record, complain: Callable[[str], None]) -> None:
    """Tells of continuations that run on from a word, where the tokenizer has them as words of their own."""
    last = record.clean[-1]
    if not (last.isalpha() or last in ",;:.!?"):
        return
    for text in (*record.answers, *record.foils):
        if text[0].isalpha() and is_single_token(tokenizer, f" {text}"):
            complain(
                f"{shown(text)} has no leading space, so it runs on from {record.clean.split()[-1][-20:]!r}; this "
                f"tokenizer has {f' {text}'!r} as a token: write that, unless the text runs on"
            )
