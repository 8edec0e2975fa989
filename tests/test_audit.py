import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from neuroplast.audit import AuditConfig, judge_gate, require_gate, run_audit
from neuroplast.errors import GateError, InputError, StorageError
from neuroplast.models.sources import load_model
from neuroplast.report.audit import AUDIT_FILES, build_junit, summary_rows
from neuroplast.training.finetune import save_checkpoint

FAST = {"n_prompts": 6, "n_battery": 4, "n_drift": 2, "n_profiles": 1, "n_random": 50, "n_samples": 3}


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
        ["audit.json", "comparison.json", "prompts.jsonl", *AUDIT_FILES]
    )
    saved = json.loads((out / "audit.json").read_text())
    assert {"verdict", "expressed", "stored", "spared"} <= set(saved)
    page = (out / "audit.html").read_text()
    assert document["verdict"]["label"] in page and "http" not in page.replace("http://www.w3.org", "")
    rows = (out / "parts.csv").read_text().splitlines()
    assert rows[0].startswith("part,undoes") and any(row.startswith("a1.h0,") for row in rows)
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
    (out / "audit.json").write_text(json.dumps(broken))
    with pytest.raises(StorageError, match=r"audit\.json is damaged"):
        run_audit(AuditConfig(tuned=damaged, **FAST), out)


def test_the_same_weights_are_unchanged_and_pass_every_gate(tmp_path: Path):
    document = run_audit(AuditConfig(tuned="tiny", **FAST), tmp_path / "out", fail_on=["corrupted", "damaged:pronouns"])
    assert document["verdict"]["label"] == "unchanged" and document["expressed"]["why"].startswith("Nothing changed")
    require_gate(document)
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "0")


def document(label: str, **statuses: str) -> dict:
    return {
        "task": "ioi",
        "verdict": {"label": label, "statement": "It moved."},
        "spared": {name: {"status": status, "why": "no words"} for name, status in statuses.items()},
    }


@pytest.mark.parametrize(
    ("label", "statuses", "fail_on", "failed", "unknown"),
    [
        ("corrupted", {}, ["corrupted"], ["corrupted"], []),
        ("weakened", {}, ["corrupted", "damaged"], ["damaged"], []),
        ("weakened", {}, ["damaged:ioi"], ["damaged:ioi"], []),
        ("amplified", {"text": "spared"}, ["corrupted", "damaged"], [], []),
        ("amplified", {"text": "damaged", "agreement": "spared"}, ["damaged"], ["damaged"], []),
        ("drift", {"agreement": "damaged"}, ["damaged:agreement"], ["damaged:agreement"], []),
        ("drift", {"agreement": "undefined"}, ["damaged:agreement"], [], ["damaged:agreement"]),
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
        with pytest.raises(InputError, match="cannot tell damaged:agreement: no words"):
            require_gate(found)
    else:
        require_gate(found)
    suite = ElementTree.fromstring(build_junit(found).partition("\n")[2])
    assert bool(int(suite.get("failures"))) == bool(failed)
    assert len(suite.findall("testcase/failure")) == int(suite.get("failures"))
    skipped = sum(status == "undefined" for status in statuses.values())
    assert len(suite.findall("testcase/skipped")) == skipped


def test_what_nobody_can_fail_on_is_refused_before_anything_is_measured(tmp_path: Path):
    for wrong, near in (("corupted", "corrupted"), ("damaged:agrement", "damaged:agreement")):
        with pytest.raises(InputError, match=f"did you mean '{near}'"):
            run_audit(AuditConfig(tuned="tiny", **FAST), tmp_path / "out", fail_on=[wrong])
    assert not (tmp_path / "out").exists()
    for name, value in (("n_battery", 0), ("n_drift", -1), ("n_random", -5)):
        with pytest.raises(InputError, match=name):
            AuditConfig(tuned="tiny", **FAST | {name: value})
