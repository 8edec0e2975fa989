"""The site builds without a warning, its links lead somewhere, and nothing comes from the network."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import neuroplast

DOCS = Path(__file__).parents[2] / "docs"
LOADED = {"src", "srcset", "data", "poster", "action"}
"""Attributes whose address a browser goes to by itself, or on a form."""


class Page(HTMLParser):
    """The anchors of a page, where it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in LOADED or (name == "href" and tag == "link"):
                self.loads.append(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The built pages by path; a warning is an error."""
    out, scratch = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("doctrees")
    options = ["-b", "html", "-d", str(scratch), "-n", "-W", "--keep-going", "-q"]
    done = subprocess.run([sys.executable, "-m", "sphinx", *options, DOCS, out], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return {path: Page(path) for path in sorted(out.rglob("*.html"))}


def targets(pages: dict[Path, Page]) -> Iterator[tuple[Page, str]]:
    """What is linked or loaded, by page; addresses of other hosts and data in the page itself are left out."""
    for page in pages.values():
        for link in (*page.links, *page.loads):
            if not urlsplit(link).scheme:
                yield page, link


def test_every_page_is_built(site: dict[Path, Page]):
    built = {path.name for path in site}
    assert {path.with_suffix(".html").name for path in DOCS.rglob("*.md")} <= built


def test_every_internal_link_leads_to_a_file_and_an_anchor_that_are_there(site: dict[Path, Page]):
    checked = 0
    for page, link in targets(site):
        address = urlsplit(link)
        goal = (page.path.parent / unquote(address.path)).resolve() if address.path else page.path
        assert goal.is_file(), f"{page.path.name} leads to {link}, which is not there"
        if goal in site and address.fragment:
            assert unquote(address.fragment) in site[goal].anchors, f"{page.path.name}: no anchor {link}"
        checked += 1
    assert checked > 500


def test_no_page_loads_anything_from_the_network(site: dict[Path, Page]):
    for page in site.values():
        assert not [load for load in page.loads if urlsplit(load).netloc or load.startswith("//")], page.path.name
        styles = re.findall(r"<style.*?</style>|style=\"[^\"]*\"", page.text, re.DOTALL)
        assert not re.search(r"(url\(\s*[\"']?|@import\s+[\"'])(https?:)?//", "".join(styles)), page.path.name
    sheets = list(next(iter(site)).parent.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(url\(\s*[\"']?|@import\s+[\"'])(https?:)?//", text), sheet.name


def test_the_front_door_is_on_the_api_page(site: dict[Path, Page]):
    (api,) = (page for path, page in site.items() if path.name == "api.html")
    missing = [
        name for name in neuroplast.__all__ if not {f"neuroplast.{name}", f"module-neuroplast.{name}"} & api.anchors
    ]
    assert not missing


def test_docstrings_are_read_as_text(site: dict[Path, Page]):
    (api,) = (page for path, page in site.items() if path.name == "api.html")
    shown = re.sub(r"<[^>]+>", "", api.text)
    assert "problematic" not in api.text and "``" not in shown and "\\*" not in shown
