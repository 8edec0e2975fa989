"""The CSV tables hold the saved numbers at full precision."""

import csv
import json
from pathlib import Path

import pytest


def rows(run: Path, name: str) -> list[dict[str, str]]:
    with (run / "tables" / name).open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def test_heads_to_logits_holds_every_head_of_every_point(reported: Path) -> None:
    table = rows(reported, "heads_to_logits.csv")
    saved = json.loads((reported / "stages/poisoned/subject_duplication/measures.json").read_text())
    found = {row["head"]: row for row in table if row["stage"] == saved["id"] and row["step"] == "40"}
    assert len(table) == 9 * 30 * 9
    assert len(found) == 30 * 9
    for layer in range(30):
        for head in range(9):
            for part in ("mean", "low", "high"):
                assert float(found[f"a{layer}.h{head}"][part]) == saved["heads_to_logits"][part][layer][head]


def test_stages_holds_the_planted_values_and_leaves_nulls_empty(reported: Path) -> None:
    table = rows(reported, "stages.csv")
    assert [row["stage"] for row in table[:3]] == ["base", "tuned", "tuned"]
    recovered = next(row for row in table if row["kind"] == "recovered" and row["step"] == "40")
    assert float(recovered["logit_diff"]) == pytest.approx(2.14)
    assert float(recovered["logit_diff_low"]) == pytest.approx(1.44)
    assert recovered["restoration_damage_undone"] == "0.936"
    assert recovered["restoration_damage_undone_high"] == "0.96"
    assert recovered["control_mechanism"] == "0.92"
    assert recovered["control_structure"] == recovered["control_damage_undone"] == ""
    assert (recovered["restoration_transfer"], recovered["restoration_function_high"]) == ("0.875", "1.205")
    assert recovered["poison"] == "subject_duplication"
    assert recovered["counterfactual"] == "abc"


def test_sign_flips_holds_exactly_the_planted_ones(reported: Path) -> None:
    table = rows(reported, "sign_flips.csv")
    assert [(row["stage"].split("/")[0], row["head"]) for row in table] == [
        ("poisoned", "a23.h3"),
        ("poisoned", "a24.h4"),
        ("poisoned", "a29.h1"),
        ("recovered", "a29.h1"),
    ]
    assert (float(table[0]["base_mean"]), float(table[0]["mean"])) == (-2.97, 4.4)


def test_training_chains_the_steps_from_base(reported: Path) -> None:
    table = rows(reported, "training.csv")
    assert len(table) == 4 * 41
    recovered = [row for row in table if row["stage"].startswith("recovered")]
    assert (recovered[0]["step"], recovered[0]["step_from_base"]) == ("0", "40")
    assert recovered[0]["loss"] == ""
    assert float(recovered[0]["logit_diff"]) == -10.1
    assert recovered[-1]["step_from_base"] == "80"


def test_circuits_has_a_row_a_point_and_says_why_one_is_missing(reported: Path) -> None:
    table = rows(reported, "circuits.csv")
    assert len(table) == 9
    final = {row["stage"].split("/")[0]: row for row in table}
    base, tuned, poisoned, recovered = (final[kind] for kind in ("base", "tuned", "poisoned", "recovered"))
    assert (base["n_nodes"], base["n_edges"], float(base["sparsity"])) == ("3", "3", 3 / (30 * 9 * 2))
    assert (base["F_model"], base["faithfulness"], base["faithfulness_low"]) == ("4.19", "1.04", "0.79")
    assert (base["random_mean"], base["random_max"], base["minimality_passing"]) == ("0.11", "0.37", "2")
    assert (base["stability_nodes_low"], base["stability_edges_low"]) == ("0.57", "")
    assert poisoned["faithfulness"] == "" and poisoned["random_unit"] == "F, in logits"
    assert (recovered["n_nodes"], recovered["transfer_faithfulness"]) == ("2", "0.875")
    assert (recovered["nodes_jaccard"], recovered["nodes_floor"]) == (str(2 / 3), "0.77")
    assert tuned["n_nodes"] == "" and tuned["why"] == "circuits were not discovered in this preset"
    assert base["why"] == ""


def test_circuit_nodes_has_every_node_with_role_and_stability(reported: Path) -> None:
    table = rows(reported, "circuit_nodes.csv")
    found = [(row["stage"].split("/")[0], row["node"]) for row in table]
    assert found == [
        *(("base", name) for name in ("a20.h0@s2", "a23.h3@end", "a24.h4@end")),
        *(("poisoned", name) for name in ("a20.h0@s2", "a23.h3@end", "a24.h4@end")),
        *(("recovered", name) for name in ("a23.h3@end", "a24.h4@end")),
    ]
    mover = table[1]
    assert (mover["layer"], mover["head"], mover["position"], mover["score"]) == ("23", "3", "end", "-2.97")
    assert (mover["role"], mover["frequency"]) == ("name mover <i>", "0.625")
    assert (table[0]["role"], table[0]["frequency"]) == ("", "")
