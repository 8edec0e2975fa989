from neuroplast.study.claims import build_claims


def view(share: str, value: float | None, localised: bool | None) -> dict:
    null = {"n": 100, "mean": 0.2, "sd": 0.1, "p": 0.01, "effect_size": 3.0, "why": None}
    null |= {} if localised is not None else {"p": None, "why": "no"}
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


def tuned(value: float | None, localised: bool | None) -> dict:
    null = {"n": 100, "mean": 0.2, "sd": 0.1, "p": None if localised is None else 0.01, "why": "too few"}
    found = {"value": value, "ci95": None, "null": null, "localised": localised}
    return {"kind": "tuned", "amplification": found if value is not None else found | {"why": "no circuit"}}


def recovered(
    undone: float | None, interval: tuple | None, function: tuple | None = None, random: float | None = None
) -> dict:
    return {
        "kind": "recovered",
        "restoration": {
            "damage_undone": undone,
            "function": None if function is None else sum(function) / 2,
            "ci95": {"damage_undone": interval, "function": function},
            "control": {"damage_undone": 0.9},
            "why": {"damage_undone": "within the noise"},
        },
        "base_circuit": None if random is None else {"random": {"n": 9, "max": random}},
    }


def by_id(comparisons: dict, measures: dict | None = None) -> dict:
    return {claim["id"]: claim for claim in build_claims(measures or {}, comparisons)}


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
    assert "decides" not in stored["why"], "the stage that is shown decides by itself"
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


def test_amplification_is_supported_where_most_of_the_change_strengthens_the_circuit():
    claim = by_id({}, {"tuned": tuned(0.8, True)})["amplification"]
    assert claim["supported"] is True and claim["value"] == 0.8 and "p = 0.010" in claim["why"]
    assert by_id({}, {"tuned": tuned(0.3, False)})["amplification"]["supported"] is False
    assert by_id({}, {"tuned": tuned(0.3, None)})["amplification"]["why"] == "too few"
    undecided = {"n": 100, "mean": 0.2, "sd": 0.1, "p": 0.01, "why": None}
    unsure = {"kind": "tuned", "amplification": tuned(0.6, None)["amplification"] | {"null": undecided}}
    claim = by_id({}, {"tuned": unsure})["amplification"]
    assert claim["supported"] is None and "most of the change is not decided" in claim["why"]
    nothing = by_id({}, {"tuned": tuned(None, None)})["amplification"]
    assert nothing["supported"] is None and nothing["why"] == "no circuit"


def test_plasticity_asks_for_most_of_the_damage_undone_and_for_the_circuit_at_work_again():
    def verdict(*arguments) -> bool | None:
        return by_id({}, {"recovered/a": recovered(*arguments)})["plasticity"]["supported"]

    assert verdict(0.9, (0.8, 0.95), (0.4, 0.6), 0.1) is True
    assert verdict(0.9, (0.8, 0.95)) is True  # the circuit was not tried, and this is said
    assert verdict(0.9, (0.8, 0.95), (0.4, 0.6), 0.7) is False
    assert verdict(0.9, (0.8, 0.95), (0.4, 0.6), 0.5) is None
    assert verdict(0.3, (0.2, 0.4), (0.4, 0.6), 0.1) is False
    assert verdict(0.6, (0.4, 0.8), (0.4, 0.6), 0.1) is None
    assert verdict(None, None) is None


def test_the_poorest_recovery_is_shown_and_one_that_failed_refutes():
    found = by_id({}, {"recovered/a": recovered(0.9, (0.8, 0.95)), "recovered/b": recovered(0.2, (0.1, 0.3))})
    assert found["plasticity"]["stage"] == "recovered/b" and found["plasticity"]["supported"] is False
    assert "not measured" in found["plasticity"]["why"]


def test_three_seeds_are_the_unit_and_the_claim_has_to_hold_by_their_interval():
    def claim(*values: float | None) -> dict:
        stages = {
            f"seed{seed}/recovered/a": recovered(value, None if value is None else (value - 0.04, value + 0.04))
            for seed, value in enumerate(values)
        }
        return by_id({}, stages)["plasticity"]

    found = claim(0.80, 0.81, 0.82)
    assert abs(found["value"] - 0.81) < 1e-9 and found["ci95"][0] < 0.79 and found["supported"] is True
    assert "mean over 3 seeds" in found["why"] and len(found["by_stage"]) == 3
    spread = claim(0.55, 0.9, 0.56)
    assert spread["ci95"][0] < 0.5 and spread["supported"] is None, "though every seed's own prompts say so"
    assert claim(0.55, 0.9, None)["value"] is None, "the poorest is shown, and two seeds are no unit"


def test_where_the_shown_stage_does_not_decide_the_one_that_does_is_named():
    found = by_id({"poisoned/a": comparison(-2.0, False, True), "poisoned/b": comparison(-9.0, True, True)})
    expressed = found["localisation_expressed"]
    assert (expressed["supported"], expressed["value"], expressed["stage"]) == (False, -0.9, "poisoned/b")
    assert expressed["why"].endswith("; poisoned/a decides: -0.20")
