"""Pages do what they say: commands after a `$` and Python snippets run, in their order, and shown lines come out."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from forked import run_forked
from walk import walk

DOCS = Path(__file__).parents[2] / "docs"
HOW_TOS = [f"how-to/{name}" for name in ("add-a-task", "add-a-task-in-python", "add-a-poison", "add-a-model-family")]
LEFT_OUT = "…"
STATUS = "echo $?"
NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?")
NAME = re.compile(r"[a-z]\d")
"""What a name of a part has and a number has not."""


@dataclass(frozen=True)
class Step:
    """A command or a snippet, and what the page shows of its output."""

    code: str
    shown: tuple[str, ...]
    is_python: bool = False


def steps_of(page: str) -> list[Step]:
    """The commands of console blocks, and the snippets with the text block behind them, in order."""
    found: list[Step] = []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        if language == "python":
            found.append(Step(block, (), is_python=True))
        elif language == "text":
            found[-1] = Step(found[-1].code, tuple(block.splitlines()), is_python=True)
        elif language == "console":
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, *shown = part.splitlines()
                found.append(Step(command, tuple(shown)))
    return found


def is_same(shown: str, printed: str) -> bool:
    """Whether two words say the same; numbers may differ a little, for machines round differently."""
    if NUMBER.sub("#", shown) != NUMBER.sub("#", printed) or NAME.search(shown):
        return shown == printed
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    numbers = ([float(number.replace("−", "-")) for number in pair] for pair in pairs)
    return all(abs(a - b) <= 0.1 + 0.1 * abs(a) for a, b in numbers)


def stands_in(line: str, printed: str) -> bool:
    """Whether a shown line is a printed one, or the beginning of one where it ends with an ellipsis."""
    words, others = line.split(), printed.split()
    if words[-1] == LEFT_OUT:
        words = words[:-1]
        others = others[: len(words)]
    return len(words) == len(others) and all(map(is_same, words, others))


def require_shown(step: Step, printed: str) -> None:
    """Every shown line comes out, in this order, one after the other where no ellipsis stands between them."""
    lines, at, may_skip = printed.splitlines(), 0, False
    for shown in step.shown:
        if shown == LEFT_OUT:
            may_skip = True
            continue
        here = lines[at:] if may_skip else lines[at : at + 1]
        found = next((number for number, line in enumerate(here, at) if stands_in(shown, line)), None)
        assert found is not None, f"{step.code}\ndid not print\n{shown}\nbut\n{printed}"
        at, may_skip = found + 1, False


@pytest.mark.parametrize("pages", [["tutorial"], HOW_TOS], ids=["tutorial", "how-to"])
def test_what_pages_run_prints_what_they_show(pages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps = [(page, step) for page in pages for step in steps_of((DOCS / f"{page}.md").read_text(encoding="utf-8"))]
    run = [(page, step.code, step.is_python) for page, step in steps if step.code != STATUS]
    assert {page for page, *_ in run} == set(pages)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, out, err = run_forked(lambda: json.dump(walk(run), sys.stdout), tmp_path)
    assert code == 0, err
    results = iter(json.loads(out))
    status = 0
    for (page, step), (_, following) in zip(steps, [*steps[1:], ("", None)], strict=True):
        if step.code == STATUS:
            assert step.shown == (str(status),), page
            continue
        status, printed = next(results)
        require_shown(step, printed)
        if following is None or following.code != STATUS:
            assert status == 0, f"{step.code} ended with {status}:\n{printed}"


def test_a_line_that_is_not_printed_fails():
    step = Step("patch", ("a3.h4 -0.457", LEFT_OUT, "LD: clean 2.77"))
    require_shown(step, "a3.h4  -0.462\na1.h1 -0.3\nLD: clean 2.80\n")
    for printed in ("a3.h5 -0.457\nLD: clean 2.77", "a3.h4 -0.9\nLD: clean 2.77", "a3.h4 -0.457\n"):
        with pytest.raises(AssertionError):
            require_shown(step, printed)
