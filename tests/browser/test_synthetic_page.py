"""The page of a run whose numbers are known, and whose texts are hostile, driven as a reader would."""

from pathlib import Path

import pytest
import torch

from browser_page import Browser
from neuroplast.audit import AuditConfig, run_audit
from neuroplast.models.sources import load_model
from neuroplast.observer import Silent
from neuroplast.report import write_report, write_runs_page
from neuroplast.training.saves import save_checkpoint
from neuroplast.watch import Watch
from synthetic_run import HOSTILE, LADDER, PROMPTS, effects_of, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("browser") / "run")
    write_report(run)
    return run


@pytest.fixture
def page(browser: Browser, run: Path) -> Browser:
    browser.open(run / "report.html")
    return browser


def test_it_opens_without_an_error_and_asks_for_nothing_but_itself(page: Browser, run: Path) -> None:
    assert page.errors == []
    assert page.requests == [(run / "report.html").as_uri()]


def test_hostile_texts_are_shown_as_text(page: Browser) -> None:
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for box in page.all(".graph-figure [data-part=true]"):
        page.click(box)
    for button in page.all("#prompts-area tbody button"):
        page.click(button)
    assert HOSTILE in page.find("#prompts-area").text
    assert PROMPTS[1]["template"].strip() in page.find("#prompts-area").text
    assert "</script>" in page.find(".inspector .tokens").text
    injected = page.all("script[src], img[src='x'], #prompts-area td i, #prompts-area bdi b, .inspector i, .hint i")
    assert injected == [] and len(page.all("script")) == 7
    assert page.errors == [], "no alert, no error"


def test_right_to_left_text_does_not_turn_what_stands_beside_it(page: Browser) -> None:
    isolated = page.all("#prompts-area td.said > bdi")
    assert sorted(each.text for each in isolated) == sorted(prompt["clean"] for prompt in PROMPTS)
    order = page.run(
        "const cells = [...document.querySelectorAll('#prompts-area td.said')];"
        "const arabic = cells.find((each) => /مرحبا/.test(each.textContent));"
        "return [...arabic.children].map((each) => each.getBoundingClientRect().left)"
    )
    assert order == sorted(order), "prompt, right answer and wrong answer stand from left to right"


def test_a_very_long_name_does_not_widen_the_page(page: Browser) -> None:
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")


def test_the_slider_moves_numbers_heads_and_circuit_together(page: Browser) -> None:
    def looks() -> tuple[str, str, str, str]:
        heat = page.find("[data-part=heat] rect[data-index='210']")  # a23.h3
        node = page.find("[data-part=graph] [data-node='a23.h3@end']")
        colour = page.run("return getComputedStyle(arguments[0].querySelector('rect')).fill", node)
        return page.find("[data-part=said]").text, heat.get_attribute("fill") or "", colour, node.text

    base = looks()
    assert base[0].startswith("base, step 0") and f"logit difference {LADDER['base']:.2f}" in base[0]
    assert base[3].split() == ["a23.h3", "100", "%"]
    page.slide(3)
    poisoned = looks()
    assert poisoned[0].startswith("poisoned/subject_duplication, step 40") and "−10.10" in poisoned[0]
    assert poisoned[3].split() == ["a23.h3", "−148", "%"]
    assert base[1] != poisoned[1] and base[2] != poisoned[2]
    blue, orange = ([int(part) for part in each[2][4:-1].split(",")] for each in (base, poisoned))
    assert blue[2] > blue[0] and orange[0] > orange[2], "blue as in base, orange turned round"
    page.slide(6)
    assert looks()[0].startswith("recovered/subject_duplication, step 40")
    assert page.find("[data-part=slider]").get_attribute("aria-valuetext") == (
        "recovered/subject_duplication, step 40: logit difference 2.14 [1.89, 2.39]"
    )


