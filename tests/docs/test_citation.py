"""The citation file is CFF 1.2.0, and of this version."""

from pathlib import Path

import yaml

import neuroplast

CITATION = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8"))
SOURCES = {"2503.01896", "2211.00593"}


def test_it_has_what_the_format_asks_for():
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert (CITATION["cff-version"], CITATION["type"], CITATION["license"]) == ("1.2.0", "software", "MIT")
    assert CITATION["authors"] == [{"name": "The neuroplast authors"}]
    assert all(isinstance(CITATION[key], str) and CITATION[key].strip() for key in ("message", "title", "abstract"))


def test_its_version_is_that_of_the_package():
    assert CITATION["version"] == neuroplast.__version__


def test_it_names_the_works_that_this_builds_on():
    for work in CITATION["references"]:
        assert {"type", "title", "authors"} <= set(work) and all("family-names" in each for each in work["authors"])
    named = {each["value"].removeprefix("arXiv:") for work in CITATION["references"] for each in work["identifiers"]}
    assert named == SOURCES
