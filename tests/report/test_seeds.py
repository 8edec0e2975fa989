import csv
import json
import shutil
from pathlib import Path

import pytest

from neuroplast.report import write_report
from neuroplast.report.seeds import load_over_seeds


def judged(value: float | None, why: str | None = None) -> dict:
    return {"value": value, "ci95": None if value is None else [value - 1, value + 2], "why": why}


OVER_SEEDS = {
    "over_seeds": {
        "subject_duplication": {
            "n": 3,
            "half_way_steps": {"heal": {"mechanism": judged(28.8)}},
            "restoration": {"function": {"difference": judged(None, "0 seeds have a value: it takes 3")}},
        },
        "name_moving": {"n": 3, "half_way_steps": {"heal": {"mechanism": judged(12.5)}}},
    },
    "between_poisons": [
        {
            "poisons": ["subject_duplication", "name_moving"],
            "n": 3,
            "half_way_steps": {"heal": {"mechanism": judged(-16.3)}},
        }
    ],
}


@pytest.fixture(scope="module")
def seeded(reported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("seeds") / "run"
    shutil.copytree(reported, run)
    found = json.loads((run / "plasticity.json").read_text())
    (run / "plasticity.json").write_text(json.dumps(found | OVER_SEEDS))
    write_report(run)
    return run


def test_means_over_seeds_are_read_with_the_difference_of_two_poisons(seeded: Path):
    first, second, between = load_over_seeds(seeded)
    assert (first.of, second.of, between.of) == (
        "subject_duplication",
        "name_moving",
        "name_moving − subject_duplication",
    )
    assert between.numbers["half_way_steps/heal/mechanism"].value == -16.3
    assert first.numbers["restoration/function/difference"].why


def test_they_are_in_a_table_and_on_the_page(seeded: Path):
    with (seeded / "tables/seeds.csv").open(encoding="utf-8") as file:
        rows = {(row["of"], row["quantity"]): row for row in csv.DictReader(file)}
    heal = rows["name_moving", "half_way_steps/heal/mechanism"]
    assert (heal["n_seeds"], heal["value"], heal["low"], heal["high"]) == ("3", "12.5", "11.5", "14.5")
    assert rows["subject_duplication", "restoration/function/difference"]["why"].startswith("0 seeds")
    page = (seeded / "report.html").read_text(encoding="utf-8")
    assert "What the seeds say" in page and "name moving − subject duplication" in page and "−16.3" in page


def test_one_seed_says_nothing_over_seeds(reported: Path):
    assert load_over_seeds(reported) == ()
    assert "What the seeds say" not in (reported / "report.html").read_text(encoding="utf-8")
