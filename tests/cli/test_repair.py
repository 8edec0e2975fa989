import json
from pathlib import Path

import pytest

from neuroplast import repair

SMALL = ("--n-prompts", "16", "--n-battery", "0", "--quiet")


def test_what_is_not_damaged_is_told_as_json(run, tmp_path: Path):
    code, out, _ = run("repair", "tiny", "tiny", "--out", str(tmp_path / "out"), "--json", *SMALL)
    document = json.loads(out)
    assert code == 0 and document["strategy"] is None and document["statement"].startswith("Nothing to mend")
    assert all(Path(path).is_file() for path in document["files"].values())


def test_one_model_is_the_damaged_one_and_three_are_too_many(run, tmp_path: Path):
    code, _, err = run("repair", "tiny", "--out", str(tmp_path / "a"), "--strategy", "graft", *SMALL)
    assert code == 2 and "give the base" in err and not (tmp_path / "a").exists()
    code, _, err = run("repair", "tiny", "tiny", "tiny", "--out", str(tmp_path / "b"), *SMALL)
    assert code == 2 and "got 3 models" in err


def test_a_target_that_is_not_reached_exits_3_after_the_table(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = {
        "score": 0.4,
        "damage_undone": 0.5,
        "ci95": {"damage_undone": [0.3, 0.6]},
        "logit_diff": {"value": 1.25, "ci95": None},
    }
    cost = {"n_parts": None, "parameters_share": 1.0, "steps": 8, "examples": 128}
    document = {
        "reached": False,
        "strategy": "full",
        "cost": cost,
        "statement": "Not mended: 40% where the target is 90%.",
        "frontier": [{"strategy": "full", "cost": cost, "restored": found}],
        "spared": {"text": {"against_poisoned": {"status": "damaged", "kept": {"value": 0.7, "ci95": [0.6, 0.8]}}}},
        "new_damage": ["text"],
        "function_in_base": {"faithfulness": {"value": 0.63, "ci95": [0.5, 0.7]}},
        "restoration": {
            "function": 0.54,
            "function_random": {"n": 20, "mean": -1.1, "max": -0.96},
            "ci95": {"function": [0.25, 0.89]},
        },
        "files": {"repair.json": "x"},
    }
    monkeypatch.setattr(repair, "run_repair", lambda *_, **__: document)
    code, out, err = run("repair", "tiny", "tiny", "--out", str(tmp_path), *SMALL)
    assert code == 3 and "0.50 [0.30, 0.60]" in out and "New damage: text." in out
    told = " ".join(out.split())
    assert "gives 0.54 [0.25, 0.89] of the mended model's logit difference, 20 random ones -0.96 at most" in told
    assert "of base's, 0.63 [0.50, 0.70]" in told
    assert err.strip() == "error: Not mended: 40% where the target is 90%."
