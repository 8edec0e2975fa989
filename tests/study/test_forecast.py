import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from left_out import without_report, without_shape_checks
from neuroplast import cli
from neuroplast.errors import InputError
from neuroplast.observer import Silent
from neuroplast.storage import hash_file
from neuroplast.study import StudyConfig, build_config, run_study
from neuroplast.study import forecast as forecasts
from neuroplast.study.calibration import Speed, calibrate
from neuroplast.study.costs import checkpoint_bytes
from neuroplast.study.forecast import Forecast, StudyForecast, forecast
from neuroplast.study.grid import build_grid
from neuroplast.study.jobs import Cell

SETTINGS = {
    "n_prompts": 8,
    "n_train": 16,
    "tune_steps": 2,
    "poison_steps": 2,
    "recover_steps": 2,
    "batch_size": 4,
    "resamples": 100,
    "circuit_stages": [],
    "compare_stages": [],
    "follow_points": 2,
    "follow_prompts": 4,
    "threads": 1,
}


def settings(**more: object) -> StudyConfig:
    return build_config("smoke", SETTINGS | more)


def tree(folder: Path) -> dict[str, str]:
    return {str(path): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def measured() -> Speed:
    return calibrate(settings(), 8, Silent())


@pytest.fixture(autouse=True)
def speed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Speed:
    """The same speed for all forecasts of a test: what is compared is what they count."""
    measured: Speed = request.getfixturevalue("measured")
    monkeypatch.setattr(forecasts, "calibrate", lambda config, n, observer: replace(measured, n_prompts=n))
    return measured


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    with without_shape_checks(), without_report():
        run_study(settings(), out)
    return out


def plan(out: Path, config: StudyConfig) -> StudyForecast:
    return forecast([Cell("run", config, out)], out).studies[0]


def likely(found: StudyForecast | Forecast) -> float:
    return found.seconds.likely


def test_every_piece_of_work_takes_time_and_room(speed: Speed):
    assert all(value > 0 for value in vars(speed).values())
    assert speed.n_layers == 4 and speed.n_heads == 8 and speed.n_prompts == 8


def test_a_plan_makes_no_folder_and_changes_none(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]):
    assert plan(tmp_path / "new", settings()).seconds.low > 0
    assert list(tmp_path.iterdir()) == []
    before = tree(finished)
    plan(finished, settings())
    assert tree(finished) == before


def test_what_is_there_is_skipped(finished: Path, tmp_path: Path):
    fresh, done = plan(tmp_path / "new", settings()), plan(finished, settings())
    assert {stage.state for stage in fresh.stages} == {"nothing"}
    assert {stage.state for stage in done.stages} == {"made"} and likely(done) == 0 and done.growth == done.passing == 0

    out = tmp_path / "half"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "stages/recovered")
    (out / "stages/tuned/measures.json").unlink()
    (out / "stages/control/equal_steps/effects.safetensors").unlink()
    half = {stage.left.stage.id: stage for stage in plan(out, settings()).stages}
    assert {name: stage.state for name, stage in half.items()} == {
        "base": "made",
        "tuned": "partly",
        "control/equal_steps": "partly",
        "poisoned/subject_duplication": "made",
        "recovered/subject_duplication": "nothing",
    }
    tuned, control, recovered = (half[name] for name in list(half)[1:3] + list(half)[4:])
    assert tuned.document()["to_make"] == ["loading and writing"] and tuned.document()["steps_left"] == 0
    assert control.left.measured == 1 and control.left.steps == 0
    assert recovered.left.steps == 2 and recovered.left.followed == 2
    assert 0 < sum(time.likely for stage in half.values() for time in stage.seconds.values()) < likely(fresh)


def test_an_interrupted_training_has_the_steps_from_its_last_save_left(tmp_path: Path):
    (tmp_path / "run/stages/tuned/resume/step-2").mkdir(parents=True)
    (tmp_path / "run/study.toml").write_text(settings(tune_steps=6).toml())
    tuned = plan(tmp_path / "run", settings(tune_steps=6)).stages[1]
    assert tuned.left.steps == 4 and tuned.document()["steps"] == 6


def test_the_disk_of_a_finished_run_is_foretold(finished: Path, speed: Speed):
    found = plan(finished, settings())
    actual = sum(path.stat().st_size for path in (finished / "stages").rglob("*") if path.is_file())
    assert sum(stage.disk for stage in found.stages) == pytest.approx(actual, rel=0.05)
    checkpoint = sum(path.stat().st_size for path in (finished / "stages/base/checkpoint").iterdir())
    assert checkpoint_bytes(speed) == pytest.approx(checkpoint, rel=0.03)


@pytest.mark.parametrize(
    "more",
    [
        {"n_prompts": 16},
        {"tune_steps": 20},
        {"more_controls": ["reseeded"]},
        {"seeds": [0, 1]},
        {"follow_points": 3},
        {"circuit_stages": ["base"]},
        {"compare_stages": ["poisoned"]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_more_work_takes_longer(more: dict[str, object], tmp_path: Path):
    assert likely(plan(tmp_path / "run", settings(**more))) > likely(plan(tmp_path / "run", settings()))


def test_fewer_checkpoints_need_less_disk(tmp_path: Path):
    found = {keep: plan(tmp_path / "run", settings(keep=keep, epochs=[1, 2])) for keep in ("all", "last", "none")}
    assert found["none"].disk < found["last"].disk < found["all"].disk
    needed = {keep: each.growth + each.passing for keep, each in found.items()}
    assert needed["none"] < needed["all"] and all(found[keep].disk <= needed[keep] for keep in needed)


def test_memory_holds_the_weights_several_times(tmp_path: Path, speed: Speed):
    assert plan(tmp_path / "run", settings()).memory > 5 * speed.weights


def test_a_grid_counts_what_its_cells_share_once(tmp_path: Path):
    document = {"grid": {"poisons": ["subject_duplication", "name_moving"]}}
    assignments = [f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    cells = build_grid(document, tmp_path / "grid", {"preset": "smoke"}, assignments).cells
    one, other = forecast(cells, tmp_path / "grid").studies
    assert [stage.state for stage in one.stages] == ["nothing"] * 5
    assert [stage.state for stage in other.stages] == ["shared"] * 3 + ["nothing"] * 2
    assert likely(other) < likely(one) and other.disk < one.disk
    alone, together = (forecast(cells, tmp_path / "grid", at_once=n) for n in (1, 4))
    assert likely(alone) == pytest.approx(likely(one) + likely(other))
    assert together.elapsed.likely < alone.elapsed.likely == pytest.approx(likely(alone))
    assert together.memory > alone.memory


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["neuroplast", "study", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_prints_a_table_or_a_document(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "study.toml").write_text(settings().toml())
    words = ["--plan", "--config", str(tmp_path / "study.toml"), "--quiet", "--out"]
    assert command(monkeypatch, *words, str(tmp_path / "run"), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["totals"]["by_state"]["nothing"] == 5 and not (tmp_path / "run").exists()
    assert document["totals"]["disk_free_bytes"] > 0
    assert command(monkeypatch, *words, str(finished)) == 0
    assert "5 made already" in capsys.readouterr().out


def test_what_cannot_be_planned_is_refused(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(InputError, match="holds a different study: its n_prompts is 8"):
        plan(finished, settings(n_prompts=9))
    assert command(monkeypatch, "--plan", "--watch", "--out", str(tmp_path / "run")) == 2
    assert "leave --watch out" in capsys.readouterr().err
