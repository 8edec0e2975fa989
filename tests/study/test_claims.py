from neuroplast.study.claims import build_claims


def view(share: str, value: float | None, localised: bool | None, p: float | None = 0.01) -> dict:
    null = {"n": 100, "mean": 0.2, "sd": 0.1, "p": p, "effect_size": 3.0} | (
        {} if localised is not None else {"why": "no"}
    )
    return {"circuit": {share: {"value": value, "ci95": None}, "null": null, "localised": localised}}


def comparison(
    change: float, expressed: bool | None, stored: bool | None, label: str = "corrupted", **spared: str
) -> dict:
    return {
        "verdict": {"label": label},
        "behaviour": {"change": {"value": change}},
        "expressed": view("undone", change / 10, expressed),
        "stored": view("share", 0.3, stored),
        "spared": {name: {"status": status} for name, status in spared.items()},
    }


def by_id(comparisons: dict) -> dict:
    return {claim["id"]: claim for claim in build_claims(comparisons)}


def test_a_claim_holds_when_it_holds_at_every_stage_and_shows_the_most_damaged():
    found = by_id(
        {
            "poisoned/a": comparison(-2.0, True, True, text="spared", agreement="spared"),
            "poisoned/b": comparison(-9.0, True, False, text="damaged", agreement="undefined"),
        }
    )
    expressed, stored, specific = (
        found[name] for name in ("localisation_expressed", "localisation_stored", "specificity")
    )
    assert expressed["supported"] is True and (expressed["value"], expressed["stage"]) == (-0.9, "poisoned/b")
    assert stored["supported"] is False and set(stored["by_stage"]) == {"poisoned/a", "poisoned/b"}
    assert specific["supported"] is False and specific["value"] == 0 and "damaged: text" in specific["why"]


def test_beyond_chance_and_yet_not_localised_is_said():
    found = by_id({"poisoned/a": comparison(-2.0, True, False, text="uncertain", agreement="spared")})
    assert "more than random sets, but not most" in found["localisation_stored"]["why"]
    assert found["specificity"]["supported"] is None and found["specificity"]["value"] == 0.5
    assert "uncertain: text" in found["specificity"]["why"]


def test_what_cannot_be_told_is_null_with_a_reason_unless_another_stage_refutes_it():
    found = by_id({"poisoned/a": comparison(-2.0, None, True), "poisoned/b": comparison(-1.0, True, True)})
    assert found["localisation_expressed"]["supported"] is None and found["localisation_expressed"]["why"] == "no"
    found = by_id({"poisoned/a": comparison(-2.0, None, True), "poisoned/b": comparison(-1.0, False, True)})
    assert found["localisation_expressed"]["supported"] is False
    assert found["specificity"]["supported"] is None and "none of the other tasks" in found["specificity"]["why"]


def test_without_comparisons_every_claim_is_null_with_a_reason():
    for found in (by_id({}), by_id({"poisoned/a": {"verdict": {"label": "unchanged"}}})):
        assert all(claim["supported"] is None and claim["value"] is None and claim["why"] for claim in found.values())
        assert "compare_stages" in found["specificity"]["why"]


def test_weights_that_cannot_be_told_apart_are_the_reason():
    found = by_id({"poisoned/a": {"why": "its heads share outputs"}})
    assert found["localisation_stored"]["supported"] is None
    assert found["localisation_stored"]["why"] == "its heads share outputs"