def test_another_model_can_be_chosen_and_played(page: Browser) -> None:
    way = page.find("[data-part=way]")
    page.run("arguments[0].value = '1'; arguments[0].dispatchEvent(new Event('change'))", way)
    page.click(page.find("[data-part=play]"))
    assert page.find("[data-part=play]").text == "Pause"
    page.driver.implicitly_wait(0)
    waited = page.driver.execute_async_script(
        "const done = arguments[0], said = document.querySelector('[data-part=said]');"
        "const look = setInterval(() => { if (said.textContent.startsWith('tuned, step 40')) {"
        " clearInterval(look); done(document.querySelector('[data-part=play]').textContent); } }, 50);"
    )
    assert waited == "Play", "it stops at the end"


def test_pointing_at_a_node_tells_what_it_does_and_lights_its_edges(page: Browser) -> None:
    box = page.find(".graph-figure[data-stage=base] [data-node='a23.h3@end']")
    said = page.hover(box)
    for part in (
        "a23.h3@end",
        "name mover <i>",
        "score in the circuit −2.97",
        "direct effect −2.97 [",
        "attention to io 0.63",
    ):
        assert part in said
    assert "copies 50 % of the names" in said
    lit = page.all(".graph-figure[data-stage=base] .edge.lit")
    assert {each.get_attribute("data-source") for each in lit} == {"a20.h0@s2", "a23.h3@end"}
    page.run("dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert not page.find(".hint").is_displayed()


def test_a_chosen_node_shows_its_history_and_its_attention(page: Browser) -> None:
    figure = ".graph-figure[data-stage=base]"
    box = page.find(f"{figure} [data-node='a20.h0@s2']")
    page.run("arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}))", box)
    panel = page.find(f"{figure} .inspector")
    assert panel.is_displayed()
    rows = [row.text for row in page.all(f"{figure} .inspector tbody tr")]
    assert len(rows) == 5 and "poisoned" in rows[2]
    strips = page.all(f"{figure} .strip")
    assert len(strips) == 5
    query = page.find(f"{figure} .strip .token.query")
    assert query.text == "</script>", "it attends from s2, the third token behind the first"
    weights = page.run(
        "return [...arguments[0].querySelectorAll('.token')].map((each) => each.style.getPropertyValue('--weight'))",
        strips[0],
    )
    assert [float(weight) for weight in weights] == pytest.approx([0.5, 0, 0, 0.5, 0], abs=0.01)
    page.click(page.all(f"{figure} .strip .token")[1])
    assert page.find(f"{figure} .strip .token.query").text == "When", "another token attends"
    page.click(box)
    assert not panel.is_displayed(), "choosing it again closes it"


def test_prompts_are_sorted_the_worst_first_and_by_any_column(page: Browser) -> None:
    def column(number: int) -> list[str]:
        return [row.text for row in page.all(f"#prompts-area tbody tr > :nth-child({number})")]

    assert column(1) == ["2", "3", "1"]
    assert [value.replace("−", "-") for value in column(4)] == ["-0.11", "2.64", "3.64"]
    assert page.find("#prompts-area th[aria-sort=ascending]").text.startswith("Logit difference")
    page.click(page.find("#prompts-area th button[data-key=ld]"))
    assert column(1) == ["1", "3", "2"]
    page.click(page.find("#prompts-area th button[data-key=number]"))
    assert column(1) == ["1", "2", "3"]


def test_a_prompt_opens_to_what_each_head_does_on_it(page: Browser) -> None:
    page.click(page.find("#prompts-area tbody button"))
    detail = page.find("#prompts-area tr.detail")
    assert len(detail.find_elements("css selector", "svg.heat")) == 2, "base, and the stage"
    strongest = detail.find_element("css selector", ".strongest li").text
    effect = float(effects_of("recovered", 0, len(PROMPTS))[23, 3, 1])
    assert strongest == f"a23.h3 {effect:.3f}".replace("-", "−"), "the worst prompt is the second"


def test_heat_maps_take_the_keyboard(page: Browser) -> None:
    heat = page.find("[data-part=heat] svg")
    page.run(
        "arguments[0].focus(); for (const key of ['ArrowUp', 'ArrowRight'])"
        " arguments[0].dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))",
        heat,
    )
    assert "a1.h1, effect" in (heat.get_attribute("aria-label") or "")


def test_dark_and_light_are_both_readable_and_change_without_a_reload(page: Browser) -> None:
    def colours() -> tuple[str, str, str]:
        return page.run(
            "const of = (each, what) => getComputedStyle(document.querySelector(each))[what];"
            "return [of('body', 'backgroundColor'), of('body', 'color'),"
            " document.querySelector('[data-part=heat] rect').getAttribute('fill')]"
        )

    light = colours()
    page.prefer("dark")
    page.wait(lambda: colours()[2] != light[2])  # the maps are painted anew
    dark = colours()
    assert (light[0], dark[0]) == ("rgb(246, 246, 244)", "rgb(18, 21, 25)")
    assert (light[1], dark[1]) == ("rgb(26, 29, 33)", "rgb(232, 234, 237)")


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, run: Path) -> None:
    browser.open(run / "report.html", width=390)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.errors == []


