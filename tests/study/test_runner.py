import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from forked import die_in
from left_out import without_report, without_shape_checks
from neuroplast.circuits.files import load_circuit
from neuroplast.errors import InputError, StorageError, UnsupportedModelError
from neuroplast.interventions.ablation import build_ablation
from neuroplast.interventions.knockout import run_knockouts
from neuroplast.models.sources import load_model
from neuroplast.observer import Silent
from neuroplast.study import StudyConfig, build_config, measure, run_study, runner
from neuroplast.study.artefacts import Artefacts
from neuroplast.study.circuits import load_circuits
from neuroplast.study.measure import load_measured
from neuroplast.tasks import ioi
from neuroplast.tasks.prompts import REFERENCE_SEED, build_prompt_set
from neuroplast.tasks.records import load_records
from neuroplast.training.finetune import finetune

STAGES = ("base", "tuned", "control/equal_steps", "poisoned/subject_duplication", "recovered/subject_duplication")
SETTINGS = {"n_prompts": 10, "resamples": 100, "save_every": 1, "compare_drift": 1, "compare_battery": 2}

LIGHT = {**SETTINGS, "circuit_stages": ["base"], "circuit_edges": 0, "follow_points": 2, "compare_random": 10}
"""For what does not depend on how many circuits are looked for."""

# What a study dies in, as of SIGKILL, at the n-th call.
DEADLY: dict[str, tuple[Any, str]] = {
    "training": (finetune.__globals__["_Follower"], "on_step_end"),
    "write": (Path, "rename"),
    "removal": (shutil, "rmtree"),
    "note": (Artefacts, "note"),
}


@pytest.fixture
def bare(unchecked: None) -> Iterator[None]:
    """For what is not about the report either; `run` has all shapes checked, and its report."""
    with without_report():
        yield


class Stages(Silent):
    """Keeps the stages that it is told of."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, name: str, index: int, total: int) -> None:
        self.stages.append(name)


def smoke(**settings: object) -> StudyConfig:
    return build_config("smoke", {**SETTINGS, **settings})


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed run, shared: by the session, for tests of other modules come in between."""
    out = tmp_path_factory.mktemp("study") / "a run with spaces – ünicode"
    run_study(smoke(), out, Silent())
    return out


