"""Several runs on one page: findings, stages and restoration beside each other, and how alike their mechanisms are."""

import csv
import json
import re
from pathlib import Path

import pytest

from html_page import Page
from neuroplast.errors import InputError
from neuroplast.report import runs, write_runs_page
from synthetic_run import HOSTILE, LADDER, POISON, write_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of a model with a hostile name, and one of another poison."""
    folder = tmp_path_factory.mktemp("pair")
    return write_run(folder / "first", ladder=0), write_run(folder / "second", poisons=("name_moving",), ladder=0)


@pytest.fixture(scope="module")
def html(pair: tuple[Path, Path]) -> str:
    page, _ = write_runs_page(pair, pair[0].parent / "runs.html")
    return page.read_text(encoding="utf-8")


def text_of(html: str, section: str) -> str:
    start = html.index(f'<h2 id="{section}">')
    return " ".join(" ".join(Page(html[start : html.index("</section>", start)]).text).split())


def test_each_finding_has_a_verdict_and_a_value_by_run(html: str) -> None:
    said = text_of(html, "claims")
    assert said.count("not supported 0.62 [0.40, 0.80]") == 2
    assert said.count("undecided –") == 2


def test_stages_that_one_run_has_alone_are_left_open_in_the_other(html: str) -> None:
    said = text_of(html, "stages")
    assert f"poisoned/{POISON} −10.10 [−10.80, −9.50] –" in said
    assert "poisoned/name_moving – −10.10 [−10.80, −9.50]" in said
    assert "base 4.19 [3.49, 4.79] 4.19 [3.49, 4.79]" in said


def test_restoration_stands_beside_its_control(html: str) -> None:
    assert "0.91 [0.88, 0.94] control 0.92" in text_of(html, "restoration")


def test_the_same_mechanism_correlates_perfectly_on_the_same_prompts(html: str) -> None:
    said = text_of(html, "likeness")
    assert "first: base second: base 1.00 [1.00, 1.00]" in said
    assert "first: poisoned" not in said, "the two have no poisoned stage in common"


def test_of_many_runs_the_first_is_held_against_each(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = write_run(tmp_path / "third", ladder=0)

    def bases() -> set[str]:
        page, _ = write_runs_page((*pair, third), tmp_path / "all.html")
        said = text_of(page.read_text(encoding="utf-8"), "likeness")
        assert ("first run beside each" in said) == (runs.MOST_PAIRED < 3)
        return set(re.findall(r"(\w+): base (\w+): base", said))

    assert bases() == {("first", "second"), ("first", "third"), ("second", "third")}
    monkeypatch.setattr(runs, "MOST_PAIRED", 2)
    assert bases() == {("first", "second"), ("first", "third")}


def test_on_other_prompts_the_same_mechanism_has_the_spread_of_the_prompts(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", ladder=0)
    lines = (other / "prompts/measured.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (other / "prompts/measured.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    _, table = write_runs_page((pair[0], other), tmp_path / "runs.html")
    with table.open(encoding="utf-8", newline="") as file:
        (row,) = [r for r in csv.DictReader(file) if r["quantity"].endswith("with other: base")]
    assert float(row["value"]) == pytest.approx(1) and 0.5 < float(row["low"]) < 0.999


def test_the_table_has_every_number_of_the_page(pair: tuple[Path, Path], html: str) -> None:
    with (pair[0].parent / "runs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    (row,) = [r for r in rows if (r["run"], r["stage"], r["quantity"]) == ("second", "base", "logit_diff")]
    assert float(row["value"]) == LADDER["base"] and row["model"] == HOSTILE
    (claim,) = [r for r in rows if r["run"] == "first" and r["quantity"] == "claim/plasticity"]
    assert claim["value"] == "" and claim["why"] == "one seed only"
    quantities = {(r["run"], r["stage"], r["quantity"]): r for r in rows}
    assert quantities["first", f"recovered/{POISON}", "half_way_steps/heal/logit_diff"]["value"] == "6.5"
    at = "logit_diff at step 4 of subject_duplication and recovery, seed 0".replace("_duplication", " duplication")
    assert float(quantities["first", f"poisoned/{POISON}", at]["value"]) == pytest.approx(2.761, abs=1e-3)


def test_hostile_names_stay_text_and_the_page_asks_the_network_for_nothing(html: str) -> None:
    page = Page(html)
    assert page.count("script") == 3 and page.count("img") == 0
    assert '</script><script>alert("x")</script>' in "".join(page.text)
    assert not {"src", "action"} & {name for _, attributes in page.elements for name in attributes}


def test_models_that_began_with_other_weights_are_not_compared_head_by_head(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", circuits=False, ladder=0)
    summary = json.loads((other / "summary.json").read_text())
    summary["model"]["weights_sha256"] = "cd" * 32
    (other / "summary.json").write_text(json.dumps(summary))
    page, _ = write_runs_page((pair[0], other), tmp_path / "runs.html")
    assert "cannot be compared one by one" in text_of(page.read_text(encoding="utf-8"), "likeness")


def test_runs_of_one_name_are_told_apart_by_as_much_of_their_paths_as_that_takes(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / parent / "x/run", circuits=False, ladder=0) for parent in ("a", "b")]
    summary = json.loads((runs[1] / "stages/base/measures.json").read_text())
    summary["behaviour"]["logit_diff"] = {"mean": 9.875, "ci95": [9.5, 10.25]}
    (runs[1] / "stages/base/measures.json").write_text(json.dumps(summary))
    html = write_runs_page(runs, tmp_path / "runs.html")[0].read_text(encoding="utf-8")
    assert "a/x/run" in html and "b/x/run" in html
    assert "base 4.19 [3.49, 4.79] 9.88 [9.50, 10.25]" in text_of(html, "stages"), "each under its own name"


def test_what_cannot_be_compared_is_refused_in_a_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "runs.html"
    with pytest.raises(InputError, match="give two or more, each once"):
        write_runs_page((pair[0], pair[0]), out)
    with pytest.raises(InputError, match=r"must name a page that ends in .html, got .*runs.txt"):
        write_runs_page(pair, tmp_path / "runs.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is no finished run: it has no summary.json"):
        write_runs_page((pair[0], tmp_path / "empty"), out)
    with pytest.raises(InputError, match=r"there is no folder .*nowhere: give the run directory of a study"):
        write_runs_page((pair[0], tmp_path / "nowhere"), out)
    with pytest.raises(InputError, match="lies in one of the runs"):
        write_runs_page(pair, pair[0] / "runs.html")
    assert not out.exists()


def test_what_it_did_not_write_is_never_written_over(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page, table = write_runs_page(pair, tmp_path / "runs.html")
    write_runs_page(pair, tmp_path / "runs.html")
    for path, content in ((tmp_path / "mine.csv", "my,precious,data"), (tmp_path / "essay.html", "<h1>Mine")):
        path.write_text(content)
        with pytest.raises(InputError, match=f"{path.name} exists and is not a page of several runs, or its table"):
            write_runs_page(pair, path.with_suffix(".html"))
        assert path.read_text() == content
    assert page.is_file() and table.is_file()
