"""Reading a run back, and what is derived from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fuzz_readers import comparison_of
from neuroplast.errors import InputError
from neuroplast.report import write_report
from neuroplast.report.changes import sign_flips, training_paths
from neuroplast.report.places import load_places
from neuroplast.report.reading import load_results

Edit = Callable[[dict], object]


def edited(run: Path, name: str, edit: Edit) -> Path:
    path = run / name
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return run


def test_exactly_the_planted_heads_flipped_sign_largest_first(run: Path) -> None:
    results = load_results(run)
    found = {s.kind: [f.head for f in sign_flips(s, results.base_of(s))] for s in results.stages}
    assert found == {
        "base": [],
        "tuned": [],
        "poisoned": ["a23.h3", "a24.h4", "a29.h1"],
        "recovered": ["a29.h1"],
        "control": [],
    }


def test_an_interval_that_holds_zero_is_no_flip(run: Path) -> None:
    def widen(measures: dict) -> None:
        measures["heads_to_logits"]["low"][29][1] = -0.01

    edited(run, "stages/poisoned/subject_duplication/measures.json", widen)
    results = load_results(run)
    poisoned = next(stage for stage in results.stages if stage.kind == "poisoned")
    assert [flip.head for flip in sign_flips(poisoned, results.base_of(poisoned))] == ["a23.h3", "a24.h4"]


def test_the_last_point_of_an_id_is_final_and_the_rest_is_its_ladder(run: Path) -> None:
    results = load_results(run)
    assert [stage.step for stage in results.stages] == [0, 40, 40, 40, 40]
    assert [(stage.epoch, stage.step) for stage in results.ladder] == [(1, 20)] * 4


def test_a_recovered_stage_continues_the_poisoned_one_on_the_training_axis(run: Path) -> None:
    spans = {path.stage.kind: (path.start, path.end) for path in training_paths(load_results(run))}
    assert spans == {"tuned": (0, 40), "poisoned": (0, 40), "recovered": (40, 80), "control": (0, 40)}


def test_parents_in_a_circle_do_not_hang(run: Path) -> None:
    edited(run, "stages/tuned/measures.json", lambda m: m.update(parent="tuned"))
    assert len(training_paths(load_results(run))) == 4


def test_a_null_keeps_its_reason(make_run: Callable[..., Path]) -> None:
    recovered = next(stage for stage in load_results(make_run(circuits=False)).stages if stage.kind == "recovered")
    structure = {row.name: row for row in recovered.restoration}["structure"]
    assert structure.recovered.value is None
    assert structure.recovered.why == "circuits were not discovered in this preset"


def test_optional_files_may_be_absent(run: Path) -> None:
    for name in ("manifest.json", "study.toml", "stages/tuned/train.jsonl"):
        (run / name).unlink()
    assert write_report(run).is_file()


@pytest.mark.parametrize("name", ["summary.json", "stages/base/measures.json", "stages/tuned/epoch-1/measures.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[1]", "null"])
def test_a_missing_or_broken_file_is_named_in_one_line(run: Path, name: str, content: str | None) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        write_report(run)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("summary.json", lambda d: d.pop("model"), "n_layers"),
        ("summary.json", lambda d: d["model"].update(n_layers="30"), "a number"),
        ("summary.json", lambda d: d.update(stages=[]), "no base stage"),
        ("summary.json", lambda d: d["stages"][0].update(id="../../base"), "no stage id"),
        ("summary.json", lambda d: d["stages"][0].update(id="a\nb"), r"'a\nb' is no stage id"),
        ("stages/tuned/heads.json", lambda d: d["positions"].update({"a\nb": 3}), r"'a\nb': expected a list"),
        ("summary.json", lambda d: d["claims"][0].update(supported="yes"), "supported"),
        ("stages/base/measures.json", lambda d: d.update(kind="broken"), "kind"),
        ("stages/base/measures.json", lambda d: d.update(id="other"), "expected 'base'"),
        ("stages/base/measures.json", lambda d: d["heads_to_logits"]["low"].pop(), "30 layers x 9 heads"),
        ("stages/base/measures.json", lambda d: d["heads_to_logits"]["mean"][0].pop(), "30 layers x 9 heads"),
        ("stages/base/measures.json", lambda d: d["behaviour"]["logit_diff"].update(mean=None), "mean"),
        ("stages/base/measures.json", lambda d: d["behaviour"].update(top1=float("nan")), "finite"),
        ("stages/base/measures.json", lambda d: d["behaviour"]["logit_diff"].update(ci95=[1]), "[low, high]"),
        ("stages/base/measures.json", lambda d: d["behaviour"].update(top1=10**400), "a number of 401 digits"),
        ("stages/base/measures.json", lambda d: d["behaviour"].update(top1="\ud800"), "surrogates not allowed"),
        ("stages/base/criteria.json", lambda d: d["evaluation"]["minimality"].update(passing="2"), "passing"),
        (
            "stages/base/criteria.json",
            lambda d: d["evaluation"]["random"].update(mean=float("inf")),
            "Infinity, which is no finite",
        ),
        ("stages/base/criteria.json", lambda d: d["evaluation"]["mean_of_ratios"].update(value="1"), "mean of ratios"),
        ("stages/base/criteria.json", lambda d: d["evaluation"].pop("methodology"), "methodology"),
        ("stages/base/criteria.json", lambda d: d["evaluation"].pop("by_group"), "evaluation is damaged ('by_group')"),
        ("stages/base/circuit.json", lambda d: d.pop("cfg"), "circuit.json is no circuit"),
        ("stages/base/circuit.json", lambda d: d["cfg"].update(n_layers=4), "circuit.json"),
    ],
)
def test_a_wrong_value_is_refused_by_file_and_key(run: Path, name: str, edit: Edit, said: str) -> None:
    edited(run, name, edit)
    with pytest.raises(InputError) as caught:
        write_report(run)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("odd", [{"ci95": [1.0]}, {"value": "1"}, {"ci95": {"0": 1, "1": 2}}])
def test_a_comparison_that_is_damaged_is_named(run: Path, odd: dict[str, Any]) -> None:
    name = "stages/poisoned/subject_duplication/comparison.json"
    document = comparison_of(name)
    document["behaviour"]["logit_diff"]["start"].update(odd)
    (run / name).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError, match=r"comparison\.json is damaged"):
        load_places(run, load_results(run).stages, has_circuit=True)


def test_a_report_is_not_written_through_a_link(run: Path, tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (run / "tables").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"run directory .* holds the link tables, which leads out of it"):
        write_report(run)
    assert not list(elsewhere.iterdir()) and not (run / "report.html").exists()


def test_a_broken_training_log_is_named(run: Path) -> None:
    (run / "stages/tuned/train.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"train\.jsonl line 1"):
        load_results(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InputError, match="no finished run"):
        write_report(tmp_path)


def test_a_circuit_that_was_judged_must_be_there(run: Path) -> None:
    (run / "stages/base/circuit.json").unlink()
    with pytest.raises(InputError, match=r"could not read .*circuit\.json"):
        load_results(run)


def test_a_circuit_is_read_with_its_criteria_only_where_it_was_judged(run: Path) -> None:
    results = load_results(run)
    found = {stage.kind: stage.circuit for stage in results.stages}
    assert [kind for kind, circuit in found.items() if circuit] == ["base", "poisoned", "recovered"]
    assert not any(point.circuit for point in results.ladder)
    poisoned = found["poisoned"]
    assert poisoned and poisoned.criteria.faithfulness.value is None
    assert poisoned.criteria.faithfulness.why == "undefined: the interval of F(M) includes 0"
    assert poisoned.criteria.model.known == -10.1
    recovered = next(stage for stage in results.stages if stage.kind == "recovered")
    assert (recovered.transfer.value, recovered.base_circuit.value) == (0.875, 0.955)
    assert (recovered.nodes.floor, recovered.edge_circuit_jaccard) == (0.77, 0.8125)
