import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_readmes_python_runs_and_says_what_it_promises(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "logit difference" in printed and "logits when patched" in printed and "report.html" in printed
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()


def test_no_place_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_TABLE\b|TODO|TBD", README)
