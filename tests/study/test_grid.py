"""Many studies at once: the cells of a grid, what they share, and where they run."""

import json
import os
import re
import resource
import shutil
import signal
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest

from forked import die_in, run_forked
from left_out import without_report, without_shape_checks
from neuroplast.errors import InputError
from neuroplast.locks import allow_locks, writing
from neuroplast.observer import Silent
from neuroplast.study import artefacts, build_config, jobs, run_study
from neuroplast.study.artefacts import ARTEFACTS, Artefacts
from neuroplast.study.cluster import BESIDE, Cluster, resources
from neuroplast.study.grid import build_grid, run_grid, write_grid
from neuroplast.study.jobs import Cell, Inline, Job, Worker, run_cells
from neuroplast.study.runner import run_study as run_one

LIGHT: dict[str, Any] = {
    "preset": "smoke",
    "n_prompts": 6,
    "resamples": 100,
    "circuit_stages": [],
    "compare_stages": [],
    "follow_stages": [],
    "look_stages": [],
}
GRID = {**LIGHT, "grid": {"models": ["tiny"], "rates": [0.5, 1.0], "seeds": [0, 1]}}
NAMES = ["tiny-rate0.5-seed0", "tiny-rate0.5-seed1", "tiny-rate1.0-seed0", "tiny-rate1.0-seed1"]


