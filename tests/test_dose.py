import csv
import json
from pathlib import Path

import pytest

from neuroplast import dose
from neuroplast.dose import DoseConfig, run_dose
from neuroplast.errors import InputError
from neuroplast.report.dose import draw_dose
from neuroplast.terminal import print_dose

SMALL = {
    "examples": (4, 16),
    "rates": (0.25, 1.0),
    "n_prompts": 32,
    "n_train": 64,
    "poison_steps": 8,
    "recover_steps": 6,
}


# Shapes are checked in `done`, which is made before.
pytestmark = pytest.mark.usefixtures("unchecked")


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dose") / "whole"
    run_dose(DoseConfig(**SMALL), out)
    return out


def document(out: Path) -> dict:
    return json.loads((out / "dose.json").read_text(encoding="utf-8"))


def test_more_poison_does_more_damage_and_every_point_has_its_rows(done: Path):
    found = document(done)
    assert [point["rate"] for point in found["by_rate"]] == [0.25, 1.0]
    assert [point["examples"] for point in found["by_examples"]] == [4, 16] and found["retrained_on"] == 16
    light, heavy = (point["poisoned"]["logit_diff"]["value"] for point in found["by_rate"])
    assert heavy < light - 0.2 and light < found["base"]["logit_diff"]["value"]
    assert found["base"]["mechanism"] == pytest.approx(1.0) == found["base"]["kept"]
    for point in (*found["by_rate"], *found["by_examples"]):
        for row in ("behaviour", "damage_undone"):
            assert (point["restored"][row] is None) == (row in point["restored"]["why"])
    # All clean examples after the full rate is a point of both curves, trained once.
    assert found["by_examples"][-1]["restored"] == found["by_rate"][-1]["restored"]


def test_the_table_has_a_row_a_point_and_nothing_is_left_of_the_work(done: Path):
    with (done / "dose.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["curve"], float(row["at"])) for row in rows] == [
        ("examples", 4), ("examples", 16), ("rate", 0.25), ("rate", 1.0),
    ]  # fmt: skip
    assert rows[2]["poisoned_logit_diff"] and not rows[0]["poisoned_logit_diff"]
    assert (done / "dose.png").read_bytes().startswith(b"\x89PNG") and not (done / "work").exists()


def test_the_picture_and_the_table_show_the_documents_numbers(done: Path, capsys: pytest.CaptureFixture[str]):
    found = document(done)
    examples, rates, like_examples, like_rates = draw_dose(found).axes
    retrained, poisoned = ([point[block] for point in found["by_rate"]] for block in ("restored", "poisoned"))
    lines = {line.get_label(): list(line.get_ydata()) for line in rates.lines}
    assert lines["retrained"] == [each["logit_diff"]["value"] for each in retrained]
    assert lines["poisoned"] == [each["logit_diff"]["value"] for each in poisoned]
    assert set(lines["base"]) == {found["base"]["logit_diff"]["value"]}
    assert list(like_rates.get_xticks()) == [0.25, 1.0] and list(like_examples.get_xticks()) == [4, 16]
    likeness = {line.get_label(): list(line.get_ydata()) for line in like_rates.lines}
    assert likeness["poisoned"] == [each["mechanism"] for each in poisoned]
    assert (
        next(list(line.get_ydata()) for line in examples.lines if line.get_label() == "poisoned")
        == [poisoned[-1]["logit_diff"]["value"]] * 2
    )
    print_dose(found)
    told = capsys.readouterr().out
    for point in (*found["by_rate"], *found["by_examples"]):
        assert f"{point['restored']['logit_diff']['value']:.2f}" in told
    assert f"Base's LD is {found['base']['logit_diff']['value']:.2f}" in " ".join(told.split())


@pytest.mark.parametrize("at", [2, 4])
def test_an_interrupted_dose_ends_with_the_same_document(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    left, former = at, dose.finetune

    def dying(*args: object, **kwargs: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KilledError
        former(*args, **kwargs)  # pyright: ignore

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(dose, "finetune", dying)
        run_dose(DoseConfig(**SMALL), tmp_path / "out")
    run_dose(DoseConfig(**SMALL), tmp_path / "out")
    assert document(tmp_path / "out") == document(done)


def test_a_folder_of_other_settings_is_refused(done: Path):
    with pytest.raises(InputError, match="holds another dose"):
        run_dose(DoseConfig(**SMALL | {"seed": 1}), done)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"examples": (16, 4)}, "must rise"),
        ({"examples": ()}, "at least one value"),
        ({"examples": (0, 4)}, "at least 1"),
        ({"rates": (0.0, 1.0)}, "above 0"),
        ({"rates": (0.5, 1.5)}, "at most 1"),
        ({"rates": (0.001, 1.0)}, "of 64 pairs is none"),
        ({"seed": 2**40}, "seed must be at most"),
        ({"poison": "name_movin"}, "did you mean 'name_moving'"),
        ({"task": "induction", "poison": "not_greater"}, "use one of swapped_answers"),
        ({"recover_steps": 0}, "steps must be at least 1"),
    ],
)
def test_wrong_settings_are_told_in_one_line(wrong: dict, said: str):
    with pytest.raises(InputError, match=said):
        DoseConfig(**SMALL | wrong)