def test_every_control_has_a_name_for_a_screen_reader(page: Browser) -> None:
    page.click(page.find("#prompts-area tbody button"))
    nameless = page.run(
        "const shown = document.querySelectorAll('button, select, input, [tabindex=\"0\"], svg[role=img]');"
        "return [...shown].filter((each) => !(each.getAttribute('aria-label') || each.textContent.trim()"
        " || each.closest('label') || each.getAttribute('aria-labelledby'))).map((each) => each.outerHTML)"
    )
    assert nameless == []


def test_several_runs_open_without_an_error(browser: Browser, run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", poisons=("name_moving",))
    page, _ = write_runs_page((run, other), tmp_path / "runs.html")
    browser.open(page)
    assert browser.errors == [] and browser.requests == [page.as_uri()]
    assert len(browser.all("#runs-chart polyline")) == 2, "one run has that training: two panels"
    assert "run" in browser.hover(browser.find("#runs-chart circle"))


def test_an_audits_page_opens_without_an_error_and_shows_its_maps(browser: Browser, tmp_path: Path) -> None:
    model = load_model("tiny")
    with torch.no_grad():
        model.head_weights(1)[:] *= -1
    save_checkpoint(model, tmp_path / "<b>damaged")
    few = {"n_prompts": 6, "n_battery": 4, "n_drift": 2, "n_profiles": 1, "n_random": 50, "n_samples": 3}
    run_audit(AuditConfig(tuned=str(tmp_path / "<b>damaged"), **few), tmp_path / "out")
    page = tmp_path / "out/audit.html"
    browser.open(page)
    assert browser.errors == [] and browser.requests == [page.as_uri()]
    assert "<b>damaged" in browser.find("h1").text
    assert len(browser.all("svg.heat")) == 4, "before, after, expressed, stored"
    assert "effect" in browser.hover(browser.find("svg.heat rect[data-index='9']"))


def test_a_watched_study_shows_its_growing_report_and_keeps_it_when_it_ends(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    finished = write_report(run).read_bytes()
    (run / "report.html").unlink()
    with Watch(run, Silent()) as watch:
        watch.stage("poisoned/<b>x", 1, 5)
        browser.driver.get(watch.address)
        browser.wait(lambda: "2 of 5: poisoned/<b>x" in browser.find("#stage").text)
        assert browser.find("#wait").is_displayed()
        (run / "report.html").write_bytes(finished.replace(b"<main", b"<p id='growing'>so far</p><main", 1))
        browser.wait(lambda: shows(browser, "#growing"))
        assert not browser.find("#wait").is_displayed()
        (run / "report.html").write_bytes(finished)
    browser.wait(lambda: browser.find("#status").text == "finished")
    browser.wait(lambda: shows(browser, "#timeline-area") and not shows(browser, "#growing"))
    assert len(browser.all("iframe")) == 1


def shows(browser: Browser, selector: str) -> bool:
    """Whether the report inside the page has an element."""
    frame = "[...document.querySelectorAll('iframe')].find((each) => !each.hidden)"
    return browser.run(f"const f = {frame}; return Boolean(f && f.contentDocument.querySelector('{selector}'))")
