"""What is finished is held against its hash when a study is continued."""

import json
import shutil
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forked import die_in
from left_out import without_report, without_shape_checks
from neuroplast.errors import InputError, StorageError
from neuroplast.locks import writing
from neuroplast.observer import Silent
from neuroplast.storage import LOCK
from neuroplast.study import StudyConfig, build_config, build_plan, run_study, stage_runner
from neuroplast.study.artefacts import Artefacts
from neuroplast.study.pruning import prune_checkpoints
from neuroplast.study.stage_runner import StageRunner

POISONED, RECOVERED = "poisoned/subject_duplication", "recovered/subject_duplication"
SETTINGS = {
    "n_prompts": 6,
    "resamples": 100,
    "circuit_stages": [],
    "compare_stages": [],
    "follow_stages": ["poisoned"],
    "look_stages": [],
}


class Listening(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module", autouse=True)
def _bare():
    with without_shape_checks(), without_report():
        yield


def settings(**more: object) -> StudyConfig:
    return build_config("smoke", {**SETTINGS, **more})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "run"
    run_study(settings(), out)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def files_of(run: Path) -> dict[str, bytes]:
    """Everything but what holds times."""
    clocks = ("manifest.json", "artefacts.json")
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in clocks
    }


def again(run: Path, **more: object) -> str:
    """Continues a run; what it said of what it found."""
    listening = Listening()
    run_study(settings(**more), run, listening)
    return "\n".join(line for line in listening.lines if "words can be the answer" not in line)


def test_every_file_of_a_stage_is_noted_with_its_hash(finished: Path):
    for stage in build_plan(settings()):
        there = {path for path in (finished / stage.folder).rglob("*") if path.is_file()}
        there = {path.relative_to(finished).as_posix() for path in there if path.name not in ("artefacts.json", LOCK)}
        trained = {f"prompts/{stage.id.replace('/', '-')}.jsonl"} if stage.parent else set()
        assert set(Artefacts(finished, stage.id).files) == there | trained
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["stages"]["tuned"]["files"] == Artefacts(finished, "tuned").files
    assert manifest["stages"]["tuned"]["seconds"] >= manifest["stages"]["tuned"]["following_seconds"] == 0


@pytest.mark.parametrize(
    "name",
    [
        "stages/base/checkpoint/model.safetensors",
        "stages/base/effects.safetensors",
        "stages/tuned/checkpoint/config.json",
        f"stages/{POISONED}/checkpoint/model.safetensors",
        f"stages/{POISONED}/trajectory/step-000001.safetensors",
        f"stages/{RECOVERED}/measures.json",
        "prompts/tuned.jsonl",
    ],
)
def test_what_was_damaged_is_made_again_and_said(run: Path, name: str):
    before, damaged = files_of(run), run / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    said = again(run)
    assert said == f"damaged: {damaged}; made again"
    assert files_of(run) == before
    assert again(run) == ""
    if name != "stages/tuned/checkpoint/config.json":
        damaged.unlink()
        assert again(run) == f"gone: {damaged}; made again" and files_of(run) == before


def test_a_stage_that_was_made_from_other_weights_is_made_anew_with_all_that_follow(run: Path):
    """As after a retraining that rounded otherwise."""
    before = files_of(run)
    checkpoint = run / "stages" / POISONED / "checkpoint/model.safetensors"
    weights = load_file(checkpoint)
    save_file({name: weight + 1e-3 * torch.ones_like(weight) for name, weight in weights.items()}, checkpoint)
    note = run / "stages" / POISONED / "artefacts.json"
    document = json.loads(note.read_text())
    note.unlink()  # so its weights are as good as any
    assert f"{run / 'stages' / RECOVERED} was made from files that are no longer there" in again(run)
    after = files_of(run)
    assert after[f"stages/{RECOVERED}/effects.safetensors"] != before[f"stages/{RECOVERED}/effects.safetensors"]
    assert after["stages/tuned/effects.safetensors"] == before["stages/tuned/effects.safetensors"]
    # Now the old note's hashes do not fit: the poisoned stage is trained again, and what came of the other goes too.
    note.write_text(json.dumps(document))
    again(run)
    assert files_of(run) == before


@pytest.mark.parametrize("left", ["checkpoint", "resume"])
def test_a_stage_whose_note_is_lost_is_still_not_taken_for_one_of_other_weights(run: Path, left: str):
    before = files_of(run)
    stage = run / "stages" / RECOVERED
    for name in (
        "artefacts.json",
        *(["checkpoint", "measures.json", "effects.safetensors"] if left == "resume" else []),
    ):
        path = stage / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    training = json.loads((stage / "training.json").read_text()) | {"start_sha256": "0" * 64}
    (stage / "training.json").write_text(json.dumps(training))
    again(run)
    assert files_of(run) == before


def test_a_kill_while_a_stage_is_forgotten_leaves_nothing_of_it(run: Path):
    before = files_of(run)
    artefacts = Artefacts(run, "tuned")
    die_in(shutil, "rmtree", 1, artefacts.forget)
    assert (run / "stages/tuned/checkpoint/model.safetensors").is_file(), "the kill came before"
    weights = run / "stages/tuned/effects.safetensors"
    if weights.is_file():
        weights.write_bytes(b"of another model")
    again(run)
    assert files_of(run) == before


