"""Indirect object identification as the benchmark MIB has it: the data set `mib-bench/ioi` of the Hugging Face hub.

After Mueller et al. (2025, arXiv 2504.13151). A row is a prompt with its two names, and the same prompt broken in eight
ways: names drawn anew (`abc`, `random_names`), or exchanged (`s1_io_flip`: the subject's first mention is the indirect
object's; `s2_io_flip`: the giver is the indirect object, so the answer flips), and both. MIB's circuit track takes
`s2_io_flip`.

Steps: fetch the files of one revision, or take a folder that holds a copy; read a split with `datasets`, which runs no
code of a data set (so from its version 4 on); find the names in the text. The result is a `Record` a row, whatever the
tokenizer: MIB's own filter leaves out names that a model's tokenizer splits, here `keep_fitting` does.

Deviation: of a prompt that comes twice, which then differs in its counterfactual only, the first row is kept.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from neuroplast.errors import InputError, first_line, unknown_name
from neuroplast.hub import hub_answers
from neuroplast.tasks.records import Record

DATASET = "mib-bench/ioi"
REVISION = "e5f3468f3af4c0883be35cd3bced8c711c95d286"
"""The commit that is read, as other published work pins it: 10,000 rows to train on, 10,000 to validate, 1,000 to test.
A commit's name is a hash of what is in it, so one that is wrong is not found, and nothing else is read in its place."""
COUNTERFACTUALS = (
    "s2_io_flip",
    "s1_io_flip",
    "abc",
    "random_names",
    "s1_ioi_flip_s2_ioi_flip",
    "random_names_s1_ioi_flip",
    "random_names_s2_ioi_flip",
    "random_names_s1_ioi_flip_s2_ioi_flip",
)
"""The columns without their ending; the first is that of MIB's circuit track."""
SPLITS = ("train", "validation", "test")
_ENDING = "_counterfactual"
_DATA = ["*.json", "*.jsonl", "*.parquet", "README.md"]


def load_mib_ioi(
    source: str | Path | None = None,
    *,
    split: str = "train",
    counterfactual: str = COUNTERFACTUALS[0],
    revision: str = REVISION,
) -> tuple[Record, ...]:
    """MIB's prompts, in the data set's order, each once.

    Args:
        source: a folder with a copy of the data set; None takes the hub's.
        split: `train`, `validation` or `test`.
        counterfactual: one of `COUNTERFACTUALS`; a column's whole name will do, too.
        revision: which commit of the hub's.

    Returns:
        Records with the marks `io`, `s1`, `s1+1` (the word after the first subject) and `s2`, grouped by the order of
        the names.

    Raises:
        InputError: an unknown split or counterfactual; a data set that cannot be had or read, or has other columns;
            without the package `datasets`.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    kind = counterfactual.removesuffix(_ENDING)
    if kind not in COUNTERFACTUALS:
        raise unknown_name("counterfactual", counterfactual, COUNTERFACTUALS)
    folder = _fetch(revision) if source is None else Path(source)
    found: dict[str, Record] = {}
    for number, row in enumerate(_read(folder, split), start=1):
        record = _record(row, kind, f"{source or DATASET}, {split} row {number}")
        found.setdefault(record.clean, record)
    return tuple(found.values())


def _fetch(revision: str) -> Path:
    """The folder of a revision, from the hub or its cache."""
    here_only = not hub_answers()
    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "allow_patterns": _DATA}
    try:
        return Path(snapshot_download(DATASET, local_files_only=here_only, **options))
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = "the hub cannot be reached" if here_only else first_line(error)
        raise InputError(
            f"data set {DATASET!r} at revision {revision[:40]!r} is not at hand and could not be fetched: {why}; "
            "give a folder with a copy of it"
        ) from error


def _read(folder: Path, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise InputError("MIB's data need the datasets package: pip install 'neuroplast[mib]'") from error
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected a copy of the data set {DATASET}")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with TemporaryDirectory(prefix="neuroplast-") as scratch:
            # Rows are few, and a cache of the user's would outlive a copy that has changed.
            return cast(Any, datasets.load_dataset(str(folder.absolute()), split=split, cache_dir=scratch)).to_list()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(f"split {split!r} of {folder} could not be read: {first_line(error)}") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _record(row: Mapping[str, Any], kind: str, where: str) -> Record:
    """One row as a record."""
    try:
        prompt, choices, key = row["prompt"], row["choices"], int(row["answerKey"])
        io, s = choices[key], choices[1 - key]
        named = (row["metadata"]["indirect_object"], row["metadata"]["subject"])
        template, other = row["template"], row[f"{kind}{_ENDING}"]["prompt"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{where}: expected the columns of {DATASET}, got {error!r} from {sorted(row)}") from error
    if (io, s) != named or len(choices) != 2:
        raise InputError(f"{where}: choices {choices} with answer {key} are not indirect object and subject {named}")
    at_io, at_s = ([word.start() for word in re.finditer(rf"\b{re.escape(name)}\b", prompt)] for name in (io, s))
    if not at_io or len(at_s) < 2:
        raise InputError(
            f"{where}: {prompt!r} says the indirect object {io!r} {len(at_io)} times and the subject {s!r} "
            f"{len(at_s)} times; expected 1 and 2"
        )
    after = re.compile(r"\S").search(prompt, at_s[0] + len(s))
    assert after is not None  # the subject comes again
    try:
        return Record(
            clean=prompt,
            counterfactual=other,
            answer=f" {io}",
            foil=f" {s}",
            template=template,
            group="ABBA" if at_io[0] < at_s[0] else "BABA",
            marks={"io": at_io[0], "s1": at_s[0], "s1+1": after.start(), "s2": at_s[-1]},
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