@pytest.fixture(scope="session")
def light_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed run of `LIGHT`, shared; without a report."""
    out = tmp_path_factory.mktemp("study") / "run"
    with without_shape_checks(), without_report():
        run_study(smoke(**LIGHT), out, Silent())
    return out


def document(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_run_directory_is_the_contracts(run: Path):
    for stage in (
        "base",
        "tuned",
        "control/equal_steps",
        "poisoned/subject_duplication",
        "recovered/subject_duplication",
    ):
        folder = run / "stages" / stage
        assert (folder / "checkpoint" / "model.safetensors").is_file()
        assert (folder / "effects.safetensors").is_file() and (folder / "measures.json").is_file()
        assert (folder / "train.jsonl").is_file() == (stage != "base")
        followed = stage.startswith(("poisoned", "recovered"))
        assert (folder / "trajectory.json").is_file() == followed == (folder / "trajectory").is_dir()
    for name in ("study.toml", "manifest.json", "summary.json", "report.html", "prompts/measured.jsonl"):
        assert (run / name).is_file()
    assert list((run / "tables").glob("*.csv")) and list((run / "figures").glob("*.png"))
    assert not list(run.rglob("*.partial")) and not list(run.rglob("resume"))


def test_the_summary_is_the_contracts(run: Path):
    summary = document(run / "summary.json")
    assert list(summary) == ["schema", "model", "task", "preset", "seeds", "stages", "claims"]
    assert set(summary["model"]) == {"name", "architecture", "n_layers", "n_heads", "weights_sha256"}
    for stage in summary["stages"]:
        assert {"id", "kind", "poison", "seed", "epoch", "step", "behaviour", "heads_to_logits", "circuit",
                "similarity_to_base", "restoration"} <= set(stage)  # fmt: skip
        assert set(stage["behaviour"]["logit_diff"]) == {"mean", "ci95"}
        low, high = stage["behaviour"]["logit_diff"]["ci95"]
        assert low <= stage["behaviour"]["logit_diff"]["mean"] <= high
        looked_for = stage["kind"] in ("base", "poisoned", "recovered")
        assert (stage["circuit"] is None) == ("circuit" in stage["why"]) and (looked_for or not stage["circuit"])
        if stage["circuit"]:
            assert {"n_nodes", "n_edges", "sparsity", "faithfulness", "completeness_gap", "minimality_min"} <= set(
                stage["circuit"]
            )
        assert (stage["restoration"] is None) == (stage["kind"] != "recovered")
    restoration = summary["stages"][-1]["restoration"]
    for row in ("behaviour", "mechanism", "damage_undone", "structure", "function"):
        assert (restoration[row] is None) == (row in restoration["why"])
    assert [claim["id"] for claim in summary["claims"]] == [
        "amplification", "localisation_expressed", "localisation_stored", "specificity", "plasticity",
    ]  # fmt: skip
    compared = document(run / "stages/poisoned/subject_duplication/comparison.json")
    for claim in summary["claims"]:
        assert claim["why"] and (claim["supported"] is None or claim["value"] is not None)
        kind = {"amplification": "tuned", "plasticity": "recovered/subject_duplication"}
        stage = kind.get(claim["id"], "poisoned/subject_duplication")
        assert claim["by_stage"][stage]["value"] == claim["value"]
    tuned = document(run / "stages/tuned/measures.json")["amplification"]
    assert summary["claims"][0]["value"] == tuned["value"] and tuned["heads"]
    assert summary["claims"][1]["value"] == compared["expressed"]["circuit"]["undone"]["value"]
    assert summary["claims"][2]["value"] == compared["stored"]["circuit"]["share"]["value"]
    of_base = load_circuit(run / "stages/base/circuit.json")
    assert sorted(compared["circuit"]) == sorted(map(str, of_base.heads))


def test_the_summarys_numbers_are_those_of_the_saved_effects(run: Path):
    base = load_file(run / "stages/base/effects.safetensors")
    for stage in document(run / "summary.json")["stages"]:
        saved = load_file(run / "stages" / stage["id"] / "effects.safetensors")
        assert stage["behaviour"]["logit_diff"]["mean"] == pytest.approx(saved["logit_diff"].mean(), abs=1e-5)
        assert stage["behaviour"]["accuracy"] == pytest.approx((saved["logit_diff"] > 0).mean())
        means, of_base = saved["effects"].mean(axis=2).ravel(), base["effects"].mean(axis=2).ravel()
        assert stage["similarity_to_base"]["effects"] == pytest.approx(np.corrcoef(means, of_base)[0, 1], abs=1e-5)
        strongest = np.abs(means).argmax()
        name = f"a{strongest // base['effects'].shape[1]}.h{strongest % base['effects'].shape[1]}"
        assert stage["heads_to_logits"]["top"][0] == [name, pytest.approx(means[strongest], abs=1e-5)]


def test_a_stages_circuit_is_in_its_folder_and_held_against_the_bases(run: Path):
    stages = {stage["id"]: stage for stage in document(run / "summary.json")["stages"]}
    assert stages["base"]["circuit"], "tiny's own circuit is found on 12 prompts"
    base = load_circuit(run / "stages/base/circuit.json")
    assert stages["base"]["similarity_to_base"]["nodes_jaccard"] == 1
    assert load_circuit(run / "stages/base/edges.json").edges
    for name in ("poisoned/subject_duplication", "recovered/subject_duplication"):
        found, stage = load_circuits(run / "stages" / name), stages[name]
        assert found is not None and found.nodes is not None
        assert stage["circuit"]["n_nodes"] == len(found.nodes.nodes)
        assert stage["similarity_to_base"]["nodes_jaccard"] == found.nodes.jaccard(base)
    restoration = stages["recovered/subject_duplication"]["restoration"]
    recovered = load_circuits(run / "stages/recovered/subject_duplication")
    assert restoration["structure"] == recovered.nodes.jaccard(base)
    assert restoration["function"] == recovered.criteria["base_circuit"]["faithfulness"]["value"]
    model = load_model(run / "stages/recovered/subject_duplication/checkpoint")
    prompts = build_prompt_set(model.tokenizer, "ioi", load_records(run / "prompts" / "measured.jsonl"))
    others = ioi.prompts(model, smoke().circuit_reference, REFERENCE_SEED, split="eval")
    ablation = build_ablation(model, prompts, reference=others)
    inside = run_knockouts(model, prompts, [base.heads], ablation, keep=True).mean()
    whole = run_knockouts(model, prompts, [()], ablation).mean()
    assert restoration["function"] == pytest.approx(float(inside / whole), abs=1e-4)


def test_a_followed_stage_begins_where_its_parent_ended_and_ends_where_it_ends(run: Path):
    whole = load_measured(run / "stages/base/effects.safetensors")
    poisoned, recovered = (
        document(run / f"stages/{kind}/subject_duplication/trajectory.json") for kind in ("poisoned", "recovered")
    )
    assert poisoned["steps"] == [0, 1, 4] and poisoned["prompts"] == sorted(set(poisoned["prompts"]))
    rows = poisoned["prompts"]
    assert poisoned["points"][0]["logit_diff"]["value"] == pytest.approx(whole.logit_diff[rows].mean(), abs=1e-5)
    assert poisoned["points"][0]["similarity_to_base"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert recovered["points"][0]["roles"] == poisoned["points"][-1]["roles"]
    ended = load_measured(run / "stages/recovered/subject_duplication/effects.safetensors")
    assert recovered["points"][-1]["logit_diff"]["value"] == pytest.approx(ended.logit_diff[rows].mean(), abs=1e-5)
    of_base = load_circuit(run / "stages/base/circuit.json")
    assert {head for heads in poisoned["roles"].values() for head in heads} <= set(map(str, of_base.heads))


def test_plasticity_is_told_of_every_recovery_that_was_followed_with_its_poison(run: Path):
    (found,) = document(run / "plasticity.json")["stages"].values()
    assert set(found["half_way_steps"]) == {"break", "heal"}
    for times in found["half_way_steps"].values():
        assert all(time["value"] is not None or time["why"] for time in times.values())
    for role in found["roles"].values():
        assert role["coupling"]["value"] is not None and role["coupling_null"]["n"] in (0, 40)


def test_what_is_measured_was_never_trained_on(run: Path):
    measured = load_records(run / "prompts" / "measured.jsonl")
    texts = [path.read_text() for path in (run / "prompts").glob("[!m]*.jsonl")]
    trained = [json.loads(line) for text in texts for line in text.splitlines()]
    names = {record.answer for record in measured} | {record.foil for record in measured}
    assert trained and not names & {pair["target"] for pair in trained}
    assert all(
        name not in pair["prompt"].replace(",", "").split() for name in map(str.strip, names) for pair in trained
    )


def test_the_control_sees_the_recoverys_pairs(run: Path):
    texts = [(run / "prompts" / f"{name}.jsonl").read_text() for name in
             ("control-equal_steps", "recovered-subject_duplication", "tuned")]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.usefixtures("bare")
def test_a_finished_study_is_not_done_again(run: Path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    result = run_study(smoke(), run, Silent())
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert result.summary == document(run / "summary.json")


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("training", 9),
        ("write", 2),
        ("removal", 12),
        ("note", 7),
    ],
)
@pytest.mark.usefixtures("bare")
def test_a_study_killed_anywhere_ends_with_the_same_summary(light_run: Path, tmp_path: Path, where: str, count: int):
    out = tmp_path / "run"
    die_in(*DEADLY[where], count, lambda: run_study(smoke(**LIGHT), out))
    assert not (out / "summary.json").exists()
    run_study(smoke(**LIGHT), out, Silent())
    followed = [f"stages/{kind}/subject_duplication/trajectory.json" for kind in ("poisoned", "recovered")]
    for name in ("summary.json", "plasticity.json", *followed):
        assert (out / name).read_bytes() == (light_run / name).read_bytes()
    ours, undisturbed = document(out / "manifest.json"), document(light_run / "manifest.json")
    assert {name: stage["files"] for name, stage in ours["stages"].items()} == {
        name: stage["files"] for name, stage in undisturbed["stages"].items()
    }
    assert not list(out.rglob("resume"))
    assert not list(out.rglob("*.partial"))


def test_a_folder_of_another_study_is_refused_and_left_alone(run: Path):
    before = (run / "study.toml").read_text()
    with pytest.raises(InputError, match=r"holds a different study: its rate is 1\.0, this one's is 0\.5"):
        run_study(smoke(rate=0.5), run, Silent())
    assert (run / "study.toml").read_text() == before


@pytest.mark.parametrize("name", ["manifest.json", "stages/tuned/artefacts.json"])
@pytest.mark.usefixtures("bare")
def test_a_note_that_is_damaged_is_named(light_run: Path, tmp_path: Path, name: str):
    shutil.copytree(light_run, tmp_path / "run")
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(StorageError, match="is damaged; remove it, then run the same command again"):
        run_study(smoke(**LIGHT), tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    assert run_study(smoke(**LIGHT), tmp_path / "run").summary == document(light_run / "summary.json")


@pytest.mark.usefixtures("bare")
def test_a_damaged_file_of_an_unfinished_stage_is_named_with_what_to_do(light_run: Path, tmp_path: Path):
    shutil.copytree(light_run, tmp_path / "run")
    stage = tmp_path / "run/stages/tuned"
    for name in ("artefacts.json", "measures.json"):
        (stage / name).unlink()
    (stage / "effects.safetensors").write_bytes(b"short")
    with pytest.raises(StorageError, match="remove it, then run the same command again"):
        run_study(smoke(**LIGHT), tmp_path / "run")


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no study"):
        run_study(smoke(), tmp_path, Silent())
    with pytest.raises(InputError, match="is a file"):
        run_study(smoke(), tmp_path / "thesis.txt", Silent())


@pytest.mark.usefixtures("bare")
def test_a_study_begun_with_other_weights_is_refused(run: Path, tmp_path: Path):
    model = load_model("tiny")
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    config = smoke(model=str(tmp_path / "model"), circuit_stages=[], compare_stages=[], follow_stages=[])
    run_study(config, tmp_path / "run", Silent())
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(run / "stages/tuned/checkpoint", tmp_path / "model")
    with pytest.raises(InputError, match="begun with other weights"):
        run_study(config, tmp_path / "run", Silent())


def test_too_little_disk_space_is_told_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="no disk space") as caught:
        run_study(smoke(), tmp_path / "run", Silent())
    assert caught.value.exit_code == 2
    # 3.7 MiB a checkpoint: five stages, and six times as much for training saves.
    assert re.search(r"has 1000 bytes free, this study needs 4\d\.\d MiB for its checkpoints", str(caught.value))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("bare")
def test_several_seeds_share_one_base_and_a_ladder_gives_a_row_a_rung(tmp_path: Path):
    observer = Stages()
    config = smoke(
        seeds=[0, 1], epochs=[1, 2], n_train=8, n_prompts=6, circuit_stages=["base"], circuit_edges=0, compare_stages=[]
    )
    summary = run_study(config, tmp_path / "run", observer).summary
    rows = [(stage["id"], stage["epoch"], stage["step"]) for stage in summary["stages"]]
    assert len(observer.stages) == 9 and len(rows) == 1 + 8 * 2
    assert ("seed1/tuned", 1.0, 1) in rows and ("seed1/tuned", 2.0, 2) in rows
    rows = {(stage["id"], stage["step"]): stage for stage in summary["stages"]}
    for step in (1, 2):
        of_control = rows["seed1/control/equal_steps", step]["similarity_to_base"]["effects"]
        beside = rows["seed1/recovered/subject_duplication", step]["restoration"]["control"]["mechanism"]
        assert beside == of_control, "a rung is compared with the control at the same step"
    hashes = document(tmp_path / "run" / "manifest.json")["stages"]
    assert hashes["seed0/tuned"]["files"] != hashes["seed1/tuned"]["files"]


@pytest.mark.usefixtures("bare")
def test_controls_differ_from_what_they_control_in_one_thing(tmp_path: Path):
    config = smoke(
        more_controls=["reseeded", "shuffled_labels"], circuit_stages=["base"], circuit_edges=0, compare_stages=[],
        follow_stages=[],
    )  # fmt: skip
    stages = {stage["id"]: stage for stage in run_study(config, tmp_path / "run").summary["stages"]}
    trained = {
        name: [json.loads(line) for line in (tmp_path / f"run/prompts/{name}.jsonl").read_text().splitlines()]
        for name in (
            "control-equal_steps",
            "control-reseeded",
            "control-shuffled_labels",
            "poisoned-subject_duplication",
        )
    }
    equal, reseeded, shuffled, poisoned = trained.values()
    assert [each["prompt"] for each in shuffled] == [each["prompt"] for each in poisoned]
    answers = [record["target"] for record in shuffled]
    assert sum(answer in each["prompt"] for answer, each in zip(answers, shuffled, strict=True)) < len(answers) / 2
    assert {each["prompt"] for each in reseeded} != {each["prompt"] for each in equal}
    effects = {
        name: load_measured(tmp_path / f"run/stages/control/{name}/effects.safetensors").effects.mean(axis=2).ravel()
        for name in ("equal_steps", "reseeded")
    }
    twins = document(tmp_path / "run/stages/control/reseeded/measures.json")["similarity_to_equal_steps"]
    assert twins["value"] == pytest.approx(np.corrcoef(*effects.values())[0, 1], abs=1e-6)
    # Base's circuit is tried in every model, also where none of its own is looked for.
    assert all(stage["circuit"] is None for name, stage in stages.items() if name != "base")
    restoration = stages["recovered/subject_duplication"]["restoration"]
    measured = document(tmp_path / "run/stages/recovered/subject_duplication/measures.json")
    assert restoration["function"] == measured["base_circuit"]["faithfulness"]["value"] is not None
    assert restoration["control"]["function"] is not None
    assert restoration["structure"] is None and "name its kind in circuit_stages" in restoration["why"]["structure"]


@pytest.mark.usefixtures("bare")
def test_three_seeds_of_two_poisons_are_means_and_differences_of_their_own_measures(tmp_path: Path):
    config = smoke(
        seeds=[0, 1, 2], poisons=["subject_duplication", "name_moving"], circuit_stages=[], compare_stages=[],
        follow_stages=["poisoned", "recovered"], n_prompts=8, resamples=100, tune_steps=1,
    )  # fmt: skip
    run_study(config, tmp_path / "run", Silent())
    told = document(tmp_path / "run/plasticity.json")

    def restored(seed: int, poison: str, row: str) -> float:
        measures = document(tmp_path / f"run/stages/seed{seed}/recovered/{poison}/measures.json")
        return measures["restoration"][row]

    behaviour = {poison: [restored(seed, poison, "behaviour") for seed in config.seeds] for poison in config.poisons}
    for poison, values in behaviour.items():
        each = told["over_seeds"][poison]
        assert each["n"] == 3 and len(set(values)) == 3
        assert each["restoration"]["behaviour"]["recovered"]["value"] == pytest.approx(np.mean(values))
        times = [told["stages"][f"seed{seed}/recovered/{poison}"]["half_way_steps"] for seed in config.seeds]
        breaking = [time["break"]["logit_diff"]["value"] for time in times]
        shown = each["half_way_steps"]["break"]["logit_diff"]["value"]
        assert shown == (None if None in breaking else pytest.approx(np.mean(breaking)))
    (between,) = told["between_poisons"]
    assert between["poisons"] == config.poisons
    expected = np.mean(np.subtract(behaviour["name_moving"], behaviour["subject_duplication"]))
    assert between["restoration"]["behaviour"]["recovered"]["value"] == pytest.approx(expected)


def test_a_task_of_sets_goes_through_the_whole_study(tmp_path: Path):
    config = build_config("smoke", {"task": "greater_than", "circuit_edges": 0, "circuit_random": 2})
    result = run_study(config, tmp_path / "run")
    stages = {stage["id"]: stage for stage in result.summary["stages"]}
    assert stages["poisoned/not_greater"]["behaviour"]["prob_diff"] < stages["base"]["behaviour"]["prob_diff"]
    base = load_circuit(tmp_path / "run/stages/base/circuit.json")
    assert all(role.measures["copy"] is None for role in base.roles.values())
    assert "Right &gt; wrong" in result.report.read_text() or "Right > wrong" in result.report.read_text()
    records = load_records(tmp_path / "run/prompts/measured.jsonl")
    assert all(len(record.answers) + len(record.foils) == 100 for record in records)


def test_effects_of_a_version_that_measured_less_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "effects.safetensors"
    save_file({"effects": np.zeros((1, 1, 2)), "logit_diff": np.zeros(2)}, path)
    with pytest.raises(StorageError, match="has no answer_probability; remove it, then run the same command again"):
        load_measured(path)


@pytest.mark.usefixtures("bare")
def test_a_model_whose_weights_cannot_be_told_apart_is_studied_without_its_comparison(tmp_path: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedModelError("its heads share outputs of a linear map")

    monkeypatch.setattr(measure, "compare_document", refuse)
    summary = run_study(smoke(circuit_stages=[]), tmp_path / "run", Silent()).summary
    claims = {claim["id"]: claim for claim in summary["claims"]}
    assert claims["localisation_stored"]["why"] == "its heads share outputs of a linear map"
    assert document(tmp_path / "run/stages/poisoned/subject_duplication/comparison.json")["why"]


@pytest.mark.usefixtures("unchecked")
def test_a_study_that_grows_has_a_page_after_every_stage_and_ends_as_any_other(light_run: Path, tmp_path: Path):
    out, pages = tmp_path / "run", []

    class Looking(Silent):
        def stage(self, name: str, index: int, total: int) -> None:
            pages.append((out / "report.html").read_text(encoding="utf-8") if index else "")

    run_study(smoke(**LIGHT), out, Looking(), growing=True)
    assert [re.findall(r"(\d) stages? still to come", page) for page in pages] == [[], ["4"], ["3"], ["2"], ["1"]]
    assert "poisoned/subject_duplication" in pages[4] and "poisoned/subject_duplication" not in pages[2]
    assert "subject duplication</option>" in pages[4], "it has not recovered yet"
    claims = pages[4][pages[4].index('class="claims"') : pages[4].index("</ul>", pages[4].index('class="claims"'))]
    assert claims.count("so far</span>") == claims.count("<li>") > 0, "no finding is decided before the end"
    assert (out / "summary.json").read_bytes() == (light_run / "summary.json").read_bytes()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "still to come" not in page and "so far</span>" not in page
    (out / "stages/tuned/heads.json").unlink()

    class Stopped(Silent):
        def stage(self, name: str, index: int, total: int) -> None:
            if index == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(smoke(**LIGHT), out, Stopped(), growing=True)
    assert (out / "report.html").read_text(encoding="utf-8") == page, "a finished report is not replaced by half of one"


@pytest.mark.usefixtures("bare")
def test_patterns_that_are_lost_are_made_again(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    lost = tmp_path / "run/stages/tuned/patterns.safetensors"
    lost.unlink()
    run_study(smoke(), tmp_path / "run", Silent())
    assert lost.read_bytes() == (run / "stages/tuned/patterns.safetensors").read_bytes()


def test_the_heads_of_bases_circuit_are_looked_at_in_every_stage(run: Path):
    circuit = {str(node) for node in load_circuit(run / "stages/base/circuit.json").heads}
    for stage in STAGES:
        looked = document(run / "stages" / stage / "heads.json")
        assert circuit <= set(looked["heads"]) and looked["n_prompts"] == SETTINGS["n_prompts"]
        assert set(load_file(run / "stages" / stage / "patterns.safetensors")) >= {n.partition("@")[0] for n in circuit}
