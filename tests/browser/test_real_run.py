"""The page of a real study of smollm2-135m, driven as a reader would.

`fixtures/smollm2_run.tar.xz` is the run directory of `neuroplast study --model smollm2-135m --preset quick --poison
subject_duplication --set 'circuit_stages=["base"]' --set circuit_random=20 --set circuit_edges=0`, without checkpoints.
"""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from browser_page import Browser
from neuroplast.report import write_report

RUN = Path(__file__).parents[1] / "fixtures" / "smollm2_run.tar.xz"
POISONED, RECOVERED = "poisoned/subject_duplication", "recovered/subject_duplication"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    with tarfile.open(RUN) as archive:
        archive.extractall(folder, filter="data")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture
def page(browser: Browser, run: Path) -> Browser:
    browser.open(run / "report.html")
    return browser


def shown(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def test_it_is_under_eight_megabytes_opens_without_an_error_and_asks_for_nothing(page: Browser, run: Path) -> None:
    assert (run / "report.html").stat().st_size < 8_000_000
    assert page.errors == [] and page.requests == [(run / "report.html").as_uri()]


def test_every_finding_has_its_verdict_value_and_evidence(page: Browser, summary: dict[str, Any]) -> None:
    rows = page.all(".claims > li")
    assert len(rows) == len(summary["claims"]) == 5
    for row, claim in zip(rows, summary["claims"], strict=True):
        verdict = {True: "supported", False: "not supported", None: "undecided"}[claim["supported"]]
        assert row.find_element("css selector", ".verdict").text == verdict
        assert claim["value"] is None or shown(claim["value"]) in row.text
        evidence = row.find_element("css selector", ".evidence").get_attribute("href") or ""
        assert page.find("#" + evidence.partition("#")[2]).is_displayed()


def test_the_slider_shows_the_circuit_turn_round_and_come_back(page: Browser) -> None:
    def mover() -> tuple[str, str]:
        node = page.find("[data-part=graph] [data-node='a29.h1@end']")
        return node.text.split("\n")[-1], page.find("[data-part=said]").text

    first = mover()
    assert first[0] == "100 %" and first[1].startswith("base, step 0")
    steps = int(page.find("[data-part=slider]").get_attribute("max") or 0)
    page.slide(steps // 2)
    strength, said = mover()
    assert said.startswith(f"{POISONED}, step 40") and "0 % right" in said
    assert strength.startswith("−") and int(strength[1:-2]) > 100, "it writes against what it wrote for"
    page.slide(steps)
    strength, said = mover()
    assert said.startswith(f"{RECOVERED}, step 40") and 0 < int(strength[:-2]) < 100


def test_pointing_at_a_head_tells_its_role_and_numbers(page: Browser, run: Path) -> None:
    looked = json.loads((run / "stages/base/heads.json").read_text(encoding="utf-8"))["heads"]["a23.h0@end"]
    said = page.hover(page.find(".graph-figure [data-node='a23.h0@end']"))
    assert "a23.h0@end" in said and "name mover" in said
    assert f"attention to io {shown(looked['attention']['io']['value'])}" in said
    assert re.search(r"direct effect −\d\.\d\d \[", said)


def test_choosing_a_head_shows_it_over_all_stages_and_on_real_prompts(page: Browser, run: Path) -> None:
    page.click(page.find(".graph-figure [data-node='a23.h0@end']"))
    panel = page.find(".graph-figure .inspector")
    for stage in ("base", "tuned", POISONED, RECOVERED, "control/equal_steps"):
        assert stage in panel.text.replace("\u200b", "").replace("\n", "")
    strips = panel.find_elements("css selector", ".strip")
    assert len(strips) == 5 and "Emily" in strips[0].text
    weights = page.run(
        "return [...arguments[0].querySelectorAll('.token')].map((each) => +each.style.getPropertyValue('--weight'))",
        strips[0],
    )
    assert sum(weights) == pytest.approx(1, abs=0.03), "all of the attention from the last token"
    chosen = panel.find_element("css selector", "select")
    page.run("arguments[0].value = '1'; arguments[0].dispatchEvent(new Event('change'))", chosen)
    assert "Emily" not in panel.find_element("css selector", ".strip").text


def test_prompts_come_worst_first_and_sort(page: Browser, run: Path) -> None:
    def column() -> list[float]:
        cells = page.run(
            "return [...document.querySelectorAll('#prompts-area tbody td.lead')].map((each) => each.textContent)"
        )
        return [float(cell.replace("−", "-")) for cell in cells]

    assert len(column()) == 64 and column() == sorted(column())
    page.click(page.find("#prompts-area th button[data-key=ld]"))
    assert column() == sorted(column(), reverse=True)
    page.click(page.find("#prompts-area tbody button"))
    assert len(page.all("#prompts-area tr.detail svg.heat rect[data-index]")) == 2 * 270


def test_it_changes_with_the_readers_colours_and_fits_a_phone(browser: Browser, run: Path) -> None:
    browser.open(run / "report.html", dark=True, width=390)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 25)"
    assert browser.errors == []