class Listening(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.turns: list[tuple[str, int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stage(self, name: str, index: int, total: int) -> None:
        self.turns.append((name, index, total))


@pytest.fixture(scope="module", autouse=True)
def _bare():
    with without_shape_checks(), without_report():
        yield


def run_inline(document: dict[str, Any], out: Path, observer: Listening | None = None) -> dict[str, Any]:
    listening, grid = observer or Listening(), build_grid(document, out, {})
    result = run_grid(grid, out, Inline(listening, "neuroplast"), listening)
    write_grid(grid, out, result)
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grid") / "a grid – ünicode"
    run_inline(GRID, out)
    return out


def summaries(out: Path) -> dict[str, bytes]:
    return {name: (out / "cells" / name / "summary.json").read_bytes() for name in NAMES}


def test_a_cell_for_each_combination_with_the_settings_of_all(tmp_path: Path):
    grid = build_grid(GRID, tmp_path, {"task": "ioi"}, ["tune_steps=2"])
    assert [cell.name for cell in grid.cells] == NAMES
    for cell, values in zip(grid.cells, grid.values, strict=True):
        assert cell.out == tmp_path / "cells" / cell.name
        assert (cell.config.rate, cell.config.seeds) == (values["rate"], [values["seeds"]])
        assert (cell.config.n_prompts, cell.config.tune_steps, cell.config.threads) == (6, 2, 1)


def test_any_setting_is_an_axis_and_lists_of_lists_are_cells_of_several(tmp_path: Path):
    poisons = [["subject_duplication", "name_moving"], "duplication"]
    grid = build_grid({"grid": {"poisons": poisons, "learning_rate": [1e-4, 3e-4]}}, tmp_path, {})
    assert [cell.name for cell in grid.cells] == [
        "subject_duplication+name_moving-learning_rate0.0001",
        "subject_duplication+name_moving-learning_rate0.0003",
        "duplication-learning_rate0.0001",
        "duplication-learning_rate0.0003",
    ]
    assert grid.cells[0].config.poisons == poisons[0] and grid.cells[2].config.poisons == ["duplication"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"grid = {}: expected a table with at least one axis"),
        ({"sedes": [1]}, "unknown axis 'sedes': did you mean 'seeds'"),
        ({"seeds": 3}, "axis seeds = 3: expected a list of values"),
        ({"seeds": []}, "expected a list of values"),
        ({"seeds": [1, 1]}, "each value may be named once"),
        ({"seeds": [1], "seed": [2]}, "axis seeds is named twice"),
        ({"n_prompts": [8, 9]}, "n_prompts is an axis of the grid and set for all cells too"),
        ({"rates": [0.5, 2.0]}, r"cell rate2.0: rate = 2.0"),
        ({"poisons": ["not_greater"]}, "cell not_greater: "),
        ({"seeds": list(range(101)), "n_train": list(range(1, 101))}, "has 10100 cells; expected at most 10000"),
    ],
)
def test_a_wrong_grid_is_one_clear_line(tmp_path: Path, table: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        build_grid({**LIGHT, "grid": table}, tmp_path, {})


def test_a_value_that_is_a_path_has_a_name_of_its_own_whatever_stands_beside_it(tmp_path: Path):
    models = ["a/checkpoint", "b/checkpoint", "..", "."]
    names = {}
    for values in (models, models[::-1], models[1:2]):
        grid = build_grid({**LIGHT, "grid": {"models": values}}, tmp_path, {})
        for cell, value in zip(grid.cells, values, strict=True):
            assert names.setdefault(value, cell.name) == cell.name
    assert names["a/checkpoint"].startswith("checkpoint-") and len(set(names.values())) == 4
    assert all(name.strip(".") and "/" not in name for name in names.values())


def test_a_cell_is_the_study_of_its_settings(finished: Path, tmp_path: Path):
    """What it shares with others was made for them, and is the same to the byte."""
    run_study(
        build_config("quick", LIGHT, {"model": "tiny", "rate": 1.0, "seeds": [1], "threads": 1}), tmp_path / "run"
    )
    cell = finished / "cells" / "tiny-rate1.0-seed1"
    for path in sorted((tmp_path / "run").rglob("*")):
        if path.is_file() and path.name not in ("manifest.json", ARTEFACTS, "report.html"):
            assert (cell / path.relative_to(tmp_path / "run")).read_bytes() == path.read_bytes(), path


def test_what_cells_share_is_made_once(finished: Path):
    of_rate = {rate: finished / "cells" / f"tiny-rate{rate}-seed0" / "stages" for rate in ("0.5", "1.0")}
    for stage in ("base", "tuned", "control/equal_steps"):
        first, second = (folder / stage / "checkpoint/model.safetensors" for folder in of_rate.values())
        assert first.samefile(second)
    first, second = (folder / "poisoned/subject_duplication/effects.safetensors" for folder in of_rate.values())
    assert first.read_bytes() != second.read_bytes()


def test_a_grid_tells_what_came_of_every_cell(finished: Path):
    result = json.loads((finished / "grid.json").read_text())
    assert (result["n_cells"], result["n_failed"]) == (4, 0)
    assert [cell["name"] for cell in result["cells"]] == NAMES
    for cell in result["cells"]:
        summary = json.loads((finished / cell["folder"] / "summary.json").read_text())
        assert [stage["logit_diff"] for stage in cell["stages"]] == [
            stage["behaviour"]["logit_diff"] for stage in summary["stages"]
        ]
        assert set(cell["claims"]) == {claim["id"] for claim in summary["claims"]}
    assert tomllib.loads((finished / "grid.toml").read_text()) == GRID
    page, table = (finished / f"grid.{kind}" for kind in ("html", "csv"))
    assert all(name in text for text in (page.read_text(), table.read_text()) for name in NAMES)


def test_a_finished_grid_is_not_done_again_and_may_grow(finished: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    listening = Listening()
    larger = {**GRID, "grid": {**GRID["grid"], "seeds": [0]}}
    assert run_inline(larger, finished, listening)["n_cells"] == 2
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before
    assert [turn[1:] for turn in listening.turns] == [(index, 12) for index in range(12)]


def test_a_cell_that_fails_does_not_stop_the_others_and_is_told(tmp_path: Path):
    taken = tmp_path / "cells" / "rate0.5"
    taken.mkdir(parents=True)
    (taken / "thesis.txt").write_text("mine")
    (tmp_path / "grid.toml").write_text("")
    listening = Listening()
    result = run_inline({**LIGHT, "grid": {"rates": [0.5, 1.0]}}, tmp_path, listening)
    first, second = result["cells"]
    assert (first["status"], second["status"], result["n_failed"]) == ("failed", "finished", 1)
    assert "is not empty and holds no study" in first["why"]
    assert any(line.startswith("rate0.5: ") and "holds no study" in line for line in listening.lines)
    assert list(taken.iterdir()) == [taken / "thesis.txt"]


def test_a_grid_that_is_killed_on_its_way_goes_on(finished: Path, tmp_path: Path):
    """Also where cells that had not begun share stages with one that had."""
    out = tmp_path / "grid"
    die_in(Worker, "run", 4, lambda: run_inline(GRID, out))
    assert run_inline(GRID, out)["n_failed"] == 0
    assert summaries(out) == summaries(finished)


def test_a_damaged_note_of_one_cell_does_not_stop_the_others(finished: Path, tmp_path: Path):
    out = shutil.copytree(finished, tmp_path / "grid")
    (out / "cells" / NAMES[0] / "stages/tuned/artefacts.json").write_text("junk")
    result = run_inline(GRID, out)
    assert [cell["status"] for cell in result["cells"]] == ["failed", "finished", "finished", "finished"]
    assert result["cells"][0]["why"].endswith("artefacts.json is damaged; remove it, then run the same command again")


def test_a_stage_that_fails_ends_its_cell_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(runner: Any, stage: Any, like: Any) -> bool:
        if stage.id == "tuned" and runner.context.config.rate == 0.5:
            raise RuntimeError("no memory left\nat line 3")
        return former(runner, stage, like)

    former = run_one.__globals__["StageRunner"].run
    monkeypatch.setattr("neuroplast.study.stage_runner.StageRunner.run", refuse)
    out = tmp_path / "grid"
    result = run_inline({**LIGHT, "grid": {"rates": [0.5, 1.0]}}, out)
    assert [cell["status"] for cell in result["cells"]] == ["failed", "finished"]
    assert result["cells"][0]["why"] == "RuntimeError: no memory left"
    monkeypatch.undo()
    assert [cell["status"] for cell in run_inline({**LIGHT, "grid": {"rates": [0.5, 1.0]}}, out)["cells"]] == [
        "finished",
        "finished",
    ]


def test_what_cannot_be_handed_over_or_tidied_up_ends_its_cell_alone(finished: Path, monkeypatch: pytest.MonkeyPatch):
    class Refusing(Inline):
        def submit(self, job: Job) -> None:
            if job.cell.name == NAMES[0]:
                raise InputError("it needs a machine that is not there")
            super().submit(job)

    def fail(out: Path, *others: Any, **more: Any) -> None:
        if out.name == NAMES[1]:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(jobs, "prune_checkpoints", fail)
    listening = Listening()
    result = run_grid(build_grid(GRID, finished, {}), finished, Refusing(listening, ""), listening)
    assert [cell["status"] for cell in result["cells"]] == ["failed", "failed", "finished", "finished"]
    assert [cell["why"] for cell in result["cells"][:2]] == [
        "it needs a machine that is not there",
        "OSError: [Errno 5] Input/output error",
    ]


def test_what_no_cell_keeps_is_gone_when_all_are_finished(tmp_path: Path):
    out = tmp_path / "grid"
    result = run_inline({**LIGHT, "keep": "none", "grid": {"rates": [0.5, 1.0]}}, out)
    assert [cell["status"] for cell in result["cells"]] == ["finished", "finished"]
    assert len(list(out.rglob("effects.safetensors"))) == 10 and not list(out.rglob("model.safetensors"))


def test_a_stage_that_was_half_taken_over_is_taken_over_anew(finished: Path, tmp_path: Path):
    source, target = (Artefacts(out, "tuned") for out in (finished / "cells" / NAMES[0], tmp_path / "run"))
    target.folder.mkdir(parents=True)
    (tmp_path / "run" / "prompts").mkdir()
    die_in(artefacts, "_take_over", 4, lambda: target.adopt(source))
    assert (target.folder / "checkpoint").is_dir() and not (target.folder / "training.json").exists()
    again = Artefacts(tmp_path / "run", "tuned")
    again.adopt(source)
    assert again.check({}) is None and again.files == source.files
    assert all((tmp_path / "run" / name).is_file() for name in source.files)


def test_as_many_files_may_be_open_as_a_grid_has_cells(tmp_path: Path):
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 2000))
        allow_locks(400)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 400
        allow_locks(10**6)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 2000

    assert run_forked(work, tmp_path)[0] == 0


def test_two_never_run_one_grid(finished: Path):
    with writing(finished), pytest.raises(InputError, match="is being written by another process"):
        run_inline(GRID, finished)


def test_two_never_run_one_cell(finished: Path):
    listening = Listening()
    with writing(finished / "cells" / NAMES[0]):
        result = run_inline(GRID, finished, listening)
    assert [cell["status"] for cell in result["cells"]] == ["failed", "finished", "finished", "finished"]
    assert "is being written by another process" in result["cells"][0]["why"]


def test_a_stage_says_what_it_needs(finished: Path, tmp_path: Path):
    config = build_config("smoke", {"threads": 3, "device": "cuda"})
    assert resources(config, tmp_path) == {"CPU": 3, "GPU": 1, "memory": BESIDE}
    cell = finished / "cells" / NAMES[0]
    weights = (cell / "stages/base/checkpoint/model.safetensors").stat().st_size
    own = build_config("smoke", {"model": str(cell / "stages/base/checkpoint")})
    for config, out in ((build_config("smoke", {}), cell), (own, tmp_path)):
        assert resources(config, out) == {"CPU": 1, "GPU": 0, "memory": BESIDE + 5 * weights}


def test_a_cluster_gives_the_same_summaries_also_when_a_worker_is_killed(finished: Path, tmp_path: Path):
    out, killed = tmp_path / "grid", []

    class Killing(Listening):
        def stage(self, name: str, index: int, total: int) -> None:
            super().stage(name, index, total)
            at_work = [
                child for child in psutil.Process().children(recursive=True) if "ray::" in "".join(child.cmdline())
            ]
            at_work = [child for child in at_work if "poisoned" in "".join(child.cmdline())]
            if at_work and not killed:
                os.kill(at_work[0].pid, signal.SIGKILL)
                killed.append("".join(at_work[0].cmdline()))

    killing = Killing()
    grid = build_grid(GRID, out, {})
    with Cluster(killing, "neuroplast", workers=2) as cluster:
        with pytest.raises(
            InputError, match=r"needs 64 cores, 0 GPUs and 1\.0 GiB of memory, which this machine does not"
        ):
            cluster.submit(Job(Cell("wide", build_config("smoke", {"threads": 64}), tmp_path / "wide"), "base"))
        with pytest.raises(InputError, match="device 'cuda:1' is one of many; use cuda"):
            cluster.submit(
                Job(Cell("second", build_config("smoke", {"device": "cuda:1"}), tmp_path / "second"), "base")
            )
        cluster.submit(Job(grid.cells[0], "no such stage"))
        assert re.fullmatch("no such stage could not be run: ValueError: .+", str(cluster.wait().error))
        assert run_cells(grid.cells, cluster, killing) == {}
    assert killed
    assert summaries(out) == summaries(finished)
    assert killing.turns[-1][1:] == (23, 24)


def test_no_cluster_is_one_clear_line():
    with pytest.raises(InputError, match="--workers 2 is for a cluster on this machine"):
        Cluster(Listening(), "", address="auto", workers=2)
    with (
        pytest.raises(InputError, match="no Ray cluster at 'nowhere:1'"),
        Cluster(Listening(), "", address="nowhere:1"),
    ):
        pass
