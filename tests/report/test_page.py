"""The page: complete in itself, safe with any name, one colour scale, the same bytes every time."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from neuroplast.report import write_report

MAX_BYTES = 8_000_000
LOADING = {"src", "srcset", "href", "data", "poster", "action", "background", "formaction"}


class Page(HTMLParser):
    """Collects elements, visible text and the text of each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        inside = self.elements[-1][0] if self.elements else ""
        if inside == "script" and self.scripts and not data.isspace():
            self.scripts[-1] += data
        self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    def document(self, element_id: str) -> Any:
        scripts = [attributes for tag, attributes in self.elements if tag == "script"]
        return json.loads(self.scripts[[s.get("id") for s in scripts].index(element_id)])


def own_part(html: str) -> str:
    """The page without plotly.js, which names addresses that it never asks for here."""
    library = get_plotlyjs()
    assert html.count(library) == 1
    return html.replace(library, "")


@pytest.fixture
def html(reported: Path) -> str:
    return (reported / "report.html").read_text(encoding="utf-8")


def test_the_page_is_under_its_size_and_beside_figures_and_tables(run: Path) -> None:
    page = write_report(run)
    assert page == run / "report.html"
    assert page.stat().st_size < MAX_BYTES
    names = ["head_effects.png", "logit_diff_by_stage.png", "logit_diff_over_training.png"]
    assert sorted(path.name for path in (run / "figures").iterdir()) == names
    assert all((run / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_hostile_names_stay_text(html: str) -> None:
    page = Page(html)
    assert page.count("script") == 4
    assert page.count("img") == 0
    assert "</script><script>alert" not in html
    assert '</script><script>alert("x")</script><img src=x onerror=alert(1)>' in "".join(page.text)
    assert "</code></pre><b>bold</b>" not in html


def test_hostile_poison_names_stay_text_in_charts(make_run: Callable[..., Path]) -> None:
    poison = "</script><b>%{x}$"
    html = write_report(make_run(poisons=(poison.replace("/", "-"),))).read_text(encoding="utf-8")
    titles = [note["text"] for note in Page(html).document("charts")["heads-0"]["layout"]["annotations"]]
    assert titles[2] == "poisoned<br>&lt;-script&gt;&lt;b&gt;%{x}$"


def test_the_page_asks_the_network_for_nothing(html: str) -> None:
    own = own_part(html)
    page = Page(own)
    targets = [(a, v) for _, attributes in page.elements for a, v in attributes.items() if a in LOADING]
    assert set(targets) == {("href", "data:,"), ("href", "#main")}
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", own)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_all_heat_maps_share_one_scale_around_zero_and_one_bar(html: str) -> None:
    chart = Page(html).document("charts")["heads-0"]
    assert len(chart["data"]) == 5
    assert {trace["coloraxis"] for trace in chart["data"]} == {"coloraxis"}
    assert not any(key in trace for trace in chart["data"] for key in ("zmin", "zmax", "colorscale", "colorbar"))
    axis = chart["layout"]["coloraxis"]
    assert [key for key in chart["layout"] if key.startswith("coloraxis")] == ["coloraxis"]
    largest = max(abs(value) for trace in chart["data"] for row in trace["z"] for value in row)
    assert (axis["cmin"], axis["cmid"], axis["cmax"]) == (-largest, 0, largest)


def test_seeds_share_the_scale_too(make_run: Callable[..., Path]) -> None:
    charts = Page(write_report(make_run(seeds=3)).read_text(encoding="utf-8")).document("charts")
    assert {"heads-0", "heads-1", "heads-2"} < set(charts)
    bounds = {charts[f"heads-{seed}"]["layout"]["coloraxis"]["cmax"] for seed in range(3)}
    assert len(bounds) == 1


def test_hovering_shows_the_head_and_its_interval(html: str) -> None:
    base = Page(html).document("charts")["heads-0"]["data"][0]
    assert base["customdata"][23][3] == ["a23.h3", "[−3.287, −2.653]"]


def test_every_table_has_a_caption_and_every_scroller_takes_the_keyboard(html: str) -> None:
    page = Page(html)
    assert page.count("table") == page.count("caption") > 4
    scrollers = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    assert scrollers
    assert all(s["tabindex"] == "0" and s["role"] == "region" and s["aria-label"] for s in scrollers)
    assert page.count("main") == page.count("h1") == 1


def test_reasons_verdicts_and_the_story_are_on_the_page(html: str) -> None:
    text = " ".join("".join(Page(own_part(html)).text).split())
    assert "The logit difference is 4.19 at base and 11.30 after clean fine-tuning." in text
    assert "Subject duplication takes it to −10.10; 40 clean steps bring it to 2.14" in text
    assert "circuits were not discovered in this preset" in text
    for verdict in ("supported", "not supported", "undecided"):
        assert f" {verdict} " in text


def test_without_flips_the_page_says_so(make_run: Callable[..., Path]) -> None:
    page = write_report(make_run(poisons=())).read_text(encoding="utf-8")
    assert "No head flipped sign against base in any stage." in page


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_half_written(run: Path) -> None:
    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}

    write_report(run)
    once = everything()
    write_report(run)
    assert everything() == once
    assert not [name for name in once if name.endswith(".partial")]
