import pytest

from neuroplast.statistics import over_seeds
from neuroplast.study.over_seeds import numbers_of, poisons_document, seeds_document


def way(heal: float | None, coupling: float = 0.9, role: str = "name mover") -> dict:
    times = {"logit_diff": {"value": 10.0}, "mechanism": {"value": heal}}
    roles = {role: {"coupling": {"value": coupling}, "hysteresis": {"value": None}}}
    return {"half_way_steps": {"break": times, "heal": times}, "roles": roles}


def restored(mechanism: float, control: float, function: float | None = None) -> dict:
    return {"mechanism": mechanism, "function": function, "control": {"mechanism": control, "function": None}}


SEEDS = {
    "slow": [(20.0, 0.90, 0.94), (24.0, 0.91, 0.95), (25.0, 0.86, 0.93)],
    "fast": [(11.0, 0.95, 0.94), (14.0, 0.97, 0.95), (17.0, 0.93, 0.93)],
}
NUMBERS = {
    name: [numbers_of(way(heal), restored(mine, control)) for heal, mine, control in each]
    for name, each in SEEDS.items()
}


def test_the_mean_over_seeds_has_the_interval_of_another_seed():
    found = seeds_document(NUMBERS["slow"])
    expected = over_seeds([20.0, 24.0, 25.0])
    assert found["n"] == 3
    heal = found["half_way_steps"]["heal"]["mechanism"]
    assert heal["value"] == pytest.approx(23.0) and tuple(heal["ci95"]) == expected.ci95
    assert found["restoration"]["mechanism"]["difference"]["value"] == pytest.approx(-0.05)
    assert found["roles"]["name mover"]["coupling"]["value"] == pytest.approx(0.9)


def test_what_is_undefined_says_so_instead_of_being_a_mean_of_the_rest():
    found = seeds_document([numbers_of(way(heal), restored(0.9, 0.9)) for heal in (20.0, None, 25.0, 23.0)])
    heal = found["half_way_steps"]["heal"]["mechanism"]
    assert heal["value"] is None and heal["ci95"] is None and heal["why"] == "undefined at 1 of 4 seeds"
    assert found["restoration"]["function"]["difference"]["value"] is None
    assert found["roles"]["name mover"]["hysteresis"]["why"]


def test_two_poisons_are_compared_seed_by_seed():
    (found,) = poisons_document(NUMBERS)
    assert found["poisons"] == ["slow", "fast"]
    heal = found["half_way_steps"]["heal"]["mechanism"]
    expected = over_seeds([11.0 - 20.0, 14.0 - 24.0, 17.0 - 25.0])
    assert (heal["value"], tuple(heal["ci95"])) == (expected.value, expected.ci95)
    assert found["half_way_steps"]["break"]["logit_diff"]["value"] == 0
    assert poisons_document({"slow": NUMBERS["slow"]}) == [] == poisons_document({})


def test_a_role_that_one_seed_has_not_is_left_out():
    numbers = [
        numbers_of(way(1.0, role=role), restored(1.0, 1.0)) for role in ("name mover", "name mover", "induction")
    ]
    assert "roles" not in seeds_document(numbers)


def test_a_recovery_that_was_not_followed_has_its_restoration():
    found = seeds_document([numbers_of(None, restored(value, 0.9)) for value in (0.7, 0.8, 0.9)])
    assert found["restoration"]["mechanism"]["recovered"]["value"] == pytest.approx(0.8)
    assert "half_way_steps" not in found