def test_what_is_made_again_and_differs_takes_the_whole_stage_with_it(run: Path):
    note = run / "stages/tuned/artefacts.json"
    document = json.loads(note.read_text())
    document["files"]["stages/tuned/effects.safetensors"] = "0" * 64  # as if it had been another
    note.write_text(json.dumps(document))
    before = (run / "stages/tuned/checkpoint/model.safetensors").stat().st_mtime_ns
    said = again(run)
    assert "holds what was made from another file: the whole stage is made again" in said
    assert (run / "stages/tuned/checkpoint/model.safetensors").stat().st_mtime_ns > before
    assert again(run) == ""


def test_a_run_without_notes_is_taken_as_it_is(run: Path):
    """As versions before them left it."""
    before = files_of(run)
    for note in run.rglob("artefacts.json"):
        note.unlink()
    assert again(run) == "" and files_of(run) == before
    assert Artefacts(run, "base").files


def test_a_note_that_names_files_elsewhere_is_damaged(run: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    for name in ("../mine.txt", "stages/tuned/../../../mine.txt", str(tmp_path / "mine.txt"), "stages/base/x"):
        note = run / "stages/tuned/artefacts.json"
        document = json.loads(note.read_text()) | {"files": {name: "0" * 64}}
        note.write_text(json.dumps(document))
        with pytest.raises(StorageError, match="is damaged; remove it"):
            again(run)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("keep", ["last", "none"])
def test_only_the_checkpoints_that_are_kept_stay_and_the_numbers_are_the_same(tmp_path: Path, keep: str):
    ladder = {"epochs": [1, 2], "n_train": 8, "follow_stages": []}
    whole = run_study(settings(**ladder), tmp_path / "all").summary
    out = tmp_path / "run"
    assert run_study(settings(**ladder, keep=keep), out).summary == whole
    stages = build_plan(settings(**ladder))
    left = {path.parent.relative_to(out).as_posix() for path in out.rglob("checkpoint")}
    assert left == ({stage.folder for stage in stages} if keep == "last" else set())
    assert again(out, **ladder, keep=keep) == ""
    # What is lost is made from a checkpoint that is trained again, and is the same.
    lost = out / "stages" / RECOVERED / "epoch-1" / "effects.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    (lost.parent / "measures.json").unlink()
    again(out, **ladder, keep=keep)
    assert lost.read_bytes() == before
    left = {path.parent.relative_to(out).as_posix() for path in out.rglob("checkpoint")}
    assert left == ({stage.folder for stage in stages} if keep == "last" else set())


def test_a_checkpoint_goes_only_when_nothing_is_made_from_it_any_more(run: Path):
    config, stages = settings(keep="none"), build_plan(settings())

    def there() -> set[str]:
        return {stage.id for stage in stages if (run / stage.folder / "checkpoint").is_dir()}

    everything = there()
    prune_checkpoints(run, config, stages, ["base", "tuned", "control/equal_steps", POISONED])
    assert there() == {"base", POISONED, RECOVERED}
    prune_checkpoints(run, config, stages, [stage.id for stage in stages])
    assert there() == set() and len(everything) == 5


def test_a_parent_that_another_child_trains_again_is_waited_for(run: Path, monkeypatch: pytest.MonkeyPatch):
    stages = build_plan(settings())
    prune_checkpoints(run, settings(keep="none"), stages, [stage.id for stage in stages])
    before = (run / "stages" / RECOVERED / "effects.safetensors").read_bytes()
    shutil.rmtree(run / "stages" / RECOVERED)
    held, former = threading.Event(), StageRunner._load_stage

    def hold() -> None:
        with writing(run / "stages" / POISONED):
            held.set()
            time.sleep(1)

    def load_stage(self: StageRunner, stage_id: str):
        if stage_id == POISONED and not held.is_set():
            monkeypatch.setattr(stage_runner, "PATIENCE", 0.1)
            threading.Thread(target=hold).start()
            held.wait()
        return former(self, stage_id)

    monkeypatch.setattr(StageRunner, "_load_stage", load_stage)
    again(run)
    assert held.is_set()
    assert (run / "stages" / RECOVERED / "effects.safetensors").read_bytes() == before


def test_two_never_write_one_folder(run: Path):
    with writing(run), pytest.raises(InputError, match="is being written by another process: let it end or stop it"):
        run_study(settings(), run)
    assert again(run) == ""


def test_a_clock_that_jumps_changes_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "time", count(2e9, -1e6).__next__)
    out = tmp_path / "run"
    run_study(settings(), out)
    assert files_of(out) == files_of(finished)
    seconds = [Artefacts(out, stage.id).seconds[0] for stage in build_plan(settings())]
    assert all(0 <= each < 1000 for each in seconds)


def test_a_lock_leaves_nothing_where_the_run_left_nothing(tmp_path: Path):
    with pytest.raises(InputError, match="unknown"):
        run_study(settings(model="nosuch"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError), writing(tmp_path / "other"):
        (tmp_path / "other" / "mine").touch()
        raise InputError("no")
    assert (tmp_path / "other" / "mine").exists()
