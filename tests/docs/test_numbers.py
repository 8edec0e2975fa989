"""Commands of the pages are commands of the program, and every measured number has one on the page of numbers."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from neuroplast.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBERS, MEASURED = "docs/numbers.md", ("docs/findings.md", "docs/performance.md")
PROGRAMS = ("neuroplast", "python", "pytest")
BEFORE = ("/usr/bin/time", "-v", "time", "$")
"""What may stand before a command."""
NOT_MEASURED = {"what-decides-the-speed"}
"""Sections whose numbers are settings."""
CLI: Any = typer.main.get_command(app)


def words_of(command: str) -> list[str]:
    """A command's words from the program's name on, without what the shell adds to it."""
    words = shlex.split(command.removeprefix(".venv/bin/"), comments=True)
    while words and words[0] in BEFORE:
        words = words[1:]
    return words


def fenced(page: str) -> list[str]:
    """The commands of code blocks."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in found if language in ("", "sh", "console")]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [line for line in lines if words_of_safely(line)[:1] in (["neuroplast"], ["python"], ["pytest"])]


def words_of_safely(line: str) -> list[str]:
    """The same, of a line that may be no command."""
    try:
        return words_of(line)
    except ValueError:
        return []


def inline(page: str) -> list[str]:
    """The commands in a text that are whole: what is left out of one is an ellipsis."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [span for span in spans if words_of_safely(span)[:1] and words_of(span)[0] in PROGRAMS and "…" not in span]


def require_command(command: str) -> None:
    """Checks that a command would be taken: options, arguments and values; nothing is run."""
    program, *rest = words_of(command)
    if program == "neuroplast":
        name, *arguments = rest
        assert name in CLI.commands, f"no command {name!r}: {command}"
        CLI.commands[name].make_context(name, arguments)
    elif program == "python":
        script, *options = rest
        text = (ROOT / script).read_text(encoding="utf-8")
        for option in (word for word in options if word.startswith("--")):
            assert f'"{option}"' in text, f"{script} has no {option}"
    else:
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        where, *options = rest
        assert (ROOT / where).exists(), command
        assert not options or (options[0] == "-m" and any(each.startswith(f"{options[1]}:") for each in markers))


@pytest.mark.parametrize("page", sorted(PAGES))
def test_commands_of_code_blocks_are_taken(page: str):
    for command in fenced(PAGES[page]):
        require_command(command)


@pytest.mark.parametrize("page", [NUMBERS, *MEASURED])
def test_commands_in_the_text_are_taken(page: str):
    commands = inline(PAGES[page])
    assert len(commands) > 2
    for command in commands:
        require_command(command)


def test_a_wrong_command_is_told():
    for command in ("neuroplast studies", "neuroplast patch --out a --sender heads", "neuroplast patch --steps five"):
        with pytest.raises((AssertionError, typer.BadParameter.__base__)):  # pyright: ignore[reportArgumentType]
            require_command(command)
    with pytest.raises(AssertionError):
        require_command("python benchmarks/scaling.py --peers 2")


@pytest.mark.parametrize("page", MEASURED)
def test_every_command_that_made_a_number_is_on_the_page_of_numbers(page: str):
    listed = [words_of(command) for command in inline(PAGES[NUMBERS])]
    for command in inline(PAGES[page]):
        assert words_of(command) in listed, command


@pytest.mark.parametrize("page", MEASURED)
def test_every_section_with_numbers_is_on_the_page_of_numbers(page: str):
    sections = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings(PAGES[page])]
    linked = set(re.findall(rf"\]\({Path(page).name}#([\w-]+)\)", PAGES[NUMBERS]))
    assert set(sections) - NOT_MEASURED <= linked
    assert linked <= set(sections)


def headings(page: str) -> list[str]:
    """The titles of a page's sections."""
    return re.findall(r"^##+ (.+)$", page, re.MULTILINE)


def test_no_place_is_left_to_fill_in():
    for page, text in PAGES.items():
        assert not re.findall(r"\b[A-Z]+_(TABLE|RESULT)\b|TODO|TBD|FIXME", text), page
