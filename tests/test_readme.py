import re
from pathlib import Path

import pytest

from left_out import without_shape_checks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_python_runs_and_says_what_it_promises(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    with without_shape_checks():
        exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "logit difference" in printed and "logits when patched" in printed and "report.html" in printed
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()


def test_it_can_be_read_in_a_minute():
    assert len(README.splitlines()) <= 150


def test_its_links_lead_to_files_that_are_there():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 15
    assert not [link for link in links if not (ROOT / link).is_file()]


def test_every_page_of_the_documentation_is_linked():
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")} - {"docs/index.md"}
    assert not [page for page in sorted(pages) if f"]({page}" not in README]


def test_its_numbers_stand_in_the_findings_too():
    table = README.partition("## What it finds")[2].partition("\n## ")[0]
    findings = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    numbers = re.findall(r"\d+\.\d+ (?:\[[^\]]+\]|± \d+\.\d+)", table)
    assert len(numbers) >= 6
    assert not [number for number in numbers if number not in findings]


def test_no_place_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_(TABLE|RESULT)\b|TODO|TBD", README)
