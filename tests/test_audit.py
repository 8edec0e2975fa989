import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from lora import save_adapter
from neuroplast.audit import AuditConfig, judge_gate, require_gate, run_audit
from neuroplast.circuits.circuit import Circuit
from neuroplast.circuits.files import save_circuit
from neuroplast.circuits.shape import shape_of
from neuroplast.components import parse_node
from neuroplast.errors import GateError, InputError, StorageError
from neuroplast.models.sources import TINY, load_model
from neuroplast.report.audit import build_junit, summary_rows
from neuroplast.report.audit_report import AUDIT_FILES
from neuroplast.training.saves import save_checkpoint

FAST = {"n_prompts": 6, "n_battery": 4, "n_drift": 2, "n_profiles": 1, "n_random": 50, "n_samples": 3}

# Shapes are checked in `audited`, which is made before.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose second layer's heads write the opposite."""
    folder = tmp_path_factory.mktemp("damaged") / "checkpoint"
    model = load_model("tiny")
    with torch.no_grad():
        model.head_weights(1)[:] *= -1
    save_checkpoint(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def audited(damaged: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("audit") / "out"
    return out, run_audit(AuditConfig(tuned=damaged, **FAST), out, fail_on=["undecided"])


def test_an_audit_leaves_its_files(audited: tuple[Path, dict]):
    out, document = audited
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [".lock", "audit.json", "comparison.json", "prompts.jsonl", *AUDIT_FILES]
    )
    saved = json.loads((out / "audit.json").read_text())
    assert {"verdict", "expressed", "stored", "spared"} <= set(saved)
    page = (out / "audit.html").read_text()
    assert document["verdict"]["label"] in page and not re.findall(r"https?://(?!www.w3.org)", page)
    rows = (out / "parts.csv").read_text().splitlines()
    assert rows[0].startswith("part,patched_at,undoes,undoes_low") and any(row.startswith("a1.h0,end,") for row in rows)
    assert any(section == "stored" and what == "mlps" for section, what, _, _ in summary_rows(document))


def test_tasks_that_the_tokenizer_cannot_write_are_undefined_with_a_reason(audited: tuple[Path, dict]):
    spared = audited[1]["spared"]
    assert set(spared) == {"greater_than", "induction", "agreement", "pronouns", "text"}
    assert spared["agreement"]["status"] == "undefined" and "agreement" in spared["agreement"]["why"]


def test_a_finished_audit_is_not_measured_again_and_another_is_refused(audited: tuple[Path, dict], damaged: str):
    out, document = audited
    before = (out / "audit.json").stat().st_mtime_ns
    again = run_audit(AuditConfig(tuned=damaged, **FAST), out, fail_on=["undecided"])
    assert (out / "audit.json").stat().st_mtime_ns == before and again == document
    with pytest.raises(InputError, match="another comparison"):
        run_audit(AuditConfig(tuned=damaged, **FAST | {"n_prompts": 7}), out)


def test_a_damaged_document_is_told_by_its_name(audited: tuple[Path, dict], damaged: str, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    for path in audited[0].iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    broken = json.loads((out / "audit.json").read_text())
    del broken["stored"]["sizes"]
    for text in (json.dumps(broken), "{}", '{"verdict": {"label": "drift"}}', '{"verdict": 3}'):
        (out / "audit.json").write_text(text)
        with pytest.raises(StorageError, match=r"audit\.json could not be told"):
            run_audit(AuditConfig(tuned=damaged, **FAST), out)


def test_another_configuration_is_no_checkpoint_of_the_same_model(damaged: str, tmp_path: Path):
    for name, value in (("activation_function", "relu"), ("layer_norm_epsilon", 0.5)):
        folder = tmp_path / name
        shutil.copytree(damaged, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(InputError, match=f"{name} is .* in the configuration of one"):
            run_audit(AuditConfig(tuned=str(folder), **FAST), tmp_path / "out")


def test_prompts_without_a_counterfactual_end_in_nulls_with_reasons(damaged: str, tmp_path: Path):
    records = [
        {"clean": f"Then, {a} and {b} went to the store. {b} gave a ring to", "answer": f" {a}", "foil": f" {b}"}
        for a, b in (("Mary", "John"), ("John", "Mary"), ("Anna", "Paul"))
    ]
    lines = [json.dumps(record | {"counterfactual": record["clean"]}) for record in records]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    settings = {"prompts": str(tmp_path / "own.jsonl"), "n_drift": 2, "n_random": 5, "battery": False}
    document = run_audit(AuditConfig(tuned=damaged, **settings), tmp_path / "out")
    assert document["task"] == "own prompts"
    assert document["mechanism"]["similarity"]["value"] is None and document["mechanism"]["distance"] is None


def test_a_refused_circuit_leaves_the_folder_free(damaged: str, tmp_path: Path):
    circuit = tmp_path / "circuit.json"
    save_circuit(circuit, Circuit(shape_of(load_model("tiny")), {parse_node("m0"): 1.0}))
    with pytest.raises(InputError, match="has no heads"):
        run_audit(AuditConfig(tuned=damaged, circuit=str(circuit), **FAST), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_weights_are_unchanged_and_pass_every_gate(tmp_path: Path):
    document = run_audit(AuditConfig(tuned="tiny", **FAST), tmp_path / "out", fail_on=["damaged", "damaged:pronouns"])
    assert document["verdict"]["label"] == "unchanged" and document["expressed"]["why"].startswith("Nothing changed")
    require_gate(document)
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "0")


def document(label: str, own: str = "spared", **statuses: str) -> dict:
    def entry(status: str) -> dict:
        return {"status": status, "why": "no words", "kept": {"value": 0.5, "ci95": [0.4, 0.6]}}

    return {
        "task": "ioi",
        "verdict": {"label": label, "statement": "It moved."},
        "behaviour": entry(own),
        "spared": {name: entry(status) for name, status in statuses.items()},
    }


@pytest.mark.parametrize(
    ("label", "statuses", "fail_on", "failed", "unknown"),
    [
        ("corrupted", {"own": "damaged"}, ["corrupted"], ["corrupted"], []),
        ("weakened", {"own": "damaged"}, ["corrupted", "damaged"], ["damaged"], []),
        ("drift", {"own": "damaged"}, ["damaged:ioi"], ["damaged:ioi"], []),
        ("amplified", {"text": "spared"}, ["corrupted", "damaged"], [], []),
        ("amplified", {"text": "damaged", "agreement": "spared"}, ["damaged"], ["damaged"], []),
        ("drift", {"agreement": "damaged"}, ["damaged:agreement"], ["damaged:agreement"], []),
        ("drift", {"agreement": "uncertain"}, ["damaged:agreement"], [], []),
        ("drift", {"agreement": "undefined"}, ["damaged:agreement"], [], ["damaged:agreement"]),
        ("undecided", {"own": "undefined"}, ["damaged"], [], ["damaged"]),
        ("undecided", {}, ["corrupted", "undecided"], ["undecided"], ["corrupted"]),
        ("unchanged", {}, ["corrupted", "damaged:text"], [], []),
    ],
)
def test_the_gate_fails_on_what_was_asked(label, statuses, fail_on, failed, unknown):
    found = document(label, **statuses)
    found["gate"] = judge_gate(found, fail_on)
    assert (found["gate"]["failed"], found["gate"]["unknown"]) == (failed, unknown)
    if failed:
        with pytest.raises(GateError, match=failed[0]):
            require_gate(found)
    elif unknown:
        with pytest.raises(InputError, match=f"cannot tell {unknown[0]}"):
            require_gate(found)
    else:
        require_gate(found)
    suite = ElementTree.fromstring(build_junit(found).partition("\n")[2])
    assert bool(int(suite.get("failures"))) == bool(failed)
    assert len(suite.findall("testcase/failure")) == int(suite.get("failures"))
    names = [case.get("name") for case in suite.findall("testcase")]
    assert names == ["verdict"] + ([] if label == "unchanged" else ["ioi", *(n for n in statuses if n != "own")])
    if unknown and not failed:
        assert suite.findall("testcase/skipped")


def test_what_nobody_can_fail_on_is_refused_before_anything_is_measured(tmp_path: Path):
    for wrong, near in (("corupted", "corrupted"), ("damaged:agrement", "damaged:agreement")):
        with pytest.raises(InputError, match=f"did you mean '{near}'"):
            run_audit(AuditConfig(tuned="tiny", **FAST), tmp_path / "out", fail_on=[wrong])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="a verdict takes 19 twins"):
        run_audit(AuditConfig(tuned="tiny", **FAST), tmp_path / "out", fail_on=["corrupted"])
    for name, value in (("n_battery", 0), ("n_drift", -1), ("n_random", -5)):
        with pytest.raises(InputError, match=name):
            AuditConfig(tuned="tiny", **FAST | {name: value})


def test_an_adapter_is_held_against_its_base_and_no_other(tmp_path: Path):
    adapter = save_adapter(TINY, tmp_path / "adapter", target_modules=["c_attn"])
    document = run_audit(AuditConfig(tuned=str(adapter), battery=False, **FAST), tmp_path / "out")
    groups = document["stored"]["groups"]
    assert groups["heads"]["null"]["share_of_squared_change"] == pytest.approx(1)
    assert document["stored"]["sizes"]["heads"]["share"] == pytest.approx(1)
    assert groups["heads<o>"]["null"]["share_of_squared_change"] == document["stored"]["sizes"]["mlps"]["share"] == 0
    assert document["stored"]["ledger"]["error"] <= 0.01
    other = load_model("tiny")
    with torch.no_grad():
        for weight in other.module.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    save_checkpoint(other, tmp_path / "other")
    with pytest.raises(InputError, match="is of another base"):
        run_audit(AuditConfig(model=str(tmp_path / "other"), tuned=str(adapter), **FAST), tmp_path / "again")
