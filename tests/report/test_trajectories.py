import csv
import shutil
from pathlib import Path

import pytest

from neuroplast.errors import InputError
from neuroplast.report import write_report
from neuroplast.report.reading import load_results
from neuroplast.report.trajectories import draw_plasticity, load_plasticity

STAGE = "recovered/subject_duplication"


def rows(run: Path, name: str) -> list[dict[str, str]]:
    with (run / "tables" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_step_of_both_ways_is_in_the_table_with_its_interval(reported: Path):
    found = [row for row in rows(reported, "trajectories.csv") if row["quantity"] == "logit_diff"]
    assert [(row["stage"].split("/")[0], int(row["step"])) for row in found] == [
        (kind, step) for kind in ("poisoned", "recovered") for step in (0, 1, 4, 40)
    ]
    assert all(float(row["low"]) < float(row["value"]) < float(row["high"]) for row in found)
    (last, *_) = [row for row in rows(reported, "trajectories.csv") if row["quantity"] == "circuit_faithfulness"]
    assert last["value"] == "" and last["why"].startswith("undefined")


def test_half_way_steps_coupling_and_hysteresis_are_in_a_table_with_their_nulls(reported: Path):
    found = {(row["role"], row["quantity"]): row for row in rows(reported, "plasticity.csv")}
    assert float(found["", "half_way_steps_heal_logit_diff"]["value"]) == 6.5
    coupling = found["name mover <i>", "coupling"]
    assert (float(coupling["value"]), float(coupling["random_mean"]), float(coupling["p"])) == (0.93, 0.31, 0.002)
    assert float(found["name mover <i>", "hysteresis"]["value"]) == -0.25


def test_the_picture_shows_both_ways_of_every_role(reported: Path):
    (found,) = load_plasticity(reported, load_results(reported))
    figure = draw_plasticity(found)
    over_steps, loop = figure.axes[2:]
    (line,) = [line for line in over_steps.lines if len(line.get_xdata()) == 8]
    assert list(line.get_xdata()) == [0, 1, 4, 40, 40, 41, 44, 80]
    there, back = (line for line in loop.lines if len(line.get_xdata()) == 4 and line.get_linestyle() == "-")
    assert there.get_ydata()[0] == pytest.approx(0.5 * there.get_xdata()[0])
    assert back.get_ydata()[-1] == pytest.approx(0.5 * back.get_xdata()[-1] - 0.25)
    for suffix in (".svg", ".png"):
        assert (reported / "figures" / f"trajectory-{STAGE.replace('/', '-')}{suffix}").stat().st_size > 1000


def test_the_page_tells_them_and_shows_hostile_text_as_text(reported: Path):
    page = (reported / "report.html").read_text(encoding="utf-8")
    assert "How it broke, and how it healed" in page
    assert "name mover &lt;i&gt;" in page and "name mover <i>" not in page
    assert "<b>within the noise</b>" not in page
    assert "breaking 4: hinders, healing 40: helps" in page


def test_a_run_that_was_not_followed_has_no_such_section(run: Path):
    (run / "plasticity.json").unlink()
    for path in run.rglob("trajectory.json"):
        path.unlink()
    page = write_report(run).read_text(encoding="utf-8")
    assert "How it broke" not in page and rows(run, "plasticity.csv") == []


def test_a_damaged_trajectory_is_named(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "stages" / STAGE / "trajectory.json").write_text('{"points": [{"step": "x"}]}', encoding="utf-8")
    with pytest.raises(InputError, match=r"trajectory\.json"):
        write_report(copy)
